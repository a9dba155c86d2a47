"""Draws the next tokens: one pass over the logits, with noise that depends only on a request's seed and position.

The Gumbel-max trick: argmax(logits / temperature + g) with independent Gumbel noise g is a draw from
softmax(logits / temperature) (Gumbel 1954; arXiv 1411.0030). The noise is a hash of (seed, position, token id), so
that a request draws the same tokens whatever it is batched with and however the vocabulary is split over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from nanovllm.kernels.sampling import filter_logits
from nanovllm.utils.tensor_parallel import TensorParallel

MASK = 0xFFFFFFFF
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1


def hash32(x: torch.Tensor) -> torch.Tensor:
    """Mixes 32-bit numbers held in int64 (the constants of C. Wellons' "lowbias32")."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32 [B, V], of int64 seeds [B], positions [B] and token ids [V]."""
    keys = hash32(hash32(seeds & MASK) ^ ((seeds >> 32) & MASK))
    keys = hash32(keys ^ hash32(positions))
    bits = hash32((token_ids + keys[:, None]) & MASK)
    # The winner has a small exponential: from a uniform near 0, where float32 is fine, and not from one near 1.
    uniform = ((bits.float() + 0.5) * 2**-32).clamp(max=BELOW_ONE)
    return -torch.log(-torch.log1p(-uniform))


def draw(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best noisy score, float32 [B], and its token id, int64 [B], among logits [B, V] of the ids from `start` on.

    Rows of temperature 0 are greedy: no noise.
    """
    token_ids = torch.arange(start, start + logits.size(1), device=logits.device)
    greedy = (temperatures == 0)[:, None]
    noise = gumbel_noise(seeds, positions, token_ids)
    scores = torch.where(greedy, logits.float(), logits.float() / temperatures[:, None] + noise)
    best, index = scores.max(dim=-1)
    return best, index + start


@dataclass(slots=True)
class SamplingInputs:
    """Sampling parameters of B rows, each [B]; `is_filtered`: some row asks for top-k, top-p or min-p."""

    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    is_filtered: bool


class Sampler(nn.Module):
    """This rank's logits [B, vocab / ranks] to the sampled token ids, int64 [B], the same on every rank."""

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.draw = torch.compile(draw, dynamic=True) if tp.device.type == "cuda" else draw

    def forward(self, logits: torch.Tensor, inputs: SamplingInputs) -> torch.Tensor:
        start = self.tp.rank * logits.size(1)
        if inputs.is_filtered:
            # Filters need whole distributions; every rank then draws alike.
            logits, start = self.tp.all_gather(logits), 0
            filter_logits(logits, inputs.temperatures, inputs.top_ks, inputs.top_ps, inputs.min_ps)
        if logits.is_cpu and not inputs.temperatures.any():
            best, token_ids = logits.float().max(dim=-1)
            token_ids += start
        else:
            best, token_ids = self.draw(logits, inputs.temperatures, inputs.seeds, inputs.positions, start)
        if self.tp.size == 1 or inputs.is_filtered:
            return token_ids
        return self._best_of_ranks(best, token_ids)

    def _best_of_ranks(self, best: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """One maximum over (score, lowest id), packed into an int64 that orders as they do."""
        order = best.view(torch.int32).long()
        order = torch.where(order < 0, order ^ 0x7FFFFFFF, order)
        packed = self.tp.all_reduce((order << 32) | (MASK - token_ids), dist.ReduceOp.MAX)
        return MASK - (packed & MASK)
