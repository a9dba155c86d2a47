"""Root-mean-square layer normalisation (arXiv 1910.07467)."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.checkpoint.loader import Shard
from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.layers.residual import Residual
from nanovllm.parallel.row_parallel import PendingSum
from nanovllm.parallel.tensor_parallel import TensorParallel


class Normalised(NamedTuple):
    """x / sqrt(mean(x^2) + eps) * weight of the rows of x [N, size], not computed yet.

    The product that reads it computes it on the way, so that no normalised copy need go through memory.
    """

    x: Tensor
    weight: Tensor
    eps: float

    def compute(self) -> Tensor:
        """The normalised rows."""
        return rms_norm(self.x, self.weight, self.eps)


class RMSNorm(nn.Module):
    """Normalises rows [N, size] with a weight [size]."""

    def __init__(self, size: int, eps: float, tp: TensorParallel) -> None:
        super().__init__()
        self.eps = eps
        self.weight = tp.parameter(size)

    def forward(self, x: Residual) -> Normalised | Tensor:
        """With several ranks, whoever receives their parts of a sum normalises what they come to at once."""
        if isinstance(x, PendingSum):
            return x.add_and_normalise(self.weight, self.eps)
        return Normalised(x, self.weight, self.eps)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the normalised rows of x, in place of the residual; of what all ranks have."""
        return rms_norm(x, self.weight, self.eps, residual)


class UnitOffsetRMSNorm(RMSNorm):
    """Checkpoints have its weight less 1 (Gemma).

    The whole of it is kept in float32: beside the 1, bfloat16 has no room for all bits of what it is added to.
    """

    def __init__(self, size: int, eps: float, tp: TensorParallel) -> None:
        super().__init__(size, eps, tp)
        self.weight = tp.parameter(size, dtype=torch.float32)
        self.weight.shards = [Shard((size,), 0, 0, 0, size, added=1.0)]


class HeadsRMSNorm(nn.Module):
    """Normalises rows of all heads, of which each rank has as many [N, size]: those of `shard`, of a projection."""

    def __init__(self, shard: Shard, eps: float, tp: TensorParallel) -> None:
        super().__init__()
        self.eps = eps
        self.tp = tp
        self.weight = tp.parameter(shard.size)
        self.weight.shards = [replace(shard, full_shape=shard.full_shape[:1], offset=0)]

    def forward(self, x: Tensor) -> Tensor:
        if self.tp.size == 1:
            return rms_norm(x, self.weight, self.eps)
        squares = self.tp.all_reduce(x.float().square().mean(-1, keepdim=True)) / self.tp.size
        return (x * (squares + self.eps).rsqrt() * self.weight).to(x.dtype)


def rows_of(x: Normalised | Tensor, start: int, end: int) -> Normalised | Tensor:
    """The rows from start to end of normalised rows, computed or not."""
    if isinstance(x, Normalised):
        return x._replace(x=x.x[start:end])
    return x[start:end]
