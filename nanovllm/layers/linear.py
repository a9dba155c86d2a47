"""Linear layers, which may be split over tensor-parallel ranks (Megatron-LM, arXiv 1909.08053).

What comes before a product (a norm) or behind it (an activation, the residual) is handed to the kernel along with it.
The `shards` of a parameter tell the loader which part of a checkpoint's tensors it holds. A layer says which rows and
columns of its weight a rank has, and a scheme gives it the parameters: `Plain` the weight itself, those of
quantization/ what it is made of. Nothing here knows which model a layer belongs to, nor how ranks add up their parts.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nanovllm.checkpoint.loader import ScalarShard, Shard, VectorShard
from nanovllm.kernels.activation import Gate
from nanovllm.kernels.cpu_products import CpuWeight, for_cpu
from nanovllm.kernels.linear import linear
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.layers.layernorm import Normalised
from nanovllm.layers.residual import Residual
from nanovllm.parallel.row_parallel import linear_and_sum, linear_sum
from nanovllm.parallel.tensor_parallel import TensorParallel


def apply_linear(
    x: Normalised | Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None, gate: Gate | None = None
) -> Tensor:
    """x W^T + bias, with what is yet to be computed of x fused in; gate: of its first half, times its second."""
    if isinstance(x, Normalised):
        return linear(x.x, weight, bias, norm=x.weight, eps=x.eps, gate=gate)
    return linear(x, weight, bias, gate=gate)


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


def check_blocks(name: str, part: Part, size: int, tp: TensorParallel) -> None:
    """Raises ValueError if the rank's part of a weight cuts a block of so many rows or columns."""
    end = part.start + part.size
    if part.start % size or (end % size and end != part.full_size):
        raise ValueError(
            f"tensor_parallel_size={tp.size} would cut a block of {size}: a rank's part of {name} begins "
            f"at {part.start} and ends at {end} of {part.full_size}"
        )


class Weighted(nn.Module):
    """A layer whose weights a scheme makes, once it is known which; see `create_weights`."""

    scheme: "Scheme"

    def create_weights(self) -> None:
        """Adds the scheme's parameters, which the loader fills; they have the names and shapes of a checkpoint's."""
        raise NotImplementedError

    def finish_weights(self) -> None:
        """Brings the filled parameters to the form that the kernels take."""
        raise NotImplementedError


class LinearBase(Weighted):
    """A linear layer: of one or more matrices, one behind the other, the rank has some `rows` and some `columns`."""

    weight: Tensor | QuantizedWeight | CpuWeight

    def __init__(self, rows: list[Part], columns: Part, tp: TensorParallel) -> None:
        super().__init__()
        self.rows = rows
        self.columns = columns
        self.tp = tp

    def create_weights(self) -> None:
        self.scheme.create(self)

    def finish_weights(self) -> None:
        self.scheme.finish(self)
        if self.tp.device.type == "cpu" and isinstance(self.weight, QuantizedWeight):
            self.weight = for_cpu(self.weight, self.tp.dtype)

    def add_parameter(
        self, name: str, dtype: torch.dtype, block: tuple[int, int] = (1, 1), is_transposed: bool = False
    ) -> nn.Parameter:
        """A parameter with an element for each block of the weight's rows and columns.

        A block of all columns belongs to every rank as a whole.
        is_transposed: the checkpoint's tensors have the columns first, and so does the parameter.

        Raises:
            ValueError: a block would be cut by the ranks, or by where one matrix ends and the next begins.
        """
        height, width = block
        full_width = self.columns.full_size
        columns = self.columns if width < full_width else Part(full_width, 0, full_width)
        for part, size in [*((part, height) for part in self.rows), (columns, width)]:
            check_blocks(name, part, size, self.tp)
        full_width, width_size = -(-full_width // width), -(-columns.size // width)
        shards, offset = [], 0
        for part in self.rows:
            full_shape, size = (-(-part.full_size // height), full_width), -(-part.size // height)
            if columns.size < columns.full_size:
                shards.append(Shard(full_shape, 1, columns.start // width, 0, width_size))
            else:
                shards.append(Shard(full_shape, 0, part.start // height, offset, size))
            offset += size
        shape = offset, width_size
        if is_transposed:
            shape = shape[::-1]
            shards = [replace(shard, full_shape=shard.full_shape[::-1], dim=1 - shard.dim) for shard in shards]
        return self._add(name, self.tp.parameter(*shape, dtype=dtype), shards)

    def _add(self, name: str, parameter: nn.Parameter, shards: list[Shard]) -> nn.Parameter:
        parameter.shards = shards
        setattr(self, name, parameter)
        return parameter

    def add_scalars(self, name: str) -> nn.Parameter:
        """A float32 parameter with a number for each of the matrices, [matrices]; a checkpoint has them one by one."""
        shards = [ScalarShard((), 0, 0, index, 1) for index in range(len(self.rows))]
        return self._add(name, self.tp.parameter(len(self.rows), dtype=torch.float32), shards)

    def add_vectors(self, name: str, dtype: torch.dtype, size: int | None = None) -> nn.Parameter:
        """A parameter with a vector for each of the matrices, [matrices * size]; None: an element for each column.

        A checkpoint has them one by one; that of several matrices which are one there belongs to each of them.
        """
        part = self.columns if size is None else Part(size, 0, size)
        shards = [
            VectorShard((part.full_size,), 0, part.start, index * part.size, part.size)
            for index in range(len(self.rows))
        ]
        return self._add(name, self.tp.parameter(len(self.rows) * part.size, dtype=dtype), shards)


class Scheme(Protocol):
    """How a layer's weight is stored: a checkpoint's tensors, and what kernels make of them.

    Those by which experts can be stored have `create_experts` and `finish_experts` too, see experts/layers.py.
    """

    def create(self, layer: LinearBase) -> None:
        """Gives the layer parameters, which have the names and shapes of a checkpoint's tensors."""

    def finish(self, layer: LinearBase) -> None:
        """Makes the layer's `weight` of the filled parameters."""


class Plain:
    """The weight itself, in the model's dtype."""

    def create(self, layer: LinearBase) -> None:
        layer.add_parameter("weight", layer.tp.dtype)

    def finish(self, layer: LinearBase) -> None:
        """There is nothing to do."""


def create_weights(model: nn.Module, scheme_of: Callable[[str], Scheme | None]) -> None:
    """Gives the layers of a model the parameters of their schemes, by their names; None: they are plain."""
    for name, layer in model.named_modules():
        if isinstance(layer, Weighted):
            layer.scheme = scheme_of(name) or Plain()
            with _named(name):
                layer.create_weights()


def finish_weights(model: nn.Module) -> None:
    """Brings all loaded weights to the form that the kernels take."""
    for name, layer in model.named_modules():
        if isinstance(layer, Weighted):
            with _named(name):
                layer.finish_weights()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts the name of a layer, which schemes do not know, before what a ValueError says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


class ColumnParallelLinear(LinearBase):
    """y = x W^T + b with the output features split over the ranks: x is [N, in], y is [N, features of the parts]."""

    def __init__(self, input_size: int, parts: list[Part], bias: bool, tp: TensorParallel) -> None:
        """`parts` are the rank's, of each of the weights that make up this one."""
        super().__init__(parts, Part(input_size, 0, input_size), tp)
        self.bias = tp.parameter(sum(part.size for part in parts)) if bias else None
        if bias:
            offsets = itertools.accumulate((part.size for part in parts), initial=0)
            self.bias.shards = [
                Shard((part.full_size,), 0, part.start, offset, part.size)
                for part, offset in zip(parts, offsets, strict=False)
            ]

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
        super().__init__([Part(output_size, 0, output_size)], part_of(input_size, tp), tp)
        self.bias = tp.parameter(output_size) if bias else None

    def forward(self, x: Tensor, residual: Residual | None = None) -> Residual:
        if self.tp.size == 1:
            return linear(x, self.weight, self.bias, residual=residual)
        if residual is None:
            return linear_sum(x, self.weight, self.bias, self.tp)
        return linear_and_sum(x, self.weight, self.bias, residual, self.tp)
