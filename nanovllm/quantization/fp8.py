"""8-bit floating point, e4m3 (arXiv 2209.05433): checkpoints that have it.

Qwen's and DeepSeek's (arXiv 2412.19437, section 3.3) have a scale for each block of 128 x 128 weights, others one for
each row or for the whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanovllm.checkpoint.facts import JsonFacts
from nanovllm.checkpoint.loader import DUMMY_STD
from nanovllm.kernels.e4m3 import E4M3
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.quantization.groups import DUMMY_SCALES, take
from nanovllm.quantization.names import is_listed, names_of

if TYPE_CHECKING:
    from nanovllm.experts.layers import Experts
    from nanovllm.weights.linear_base import LinearBase

DUMMY_SCALE = 0.02 / DUMMY_STD


@dataclass(frozen=True)
class Fp8Blocks:
    """A float32 scale for each block of weights."""

    block: tuple[int, int]
    scale_name: str = "weight_scale_inv"
    rounds_input: bool = True

    def create(self, layer: LinearBase) -> None:
        layer.add_parameter("weight", E4M3)
        layer.add_parameter(self.scale_name, torch.float32, self.block).dummy = DUMMY_SCALE

    def finish(self, layer: LinearBase) -> None:
        codes, scales = take(layer, "weight"), take(layer, self.scale_name)
        scales, block = join_scales(scales, [part.size for part in layer.rows], self.block)
        layer.weight = QuantizedWeight(codes, scales, block, rounds_input=self.rounds_input)

    def create_experts(self, layer: Experts) -> None:
        """Raises ValueError unless inputs are rounded, as many of them always are."""
        if not self.rounds_input:
            raise ValueError(f"experts that are quantised by {self} are not supported, only with rounds_input=True")
        add_experts(layer, self.scale_name, self.block)

    def finish_experts(self, layer: Experts) -> None:
        gate_up, gate_up_scales, down, down_scales = take_experts(layer, self.scale_name)
        scales, block = join_scales(gate_up_scales, [gate_up.size(1) // 2] * 2, self.block)
        layer.gate_up_proj = QuantizedWeight(gate_up, scales, block, rounds_input=True)
        layer.down_proj = QuantizedWeight(down, down_scales, self.block, rounds_input=True)


def add_experts(layer: Experts, scale_name: str, block: tuple[int, int]) -> None:
    """Gives experts parameters for codes, and for scales that a checkpoint calls `scale_name`."""
    layer.add_parameters("", E4M3)
    for parameter in layer.add_parameters(scale_name.removeprefix("weight"), torch.float32, block):
        parameter.dummy = DUMMY_SCALE


def take_experts(layer: Experts, scale_name: str) -> list[Tensor]:
    """Codes and scales of gates and ups, codes and scales of downs, which the layer no longer has."""
    names = ("gate_up_proj", "down_proj")
    return [take(layer, name + suffix) for name in names for suffix in ("", scale_name.removeprefix("weight"))]


def join_scales(scales: Tensor, sizes: list[int], block: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The scales of blocks of matrices that are one behind the other, and what has one of them.

    scales: [..., blocks of rows, blocks of columns], those of each matrix begin with its rows. sizes: rows of each.
    """
    height, width = block
    if not any(size % height for size in sizes[:-1]):
        return scales, block
    # Later matrices begin within a block of rows: each row has its scales.
    pieces = scales.split([-(-size // height) for size in sizes], dim=-2)
    rows = [piece.repeat_interleave(height, -2).narrow(-2, 0, size) for piece, size in zip(pieces, sizes, strict=True)]
    return torch.cat(rows, dim=-2), (1, width)


@dataclass(frozen=True)
class Scaled:
    """A scale, `weight_scale`, for each row or for each whole matrix; perhaps an `input_scale` of all rows of x.

    dtype: of the codes, e4m3 or int8.
    """

    is_per_row: bool
    has_input_scale: bool = False
    rounds_input: bool = True
    dtype: torch.dtype = E4M3

    def create(self, layer: LinearBase) -> None:
        layer.add_parameter("weight", self.dtype)
        if self.is_per_row:
            scales = layer.add_parameter("weight_scale", torch.float32, (1, layer.columns.full_size))
        else:
            scales = layer.add_scalars("weight_scale")
        scales.dummy = DUMMY_SCALE if self.dtype == E4M3 else DUMMY_SCALES[8]
        if self.has_input_scale:
            layer.add_scalars("input_scale").dummy = DUMMY_SCALE

    def finish(self, layer: LinearBase) -> None:
        codes, scales = take(layer, "weight"), take(layer, "weight_scale")
        if not self.is_per_row:
            sizes = torch.tensor([part.size for part in layer.rows], device=scales.device)
            scales = scales.repeat_interleave(sizes)[:, None]
        input_scale = take(layer, "input_scale").amax(0, keepdim=True) if self.has_input_scale else None
        block = 1, layer.columns.size
        layer.weight = QuantizedWeight(
            codes, scales.contiguous(), block, rounds_input=self.rounds_input, input_scale=input_scale
        )

    def create_experts(self, layer: Experts) -> None:
        """Raises ValueError but for e4m3 by rows whose inputs are rounded by scales of their own."""
        if self != Scaled(is_per_row=True):
            raise ValueError(f"experts that are quantised by {self} are not supported, only by {Scaled(True)}")
        add_experts(layer, "weight_scale", (1, 0))

    def finish_experts(self, layer: Experts) -> None:
        gate_up, gate_up_scales, down, down_scales = take_experts(layer, "weight_scale")
        layer.gate_up_proj = QuantizedWeight(gate_up, gate_up_scales, (1, gate_up.size(2)), rounds_input=True)
        layer.down_proj = QuantizedWeight(down, down_scales, (1, down.size(2)), rounds_input=True)


class Fp8:
    """quant_method "fp8"."""

    def __init__(self, facts: JsonFacts) -> None:
        raw = facts.raw
        block, activations = raw.get("weight_block_size"), raw.get("activation_scheme", "dynamic")
        if activations not in ("dynamic", "static"):
            raise facts.error(f"activation_scheme={activations!r} is not supported, only 'dynamic' or 'static'")
        if raw.get("fmt", "e4m3") != "e4m3":
            raise facts.error(f"fmt={raw['fmt']!r} is not supported, only 'e4m3'")
        if block is None:
            self.scheme = Scaled(is_per_row=False, has_input_scale=activations == "static")
        elif block != [128, 128]:
            raise facts.error(f"weight_block_size={block!r} is not supported, only [128, 128]")
        elif activations == "static":
            raise facts.error("activation_scheme='static' is not supported with weight_block_size")
        else:
            self.scheme = Fp8Blocks((128, 128))
        self.ignored = names_of(facts, "modules_to_not_convert") + names_of(facts, "ignored_layers")

    def scheme_of(self, names: list[str]) -> Fp8Blocks | Scaled | None:
        return None if is_listed(names, self.ignored) else self.scheme
