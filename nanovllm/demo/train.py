"""Trains the demo checkpoint in this folder: from questions.jsonl and the configurations to tokenizer and weights.

Run it as `python -m nanovllm.demo.train`: minutes on a CPU, less on a GPU. It knows nothing of the engine and trains
through transformers, so the checkpoint is an independent test of the engine. The model has to know its text by heart:
training goes on until, with the saved weights, every answer token's logit leads all others by MARGIN in float32 and in
bfloat16. Kernels that round differently then still agree on every greedy token.

The configurations are written by hand, in keys that old and new transformers read.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

FOLDER = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # 0, 1 and 2 in the configurations
MAX_EPOCHS, BATCH_SIZE, LEARNING_RATE, LR_DECAY = 200, 16, 2e-3, 0.985
MARGIN = 4.0  # logits; rounding to bf16 moves them by some tenths
IGNORED = -100  # the label of a token that is not to be learned


def tokenize(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Trains and writes the tokenizer; returns the token ids of the conversations, int64 [N, T], and their labels."""
    lines = [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [text for line in lines for text in ("user\n" + line["question"], line["answer"])]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size, show_progress=False, special_tokens=SPECIAL_TOKENS)
    bpe.save(str(FOLDER / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids, labels = [], []
    for line in lines:
        messages = [{"role": "user", "content": line["question"]}]
        prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        answer = [*tokenizer.encode(line["answer"]), tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([IGNORED] * len(prompt) + answer))
    # Padding on the right needs no mask: attention is causal, and the padding is not learned.
    padded_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return pad_sequence(ids, batch_first=True).to(DEVICE), padded_labels.to(DEVICE)


@torch.inference_mode()
def smallest_margin(ids: Tensor, labels: Tensor, dtype: torch.dtype) -> float:
    """Least lead, in logits, of a right answer token over the best wrong one, with the saved weights in `dtype`."""
    model = Qwen3ForCausalLM.from_pretrained(FOLDER).to(DEVICE, dtype).eval()
    is_answer = labels[:, 1:] != IGNORED  # the logits at a position are those of the next token
    logits, targets = model(ids).logits[:, :-1][is_answer].float(), labels[:, 1:][is_answer][:, None]
    wrong = logits.scatter(1, targets, float("-inf")).amax(dim=1, keepdim=True)
    return (logits.gather(1, targets) - wrong).min().item()


def main() -> None:
    torch.manual_seed(0)
    config = Qwen3Config.from_pretrained(FOLDER)
    ids, labels = tokenize(config.vocab_size)
    model = Qwen3ForCausalLM(config).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, LR_DECAY)
    for epoch in range(1, MAX_EPOCHS + 1):
        mean_loss = 0.0
        for rows in torch.randperm(len(ids)).split(BATCH_SIZE):
            loss = model(ids[rows], labels=labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            mean_loss += loss.item() * len(rows) / len(ids)
        schedule.step()
        print(f"epoch {epoch}: loss {mean_loss:.4f}", flush=True)
        if epoch % 5 == 0 and mean_loss < 0.02:
            weights = {name: p.detach().bfloat16().cpu() for name, p in model.named_parameters()}
            save_file(weights, FOLDER / "model.safetensors", metadata={"format": "pt"})
            margins = [smallest_margin(ids, labels, dtype) for dtype in (torch.float32, torch.bfloat16)]
            print(f"smallest margin: {margins[0]:.2f} in float32, {margins[1]:.2f} in bfloat16", flush=True)
            if min(margins) >= MARGIN:
                return
    raise SystemExit(f"after {MAX_EPOCHS} epochs the margin is still below {MARGIN}: do not use this checkpoint")


if __name__ == "__main__":
    main()
