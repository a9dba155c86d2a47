"""Logprobs on the host: what a step brought of them, as a request's result holds them.

A row of them comes packed, int32 [2 * k + 3], so that one copy takes all from the device: the ids of the token itself
and of the k most likely ones, the logprobs' bits, and the token's rank.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels.logprobs import top_logprobs
from nanovllm.outputs import Logprob, Logprobs
from nanovllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanovllm.engine.scheduler import Batch

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


def take_in_logprobs(batch: "Batch", logprobs: Tensor | None, prompt_logprobs: Tensor | None) -> None:
    """Gives a step's logprobs to their sequences: those of the sampled tokens, by row, and those of prompts."""
    if logprobs is not None:
        packed = logprobs.numpy().copy()  # later steps write there again
        for seq, row in zip(batch.seqs[: batch.num_samples], batch.rows, strict=False):
            if seq.logprobs is not None and not seq.is_finished:
                seq.logprobs.push(packed[row])
    if prompt_logprobs is not None:
        packed = prompt_logprobs.numpy()
        for seq, start, num_tokens in zip(batch.seqs, batch.starts, batch.num_tokens, strict=True):
            if seq.wants_prompt_logprobs:
                num_targets = len(seq.prompt_targets(start, num_tokens))
                seq.logprobs.push_prompt(start + 1, packed[:num_targets])
                packed = packed[num_targets:]


class LogprobRecord:
    """The logprobs of one sample, and for the first sample of a request those of its prompt.

    Rows stay packed until somebody wants to see them: a step has no time to make objects of them.

    Attributes:
        prompt_logprobs: one for each token of the prompt, as far as they were computed, None if not asked for.
        cumulative: the sum of the own ones of the generated tokens that `logprobs` has given.
    """

    def __init__(
        self, num_top: int | None, num_prompt_top: int | None, prompt_len: int, tokenizer: Tokenizer | None
    ) -> None:
        """How many of the most likely tokens are wanted beside a token's own, -1 for all; None: nothing is wanted."""
        self.num_top = num_top
        self.num_prompt_top = num_prompt_top
        self.tokenizer = tokenizer
        self.prompt_logprobs: list[Logprobs | None] | None = None if num_prompt_top is None else [None] * prompt_len
        self.cumulative = 0.0
        self._packed: list[np.ndarray] = []
        self._unpacked: list[Logprobs] = []

    def push(self, packed: np.ndarray) -> None:
        """Takes in the packed row of a generated token."""
        self._packed.append(packed)

    def push_prompt(self, start: int, packed: np.ndarray) -> None:
        """Takes in the packed rows of the prompt's tokens from position `start` on, [T, ...]; again if preempted."""
        self.prompt_logprobs[start : start + len(packed)] = self._unpack(packed, self.num_prompt_top)

    @property
    def logprobs(self) -> list[Logprobs] | None:
        """Those of each generated token, None if they were not asked for."""
        if self.num_top is None:
            return None
        for packed in split_by_size(self._packed):
            entries = self._unpack(np.stack(packed), self.num_top)
            self.cumulative += sum(next(iter(entry.values())).logprob for entry in entries)
            self._unpacked += entries
        self._packed.clear()
        return self._unpacked

    def _unpack(self, packed: np.ndarray, num_top: int) -> list[Logprobs]:
        """Of each of some tokens, its own logprob, then the best."""
        size = packed.shape[1] // 2
        num_entries = size if num_top == -1 else min(size, 1 + num_top)
        ids = packed[:, :num_entries].tolist()
        values = packed[:, size : size + num_entries].copy().view(np.float32).tolist()
        own_ranks = packed[:, -1].tolist()
        text = self.tokenizer.token_text if self.tokenizer is not None else lambda token_id: None
        entries = []
        for (own_id, *best_ids), (own_value, *best_values), own_rank in zip(ids, values, own_ranks, strict=True):
            entry = {own_id: Logprob(own_value, own_rank, text(own_id))}
            for rank, (token_id, value) in enumerate(zip(best_ids, best_values, strict=True), 1):
                if token_id != own_id:
                    entry[token_id] = Logprob(value, rank, text(token_id))
            entries.append(entry)
        return entries


def split_by_size(rows: list[np.ndarray]) -> list[list[np.ndarray]]:
    """The rows in their order, those of one size together: steps tell as many logprobs as anyone asked for."""
    return [list(group) for _, group in groupby(rows, key=len)]
