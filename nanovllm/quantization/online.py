"""Plain checkpoints that are rounded while they are loaded, by the option `quantization`; to 4 bits: int4.py.

A matrix is rounded row by row, tensor by tensor, so that no more than one of them is there in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from nanovllm.checkpoint.loader import Shard
from nanovllm.kernels.e4m3 import E4M3
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.kernels.round_rows import round_rows_torch
from nanovllm.quantization.fp8 import DUMMY_SCALE
from nanovllm.quantization.groups import DUMMY_SCALES, FilledGroups, take
from nanovllm.quantization.int4 import ROUNDED_INT4

if TYPE_CHECKING:
    from nanovllm.experts.layers import Experts
    from nanovllm.weights.linear_base import LinearBase


@dataclass(frozen=True)
class RoundingShard(Shard):
    """Rows of a plain matrix that are rounded to the parameter's dtype when they are copied; their `scales`."""

    is_copied: ClassVar[bool] = False

    scales: Tensor | None = None

    def copy(self, source: Any, parameter: nn.Parameter) -> None:
        """Of columns, too, the scales are those of whole rows, so that the number of ranks changes no result."""
        if self.expert is not None:
            self._copy(source, (), parameter.data[self.expert], self.scales[self.expert])
        elif parameter.dim() == 3:  # one tensor has all experts, which are read one by one
            for expert, (codes, scales) in enumerate(zip(parameter.data, self.scales, strict=True)):
                self._copy(source, (expert,), codes, scales)
        else:
            self._copy(source, (), parameter.data, self.scales)

    def _copy(self, source: Any, expert: tuple[int, ...], codes: Tensor, scales: Tensor) -> None:
        """Fills a part of codes [N, K] and scales [N, 1]; expert: the index of the matrix in the tensor."""
        own = slice(self.start, self.start + self.size)
        are_rows = self.dim == len(self.full_shape) - 2
        numbers = source[(*expert, own if are_rows else slice(None))]
        if are_rows:
            codes, scales = (place.narrow(0, self.offset, self.size) for place in (codes, scales))
        whole_codes, whole_scales = round_rows_torch(numbers.to(codes.device), codes.dtype, group=numbers.size(1))
        codes.copy_(whole_codes if are_rows else whole_codes[:, own])
        scales.copy_(whole_scales.t())


def add_scales(parameter: nn.Parameter, dummy: float) -> Tensor:
    """Scales for the rows of a parameter's codes, float32 [..., N, 1], which is filled by rounding from now on."""
    scales = torch.full((*parameter.shape[:-1], 1), dummy, device=parameter.device)
    parameter.shards = [RoundingShard(**vars(shard), scales=scales) for shard in parameter.shards]
    return scales


@dataclass(frozen=True)
class RoundedFp8:
    """e4m3 with a scale for each row."""

    def create(self, layer: LinearBase) -> None:
        layer.scales = add_scales(layer.add_parameter("weight", E4M3), DUMMY_SCALE)

    def finish(self, layer: LinearBase) -> None:
        codes, scales = take(layer, "weight"), layer.scales
        del layer.scales
        layer.weight = QuantizedWeight(codes, scales, (1, layer.columns.size), rounds_input=True)

    def create_experts(self, layer: Experts) -> None:
        layer.scales = [add_scales(parameter, DUMMY_SCALE) for parameter in layer.add_parameters("", E4M3)]

    def finish_experts(self, layer: Experts) -> None:
        gate_up, down = take(layer, "gate_up_proj"), take(layer, "down_proj")
        gate_up_scales, down_scales = layer.scales
        del layer.scales
        layer.gate_up_proj = QuantizedWeight(gate_up, gate_up_scales, (1, gate_up.size(2)), rounds_input=True)
        layer.down_proj = QuantizedWeight(down, down_scales, (1, down.size(2)), rounds_input=True)


@dataclass(frozen=True)
class RoundedInt8:
    """int8 with a scale for each row; what it is multiplied by is not rounded."""

    def create(self, layer: LinearBase) -> None:
        layer.scales = add_scales(layer.add_parameter("weight", torch.int8), DUMMY_SCALES[8])

    def finish(self, layer: LinearBase) -> None:
        codes, scales = take(layer, "weight"), layer.scales
        del layer.scales
        layer.weight = QuantizedWeight(codes, scales, (1, layer.columns.size))


class Online:
    """`quantization=...` of a plain checkpoint: all layers but the head."""

    def __init__(self, scheme: RoundedFp8 | RoundedInt8 | FilledGroups) -> None:
        self.scheme = scheme

    def scheme_of(self, names: list[str]) -> RoundedFp8 | RoundedInt8 | FilledGroups:
        """As `Method.scheme_of`."""
        return self.scheme


ONLINE_METHODS = {"fp8": Online(RoundedFp8()), "int8": Online(RoundedInt8()), "int4": Online(ROUNDED_INT4)}
