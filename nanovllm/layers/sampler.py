"""Sampling of the next tokens, on logits that are split by vocabulary over tensor-parallel ranks."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from nanovllm.kernels.draw import draw, unpack_token_ids
from nanovllm.kernels.sampling import filter_logits
from nanovllm.utils.tensor_parallel import TensorParallel


@dataclass(slots=True)
class SamplingInputs:
    """Sampling parameters of B rows, each [B]; `is_filtered`: some row asks for top-k, top-p or min-p."""

    temperatures: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor
    top_ks: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    is_filtered: bool


class Sampler(nn.Module):
    """This rank's logits [B, vocab / ranks] to the sampled token ids, int64 [B], the same on every rank."""

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp

    def forward(self, logits: torch.Tensor, inputs: SamplingInputs) -> torch.Tensor:
        if inputs.is_filtered:
            # Filters need whole distributions; every rank then draws alike.
            logits = self.tp.all_gather(logits)
            filter_logits(logits, inputs.temperatures, inputs.top_ks.int(), inputs.top_ps, inputs.min_ps)
            packed = draw(logits, inputs.temperatures, inputs.seeds, inputs.positions)
        else:
            # Each rank offers its best candidate.
            start = self.tp.rank * logits.size(1)
            packed = draw(logits, inputs.temperatures, inputs.seeds, inputs.positions, start)
            packed = self.tp.all_reduce(packed, dist.ReduceOp.MAX)
        return unpack_token_ids(packed)
