"""Logprobs on the host: what a step brought of them, as a request's result holds them.

A row of them comes packed, int32 [2 * k + 3], so that one copy takes all from the device: the ids of the token itself
and of the k most likely ones, the logprobs' bits, and the token's rank.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels.logprobs import top_logprobs
from nanovllm.outputs import Logprob, Logprobs
from nanovllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanovllm.engine.scheduler import Batch
    from nanovllm.engine.sequence import Sequence

TOP_SIZES = (0, 1, 5, 20)


def pack_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Tensor:
    """The packed logprobs, int32 [B, 2 * num_top + 3], of logits [B, V]: of token_ids, int64 [B], and the best."""
    values, ids, ranks = top_logprobs(logits, token_ids, num_top)
    return torch.cat([ids.int(), values.view(torch.int32), ranks.int()[:, None]], dim=1)


def num_logprobs_of(nums_top: Iterable[int | None], vocab_size: int) -> int:
    """How many logprobs a step tells of each row: a token's own and the most that someone asked for; 0 for none.

    The most of a few sizes, as each has CUDA graphs of its own.
    """
    asked = [vocab_size if num_top == -1 else num_top for num_top in nums_top if num_top is not None]
    if not asked:
        return 0
    most = max(asked)
    return 1 + min(next((size for size in TOP_SIZES if size >= most), most), vocab_size)


def prompt_targets(seq: "Sequence", start: int, num_tokens: int) -> list[int]:
    """The tokens of a sequence's prompt that the logits of so many of its tokens from `start` on are about."""
    return seq.token_ids[start + 1 : min(start + num_tokens + 1, seq.num_prompt_tokens)]


def list_prompt_targets(batch: "Batch") -> np.ndarray:
    """[L, 2] int64: which of the tokens of a step's prompts tell the logprob of the next one, and that one."""
    targets, offset = [], 0
    for index, (seq, start, num_tokens) in enumerate(zip(batch.seqs, batch.starts, batch.num_tokens, strict=True)):
        if batch.is_decode(index):
            continue
        if seq.wants_prompt_logprobs:
            targets += enumerate(prompt_targets(seq, start, num_tokens), offset)
        offset += num_tokens
    return np.array(targets, dtype=np.int64).reshape(-1, 2)


def take_in_logprobs(
    batch: "Batch", token_ids: list[list[int]], logprobs: Tensor | None, prompt_logprobs: Tensor | None
) -> None:
    """Gives a step's logprobs to their sequences: of the sampled token_ids, one each, by row, and of prompts.

    All rows at once, in each step: there is time for it while the device computes the next one, but not in the end.
    """
    if logprobs is not None:
        told = [
            (seq.logprobs, row)
            for seq, row, (token_id,) in zip(batch.seqs, batch.rows, token_ids, strict=False)
            if seq.logprobs is not None and seq.logprobs.num_top is not None and token_id >= 0 and not seq.is_finished
        ]
        records, rows = [record for record, _ in told], [row for _, row in told]
        entries = unpack(logprobs.numpy()[rows], [record.num_top for record in records], records)
        for record, entry in zip(records, entries, strict=True):
            record.push(entry)
    if prompt_logprobs is not None:
        packed = prompt_logprobs.numpy()
        for seq, start, num_tokens in zip(batch.seqs, batch.starts, batch.num_tokens, strict=True):
            if seq.wants_prompt_logprobs:
                num_targets = len(prompt_targets(seq, start, num_tokens))
                seq.logprobs.push_prompt(start + 1, packed[:num_targets])
                packed = packed[num_targets:]


class LogprobRecord:
    """The logprobs of one sample, and for the first sample of a request those of its prompt.

    Attributes:
        logprobs: one for each generated token, None if they were not asked for.
        cumulative: the sum of the generated tokens' own.
        prompt_logprobs: one for each token of the prompt, as far as they were computed, None if not asked for.
    """

    def __init__(
        self, num_top: int | None, num_prompt_top: int | None, prompt_len: int, tokenizer: Tokenizer | None
    ) -> None:
        """How many of the most likely tokens are wanted beside a token's own, -1 for all; None: nothing is wanted."""
        self.num_top = num_top
        self.num_prompt_top = num_prompt_top
        self.tokenizer = tokenizer
        self.logprobs: list[Logprobs] | None = None if num_top is None else []
        self.cumulative = 0.0
        self.prompt_logprobs: list[Logprobs | None] | None = None if num_prompt_top is None else [None] * prompt_len

    def push(self, entry: Logprobs) -> None:
        """Takes in what is told of a generated token, its own logprob first."""
        self.logprobs.append(entry)
        self.cumulative += next(iter(entry.values())).logprob

    def push_prompt(self, start: int, packed: np.ndarray) -> None:
        """Takes in the packed rows of the prompt's tokens from position `start` on, [T, ...]; again if preempted."""
        count = len(packed)
        self.prompt_logprobs[start : start + count] = unpack(packed, [self.num_prompt_top] * count, [self] * count)


def unpack(packed: np.ndarray, nums_top: list[int], records: list[LogprobRecord]) -> list[Logprobs]:
    """Of packed rows [T, 2 * k + 3], each token's own logprob, then as many of the best as its record wants."""
    size = packed.shape[1] // 2
    ids = packed[:, :size].tolist()
    values = np.ascontiguousarray(packed[:, size : 2 * size]).view(np.float32).tolist()
    own_ranks = packed[:, -1].tolist()
    entries = []
    for token_ids, logprobs, own_rank, num_top, record in zip(ids, values, own_ranks, nums_top, records, strict=True):
        text = record.tokenizer.token_text if record.tokenizer is not None else lambda token_id: None
        own_id, num_entries = token_ids[0], size if num_top == -1 else min(size, 1 + num_top)
        entry = {own_id: Logprob(logprobs[0], own_rank, text(own_id))}
        for rank in range(1, num_entries):
            if token_ids[rank] != own_id:
                entry[token_ids[rank]] = Logprob(logprobs[rank], rank, text(token_ids[rank]))
        entries.append(entry)
    return entries
