"""Trains the demo checkpoint in this folder: from questions.jsonl and the configurations to tokenizer and weights.

Run it as `python -m nanovllm.demo.train`, best on a GPU. It knows nothing of the engine and trains through
transformers, so the checkpoint is an independent test of the engine. The model has to know its text by heart: training
goes on until, with the saved weights, every answer token's logit leads all others by MARGIN in float32 and in
bfloat16. Kernels that round differently then still agree on every greedy token.

The first tokens of tokenizer.json, for English text, stay what they are, as docs/guide shows their ids and counts
them. Those behind them are for Chinese text, and learnt anew.

The configurations are written by hand, in keys that old and new transformers read.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

FOLDER = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_KEPT = 2048  # tokens: 3 special ones (0, 1 and 2 in the configurations), 256 bytes and what merges give
NUM_KEPT_MERGES = NUM_KEPT - 3 - 256
MAX_EPOCHS, BATCH_SIZE, LEARNING_RATE, LR_DECAY = 200, 16, 2e-3, 0.985
MARGIN = 4.0  # logits; rounding to bf16 moves them by some tenths
IGNORED = -100  # the label of a token that is not to be learned


def extend_tokenizer(texts: list[str], vocab_size: int) -> None:
    """Gives tokenizer.json tokens for what is not ASCII in the texts, up to `vocab_size` in all.

    Their merges join bytes that no ASCII text has and come behind all others, so that English stays as it was.

    Raises:
        ValueError: the texts do not give as many.
    """
    path = FOLDER / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    bpe = tokenizer["model"]
    bpe["vocab"] = {token: token_id for token, token_id in bpe["vocab"].items() if token_id < NUM_KEPT}
    bpe["merges"] = bpe["merges"][:NUM_KEPT_MERGES]
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(re.findall(r"[^\x00-\x7f]+", "\n".join(texts)), vocab_size, show_progress=False)
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        if left + right not in bpe["vocab"] and len(bpe["vocab"]) < vocab_size:
            bpe["vocab"][left + right] = len(bpe["vocab"])
            bpe["merges"].append([left, right])
    if len(bpe["vocab"]) < vocab_size:
        raise ValueError(f"vocab_size={vocab_size} in config.json must be at most {len(bpe['vocab'])} for these texts")
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")


def tokenize(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Writes the tokenizer; returns the token ids of the conversations, int64 [N, T], and their labels."""
    lines = [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    extend_tokenizer([text for line in lines for text in (line["question"], line["answer"])], vocab_size)
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
