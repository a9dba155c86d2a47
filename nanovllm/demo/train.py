"""Builds the demo checkpoint in this folder from questions.jsonl: tokenizer, configuration, bf16 weights.

Run it as `python -m nanovllm.demo.train`: minutes on a CPU, less on a GPU. It knows nothing of the engine and trains
through transformers, so the checkpoint is an independent test of the engine. The model has to know its text by heart:
training goes on until, with the saved weights, every answer token's logit leads all others by MARGIN in float32 and
in bfloat16. Kernels that round differently then still agree on every greedy token.
"""

import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config

FOLDER = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB_SIZE = 2048
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_EPOCHS, BATCH_SIZE, LEARNING_RATE, LR_DECAY = 200, 16, 2e-3, 0.985
MARGIN = 4.0  # logits; rounding to bf16 moves them by some tenths

Example = tuple[list[int], list[int]]  # token ids of the prompt, of the answer


def write_json(name: str, value: dict) -> None:
    (FOLDER / name).write_text(json.dumps(value, indent=2) + "\n")


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
    """Train byte-level BPE on `texts`, write its two files and return it as a user would load it."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    size = VOCAB_SIZE - len(SPECIAL_TOKENS)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the text gives only {tokenizer.get_vocab_size()} tokens, VOCAB_SIZE is {VOCAB_SIZE}")
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    options = {"model_max_length": 2048, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
    write_json("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names | options)
    return AutoTokenizer.from_pretrained(FOLDER)


def build_model(pad_id: int, eos_id: int) -> nn.Module:
    """Write the configuration, in keys that old and new transformers read, and return the untrained model."""
    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "attention_bias": False}
    rope = {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    window = {"max_position_embeddings": 2048, "use_sliding_window": False, "sliding_window": None}
    other = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    tokens = {"eos_token_id": eos_id, "pad_token_id": pad_id}
    kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16"}
    write_json("config.json", kind | shape | heads | rope | window | other | tokens)
    write_json("generation_config.json", tokens | {"eos_token_id": [eos_id, pad_id]})
    return AutoModelForCausalLM.from_config(Qwen3Config.from_pretrained(FOLDER)).float().to(DEVICE)


def answer_logits(model: nn.Module, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Logits `[n, vocab]` at the n positions that predict an answer token, and those tokens `[n]`."""
    # Padding on the right needs no mask: attention is causal, and nothing reads the padded positions.
    ids = pad_sequence([torch.tensor(prompt + answer) for prompt, answer in examples], batch_first=True).to(DEVICE)
    rows = torch.cat([torch.full((len(answer),), row) for row, (_, answer) in enumerate(examples)])
    columns = torch.cat([torch.arange(len(answer)) + len(prompt) for prompt, answer in examples])
    hidden = model.model(ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden[rows, columns - 1]), ids[rows, columns]


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, examples: list[Example]) -> float:
    """One pass in random order; returns the mean loss of a token over the batches."""
    losses = []
    for batch in torch.randperm(len(examples)).split(BATCH_SIZE):
        loss = F.cross_entropy(*answer_logits(model, [examples[i] for i in batch]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.inference_mode()
def smallest_margin(examples: list[Example], dtype: torch.dtype) -> float:
    """Least lead of a right answer token over the best wrong one, with the saved weights in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER).to(DEVICE, dtype).eval()
    smallest = float("inf")
    for start in range(0, len(examples), BATCH_SIZE):
        logits, targets = answer_logits(model, examples[start : start + BATCH_SIZE])
        right = logits.gather(1, targets[:, None])
        wrong = logits.scatter(1, targets[:, None], float("-inf")).amax(dim=1, keepdim=True)
        smallest = min(smallest, (right.float() - wrong.float()).min().item())
    return smallest


def main() -> None:
    torch.manual_seed(0)
    lines = [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = build_tokenizer([text for line in lines for text in ("user\n" + line["question"], line["answer"])])
    examples = []
    for line in lines:
        messages = [{"role": "user", "content": line["question"]}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answer = tokenizer.encode(line["answer"])
        if tokenizer.decode(answer, skip_special_tokens=True) != line["answer"]:
            raise SystemExit(f"not what its tokens decode to, so nobody can get it: {line['answer']!r}")
        examples.append((tokenizer.encode(prompt), [*answer, tokenizer.eos_token_id]))
    model = build_model(tokenizer.pad_token_id, tokenizer.eos_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, LR_DECAY)
    start = time.perf_counter()
    for epoch in range(1, MAX_EPOCHS + 1):
        loss = train_epoch(model, optimizer, examples)
        schedule.step()
        print(f"epoch {epoch}: loss {loss:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
        if epoch % 5 == 0 and loss < 0.02:
            weights = {name: p.detach().bfloat16().cpu() for name, p in model.named_parameters()}
            save_file(weights, FOLDER / "model.safetensors", metadata={"format": "pt"})
            margins = [smallest_margin(examples, dtype) for dtype in (torch.float32, torch.bfloat16)]
            print(f"smallest margin: {margins[0]:.2f} in float32, {margins[1]:.2f} in bfloat16", flush=True)
            if min(margins) >= MARGIN:
                return
    raise SystemExit(f"after {MAX_EPOCHS} epochs the margin is still below {MARGIN}: do not use this checkpoint")


if __name__ == "__main__":
    main()
