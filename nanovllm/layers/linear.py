"""Linear layers, which may be split over tensor-parallel ranks (Megatron-LM, arXiv 1909.08053).

What comes before a product (a norm) or behind it (an activation, the residual) is handed to the kernel along with it.
A layer says which rows and columns of its weight a rank has; how that is stored and loaded, weights/ knows. Nothing
here knows which model a layer belongs to, nor how ranks add up their parts.
"""

from typing import NamedTuple

from torch import Tensor

from nanovllm.kernels.activation import Gate
from nanovllm.kernels.linear import linear
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.layers.layernorm import Normalised
from nanovllm.layers.residual import Residual
from nanovllm.parallel.row_parallel import linear_and_sum
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.weights.linear_base import LinearBase
from nanovllm.weights.parts import Part, part_of


def apply_linear(
    x: Normalised | Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None, gate: Gate | None = None
) -> Tensor:
    """x W^T + bias, with what is yet to be computed of x fused in; gate: of its first half, times its second."""
    if isinstance(x, Normalised):
        return linear(x.x, weight, bias, norm=x.weight, eps=x.eps, gate=gate)
    return linear(x, weight, bias, gate=gate)


class ColumnParallelLinear(LinearBase):
    """y = x W^T + b with the output features split over the ranks: x is [N, in], y is [N, features of the parts]."""

    def __init__(self, input_size: int, parts: list[Part], bias: bool, tp: TensorParallel) -> None:
        """`parts` are the rank's, of each of the weights that make up this one."""
        super().__init__(parts, Part(input_size, 0, input_size), bias, tp)

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
    weight: Tensor | QuantizedWeight
    bias: Tensor | None


class MergedColumnParallelLinear(ColumnParallelLinear):
    """The MLP's gate and up projections in one product: [N, hidden] -> [N, 2 * the rank's share]."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__(hidden_size, [part_of(intermediate_size, tp)] * 2, bias, tp)

    def forward(self, x: Normalised | Tensor) -> GateUp:
        return GateUp(x, self.weight, self.bias)


class RowParallelLinear(LinearBase):
    """residual + x W^T + b with the input features split over the ranks: x [N, in / ranks], residual [N, out].

    The residual is changed in place, and given back. Without one, the product alone is, summed over the ranks.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__([Part(output_size, 0, output_size)], part_of(input_size, tp), bias, tp)

    def forward(self, x: Tensor, residual: Residual | None = None) -> Residual:
        if self.tp.size == 1:
            return linear(x, self.weight, self.bias, residual=residual)
        return linear_and_sum(x, self.weight, self.bias, residual, self.tp)
