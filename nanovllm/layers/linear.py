"""Linear layers, which may be split over tensor-parallel ranks (Megatron-LM, arXiv 1909.08053).

What comes before a product (a norm) or behind it (an activation, the residual) is handed to the kernel along with it.
The `shards` of a parameter tell the loader which part of a checkpoint's tensors it holds. Nothing here knows which
model a layer belongs to, nor how ranks add up their parts.
"""

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from nanovllm.checkpoint.loader import Shard
from nanovllm.kernels.linear import linear
from nanovllm.layers.layernorm import Normalised
from nanovllm.layers.residual import Residual
from nanovllm.parallel.row_parallel import linear_and_sum
from nanovllm.parallel.tensor_parallel import TensorParallel


def apply_linear(x: Normalised | Tensor, weight: Tensor, bias: Tensor | None = None, gated: bool = False) -> Tensor:
    """x W^T + bias, with what is yet to be computed of x fused in; gated: silu of its first half times its second."""
    if isinstance(x, Normalised):
        return linear(x.x, weight, bias, norm=x.weight, eps=x.eps, gated=gated)
    return linear(x, weight, bias, gated=gated)


class Part(NamedTuple):
    """A rank's rows [start, start + size) of a weight that has full_size of them."""

    full_size: int
    start: int
    size: int


def part_of(full_size: int, tp: TensorParallel) -> Part:
    """The rank's part of a weight's rows or columns; where they do not divide, the last rank has fewer."""
    size = -(-full_size // tp.size)
    start = min(tp.rank * size, full_size)
    return Part(full_size, start, min(size, full_size - start))


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the output features split over the ranks: x is [N, in], y is [N, features of the parts]."""

    def __init__(self, input_size: int, parts: list[Part], bias: bool, tp: TensorParallel) -> None:
        """`parts` are the rank's, of each of the weights that make up this one."""
        super().__init__()
        num_features = sum(part.size for part in parts)
        self.weight = tp.parameter(num_features, input_size)
        self.bias = tp.parameter(num_features) if bias else None
        self.weight.shards, offset = [], 0
        for part in parts:
            self.weight.shards.append(Shard((part.full_size, input_size), 0, part.start, offset, part.size))
            offset += part.size
        if bias:
            self.bias.shards = [replace(shard, full_shape=shard.full_shape[:1]) for shard in self.weight.shards]

    def forward(self, x: Normalised | Tensor) -> Tensor:
        return apply_linear(x, self.weight, self.bias)


class QKVParallelLinear(ColumnParallelLinear):
    """The query, key and value projections in one product: [N, hidden] -> [N, q heads | k heads | v heads].

    Where there are fewer KV heads than ranks, several ranks have the same one.
    """

    def __init__(
        self, hidden_size: int, head_dim: int, num_heads: int, num_kv_heads: int, bias: bool, tp: TensorParallel
    ) -> None:
        num_local = max(num_kv_heads // tp.size, 1)
        first = tp.rank * num_kv_heads // tp.size
        kv_part = Part(num_kv_heads * head_dim, first * head_dim, num_local * head_dim)
        super().__init__(hidden_size, [part_of(num_heads * head_dim, tp), kv_part, kv_part], bias, tp)


class GateUp(NamedTuple):
    """x W^T + b, [N, gates | ups], not computed yet: the activation that reads it is fused in."""

    x: Normalised | Tensor
    weight: Tensor
    bias: Tensor | None


class MergedColumnParallelLinear(ColumnParallelLinear):
    """The MLP's gate and up projections in one product: [N, hidden] -> [N, 2 * the rank's share]."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__(hidden_size, [part_of(intermediate_size, tp)] * 2, bias, tp)

    def forward(self, x: Normalised | Tensor) -> GateUp:
        return GateUp(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """residual + x W^T + b with the input features split over the ranks: x [N, in / ranks], residual [N, out].

    The residual is changed in place, and given back. Without one, the product is.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        _, start, size = part_of(input_size, tp)
        self.weight = tp.parameter(output_size, size)
        self.weight.shards = [Shard((output_size, input_size), 1, start, 0, size)]
        self.bias = tp.parameter(output_size) if bias else None

    def forward(self, x: Tensor, residual: Residual | None = None) -> Residual:
        if residual is None:
            own_bias = self.bias if self.tp.rank == 0 else None
            return self.tp.all_reduce(linear(x, self.weight, own_bias))
        if self.tp.size > 1:
            return linear_and_sum(x, self.weight, self.bias, residual, self.tp)
        return linear(x, self.weight, self.bias, residual=residual)
