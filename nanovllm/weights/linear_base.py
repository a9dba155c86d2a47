"""The parameters of linear layers, each of which holds a rank's part of a checkpoint's tensors.

The `shards` of a parameter tell the loader which part that is. A layer says which rows and columns of its weight a
rank has, and a scheme gives it the parameters: `Plain` the weight itself, those of quantization/ what it is made of.
"""

import itertools
from dataclasses import replace

import torch
from torch import Tensor, nn

from nanovllm.checkpoint.loader import ScalarShard, Shard, VectorShard
from nanovllm.kernels.cpu_products import CpuWeight, for_cpu
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.weights.parts import Part, check_blocks
from nanovllm.weights.schemes import Weighted


class LinearBase(Weighted):
    """A linear layer: of one or more matrices, one behind the other, the rank has some `rows` and some `columns`."""

    weight: Tensor | QuantizedWeight | CpuWeight

    def __init__(self, rows: list[Part], columns: Part, bias: bool, tp: TensorParallel) -> None:
        """`rows` are the rank's, of each of the matrices; there may be a bias for each row."""
        super().__init__()
        self.rows = rows
        self.columns = columns
        self.tp = tp
        self.bias = tp.parameter(sum(part.size for part in rows)) if bias else None
        if bias:
            offsets = itertools.accumulate((part.size for part in rows), initial=0)
            self.bias.shards = [
                Shard((part.full_size,), 0, part.start, offset, part.size)
                for part, offset in zip(rows, offsets, strict=False)
            ]

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
