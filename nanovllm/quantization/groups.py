"""Integers of 4 or 8 bits in int32 words, with a scale for each group of a row's columns: what several formats share.

AWQ (arXiv 2306.00978), GPTQ (arXiv 2210.17323) and compressed-tensors lay them out differently. What the layouts have
in common is here: which tensors there are of a layer, how words become codes, and codes a `QuantizedWeight`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from nanovllm.checkpoint.loader import Shard
from nanovllm.kernels.quantized_weight import INT4_RUN, QuantizedWeight, pack_int4

if TYPE_CHECKING:
    from nanovllm.weights.linear_base import LinearBase

WORD_BITS = 32
GROUP_SIZES = (32, 64, 128, -1)  # -1: all columns
DUMMY_SCALES = {4: 0.02 / 4.6, 8: 0.02 / 73.9}  # by bits: what makes random codes numbers with a std of 0.02


@dataclass(frozen=True)
class Groups:
    """Codes of some bits; `group_size` columns of a row have a scale, and perhaps a zero, -1: all of a row."""

    bits: int
    group_size: int

    @property
    def codes_per_word(self) -> int:
        """Codes of an int32."""
        return WORD_BITS // self.bits

    @property
    def middle(self) -> int:
        """The unsigned code that is 0 where there are no zeros."""
        return 1 << (self.bits - 1)

    def group_of(self, layer: LinearBase) -> int:
        """Columns of a group."""
        return layer.columns.full_size if self.group_size == -1 else self.group_size

    def check_sizes(self, layer: LinearBase, are_rows_packed: bool) -> None:
        """Raises ValueError where a layer is not of whole words and groups, or a rank has a part that kernels lack."""
        columns, group = layer.columns, self.group_of(layer)
        if columns.full_size % group:
            raise ValueError(f"{columns.full_size} columns are not of whole groups of {group}")
        multiple = 2 * INT4_RUN if self.bits == 4 else self.codes_per_word
        if columns.size % multiple:
            raise ValueError(
                f"{self.bits} bits need a multiple of {multiple} columns on each rank, not {columns.size} of "
                f"{columns.full_size} (tensor_parallel_size={layer.tp.size})"
            )
        for part in layer.rows if are_rows_packed else []:
            if part.full_size % self.codes_per_word:
                raise ValueError(f"{part.full_size} rows are not of whole words of {self.codes_per_word}")

    def add_scales(self, layer: LinearBase, name: str, is_transposed: bool = False) -> None:
        """Adds a float32 parameter, which holds what any checkpoint may have."""
        scales = layer.add_parameter(name, torch.float32, (1, self.group_of(layer)), is_transposed)
        scales.dummy = DUMMY_SCALES[self.bits]

    def add_zeros(self, layer: LinearBase, name: str, is_transposed: bool = False, stored_less: int = 0) -> None:
        """Adds the words of zeros, which are packed along the rows; dummies are in the middle, less `stored_less`."""
        zeros = layer.add_parameter(name, torch.int32, (self.codes_per_word, self.group_of(layer)), is_transposed)
        code = self.middle - stored_less
        byte = code | code << 4 if self.bits == 4 else code
        zeros.dummy = int.from_bytes(bytes([byte] * 4), "little", signed=True)

    def add_groups(self, layer: LinearBase, name: str) -> None:
        """Adds the group that each column belongs to, int32 of each matrix."""
        parameter = layer.add_vectors(name, torch.int32)
        parameter.dummy = self._in_order(layer).repeat(len(layer.rows))

    def order_of(self, layer: LinearBase, name: str) -> Tensor | None:
        """int64 [K]: columns such that those of a group are neighbours; None: they are.

        Raises:
            ValueError: `name` has groups that there are not, other ones for one matrix than for another, or groups of
                other sizes; or columns were sorted before they were split over ranks.
        """
        columns, group = layer.columns, self.group_of(layer)
        of_matrices = getattr(layer, name).data.view(len(layer.rows), columns.size)
        num_groups = columns.full_size // group
        if columns.size == 0:
            return None
        low, high = int(of_matrices.min()), int(of_matrices.max())
        if low < 0 or high >= num_groups:
            raise ValueError(f"{name} has groups from {low} to {high}, there are {num_groups} of {group} columns")
        groups, in_order = of_matrices[0], self._in_order(layer)
        if (of_matrices == in_order).all():
            return None
        if not (of_matrices == groups).all():
            raise ValueError(f"{name} differs between matrices that are multiplied as one")
        if columns.size < columns.full_size:
            raise ValueError(
                f"{name} sorts the {columns.full_size} columns, so that tensor_parallel_size={layer.tp.size} ranks "
                f"with {columns.size} of them each would cut groups of {group}"
            )
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], in_order):
            sizes = torch.bincount(groups, minlength=num_groups)
            raise ValueError(f"{name} has groups of {int(sizes.min())} to {int(sizes.max())} columns, not of {group}")
        return order

    def weight_of(
        self, layer: LinearBase, codes: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None = None
    ) -> QuantizedWeight:
        """codes, unsigned uint8 [N, K]; scales float32 [N, groups]; zeros uint8 like scales, None: in the middle."""
        if zeros is not None and bool((zeros == self.middle).all()):
            zeros = None
        if order is not None:
            codes = codes.index_select(1, order)
        if self.bits == 4:
            codes = pack_int4(codes)
        else:
            codes, zeros = _signed(codes), zeros if zeros is None else _signed(zeros)
        block = 1, min(self.group_of(layer), layer.columns.size)
        return QuantizedWeight(codes, half_if_exact(scales), block, zeros, order)

    def _in_order(self, layer: LinearBase) -> Tensor:
        """The groups of a rank's columns, where those of a group are neighbours: int32 [K]."""
        columns = layer.columns
        of_all = torch.arange(columns.start, columns.start + columns.size, device=layer.tp.device)
        return (of_all // self.group_of(layer)).int()


@dataclass(frozen=True)
class GroupsShard(Shard):
    """Groups of a tensor, by which columns are counted: `fill` makes codes of it, `scales` and `zeros`."""

    is_copied: ClassVar[bool] = False

    fill: Callable[[Any, slice, slice, Tensor, Tensor, Tensor], None] | None = None
    scales: Tensor | None = None
    zeros: Tensor | None = None

    def copy(self, source: Any, parameter: nn.Parameter) -> None:
        own, places = slice(self.start, self.start + self.size), (parameter.data, self.scales, self.zeros)
        if self.dim == 0:
            places = [place.narrow(0, self.offset, self.size) for place in places]
            self.fill(source, own, slice(0, self.scales.size(1)), *places)
        else:
            self.fill(source, slice(0, self.full_shape[0]), own, *places)


@dataclass(frozen=True)
class FilledGroups(Groups):
    """Codes of 4 bits whose scales and zeros are no tensors of a checkpoint, but are made of one with the codes.

    `fill` is given the tensor, which rows and groups of it are wanted, and where packed codes, uint8 [N, K / 2], and
    float32 scales and zeros, [N, groups], are to be.
    """

    fill: Callable[[Any, slice, slice, Tensor, Tensor, Tensor], None] = field(repr=False)

    def create(self, layer: LinearBase) -> None:
        self.check_sizes(layer, are_rows_packed=False)
        codes = layer.add_parameter("weight", torch.uint8, (1, 2))
        shards = layer.add_parameter("scales", torch.float32, (1, self.group_size)).shards
        # Neither is a parameter: the tensor that fills the codes fills them too; of dummies they stay as they are.
        layer.scales = take(layer, "scales").fill_(DUMMY_SCALES[4])
        layer.zeros = torch.full_like(layer.scales, self.middle)
        own = {"fill": self.fill, "scales": layer.scales, "zeros": layer.zeros}
        shards = [replace(shard, full_shape=(shard.full_shape[0], layer.columns.full_size)) for shard in shards]
        codes.shards = [GroupsShard(**vars(shard), **own) for shard in shards]

    def finish(self, layer: LinearBase) -> None:
        codes, scales, zeros = take(layer, "weight"), layer.scales, layer.zeros
        del layer.scales, layer.zeros
        layer.weight = QuantizedWeight(codes, half_if_exact(scales), (1, self.group_size), zeros)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., W] -> uint8 [..., W * 32 / bits], the lowest bits of each word first."""
    codes = words.contiguous().view(torch.uint8)
    return codes if bits == 8 else torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def take(layer: nn.Module, name: str) -> Tensor:
    """The data of a parameter, which the layer no longer has."""
    data = getattr(layer, name).data
    delattr(layer, name)
    return data


def half_if_exact(scales: Tensor) -> Tensor:
    """Scales as float16 if that changes none of them: contiguous, with half the bytes to read."""
    half = scales.half()
    return (half if torch.equal(half.float(), scales) else scales).contiguous()


def _signed(codes: Tensor) -> Tensor:
    """Unsigned codes of 8 bits, less 128: int8."""
    return (codes ^ 128).view(torch.int8)
