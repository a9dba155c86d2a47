"""Checkpoints in the format of compressed-tensors (github.com/vllm-project/compressed-tensors), as LLM Compressor's.

`config_groups` say how the matrices are stored that their `targets` name: in 8-bit floats or integers as they are, or
in integers of 4 or 8 bits that are packed into words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nanovllm.checkpoint.facts import JsonFacts
from nanovllm.quantization.fp8 import E4M3, Fp8Blocks, Scaled
from nanovllm.quantization.groups import GROUP_SIZES, Groups, take, unpack_words
from nanovllm.quantization.names import is_listed, names_of

if TYPE_CHECKING:
    from nanovllm.weights.linear_base import LinearBase
    from nanovllm.weights.schemes import Scheme

UNPACKED_FORMATS = {  # the types of weights that they are for
    "float-quantized": ("float",),
    "int-quantized": ("int",),
    "naive-quantized": ("float", "int"),
}
PACKED_FORMAT = "pack-quantized"
FORMATS = (*UNPACKED_FORMATS, PACKED_FORMAT)
MIXED_FORMAT = "mixed-precision"  # each group has a format of its own
# "frozen" is what older versions left in configurations of compressed checkpoints.
STATUSES = ("compressed", "frozen")
IN_ANOTHER_ORDER = ("group", "dynamic", True)
ORDERS = (None, False, "weight", "static", *IN_ANOTHER_ORDER)
LINEAR = "Linear"  # the target that is each matrix which no other target names


@dataclass(frozen=True)
class PackedGroups(Groups):
    """Codes packed along the columns, zeros, if any, along the rows.

    Tensors: weight_packed int32 [N, K / codes of a word], weight_scale [N, groups], weight_zero_point int32
    [N / codes of a word, groups], weight_g_idx int32 [K] if columns are in another order, weight_shape [2].
    """

    has_zeros: bool = False
    has_order: bool = False

    def create(self, layer: LinearBase) -> None:
        self.check_sizes(layer, are_rows_packed=self.has_zeros)
        layer.add_parameter("weight_packed", torch.int32, (1, self.codes_per_word))
        self.add_scales(layer, "weight_scale")
        if self.has_zeros:
            self.add_zeros(layer, "weight_zero_point")
        if self.has_order:
            self.add_groups(layer, "weight_g_idx")
        sizes = [(part.full_size, layer.columns.full_size) for part in layer.rows]
        layer.add_vectors("weight_shape", torch.int64, 2).dummy = torch.tensor(sizes).flatten()

    def finish(self, layer: LinearBase) -> None:
        self._check_shape(layer)
        order = None
        if self.has_order:
            if not (layer.weight_g_idx.data == -1).all():  # a column's group was never set: they are in order
                order = self.order_of(layer, "weight_g_idx")
            del layer.weight_g_idx
        codes, zeros = unpack_words(take(layer, "weight_packed"), self.bits), None
        if self.has_zeros:
            zeros = unpack_words(take(layer, "weight_zero_point").t(), self.bits).t().contiguous()
        layer.weight = self.weight_of(layer, codes, take(layer, "weight_scale"), zeros, order)

    def _check_shape(self, layer: LinearBase) -> None:
        """Each matrix has the shape that the checkpoint says, or those that it has as one have it together."""
        shapes = take(layer, "weight_shape").view(-1, 2).tolist()
        sizes, num_columns = [part.full_size for part in layer.rows], layer.columns.full_size
        apart = [[size, num_columns] for size in sizes]
        if shapes not in (apart, [[sum(sizes), num_columns]] * len(sizes)):
            raise ValueError(f"weight_shape is {shapes}, the model needs {apart}")


class CompressedTensors:
    """quant_method "compressed-tensors"."""

    def __init__(self, facts: JsonFacts) -> None:
        facts.choice("quantization_status", STATUSES, STATUSES[0])
        sparsity = facts.raw.get("sparsity_config") or {}
        if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
            raise facts.error(f"sparsity_config={sparsity!r} is not supported, only the format 'dense'")
        for key in ("transform_config", "moe_sparsity_config"):
            if facts.raw.get(key):
                raise facts.error(f"{key}={facts.raw[key]!r} is not supported")
        groups = _part_of(facts, "config_groups")
        self.groups: list[tuple[list[str], Scheme]] = []
        for name in groups.raw:
            group = _part_of(groups, name)
            self.groups.append((names_of(group, "targets"), _scheme_of(group, facts)))
        self.ignored = names_of(facts, "ignore")

    def scheme_of(self, names: list[str]) -> Scheme | None:
        """A target that names a matrix counts before one that is all of them."""
        if is_listed(names, self.ignored):
            return None
        named = (scheme for targets, scheme in self.groups if is_listed(names, targets))
        others = (scheme for targets, scheme in self.groups if LINEAR in targets)
        return next(named, None) or next(others, None)


def _part_of(facts: JsonFacts, key: str) -> JsonFacts:
    """An object within one."""
    value = facts.raw.get(key)
    if not isinstance(value, dict):
        raise facts.error(f"{key} must be an object, got {value!r}")
    return JsonFacts(f"{key} of {facts.path}", value)


def _scheme_of(group: JsonFacts, whole: JsonFacts) -> Scheme:
    """The scheme of a group's matrices; raises ValueError by key and value."""
    has_own_format = group.raw.get("format") is not None or whole.raw.get("format") == MIXED_FORMAT
    format_name = (group if has_own_format else whole).choice("format", FORMATS)
    if group.raw.get("output_activations") is not None:
        raise group.error(f"output_activations={group.raw['output_activations']!r} is not supported")
    inputs = None
    if group.raw.get("input_activations") is not None:
        inputs = _part_of(group, "input_activations")
    weights = _part_of(group, "weights")
    weights.choice("dynamic", (False,), False)
    if format_name == PACKED_FORMAT:
        if inputs is not None:
            raise group.error(f"input_activations={inputs.raw!r} is not supported with format={PACKED_FORMAT!r}")
        return _packed(weights)
    weights.choice("type", UNPACKED_FORMATS[format_name], "int")
    return _unpacked(weights, inputs)


def _packed(weights: JsonFacts) -> PackedGroups:
    weights.choice("type", ("int",), "int")
    bits, has_zeros = weights.choice("num_bits", (4, 8)), not weights.choice("symmetric", (True, False), True)
    has_order = weights.choice("actorder", ORDERS) in IN_ANOTHER_ORDER
    group_size = -1
    if weights.choice("strategy", ("group", "channel")) == "group":
        group_size = weights.choice("group_size", GROUP_SIZES)
    return PackedGroups(bits, group_size, has_zeros, has_order)


def _unpacked(weights: JsonFacts, inputs: JsonFacts | None) -> Scaled | Fp8Blocks:
    """8-bit weights: `weight` [N, K], `weight_scale` [N, 1], [1], or [N / 128, K / 128], perhaps `input_scale` [1]."""
    weights.choice("num_bits", (8,))
    weights.choice("symmetric", (True,), True)
    kind = weights.raw.get("type", "int")
    strategies = ("tensor", "channel", "block") if kind == "float" else ("tensor", "channel")
    strategy = weights.choice("strategy", strategies)
    if strategy == "block":
        weights.choice("block_structure", ([128, 128],))
    has_input_scale = False
    if inputs is not None:
        inputs.choice("type", (kind,), "int")
        inputs.choice("num_bits", (8,))
        inputs.choice("symmetric", (True,), True)
        has_input_scale = not inputs.choice("dynamic", (True, False), False)
        if strategy == "block":
            inputs.choice("dynamic", (True,))
            inputs.choice("strategy", ("group",))
            inputs.choice("group_size", (128,))
        else:
            inputs.choice("strategy", ("tensor",) if has_input_scale else ("token",))
    if strategy == "block":
        return Fp8Blocks((128, 128), "weight_scale", rounds_input=inputs is not None)
    return Scaled(
        is_per_row=strategy == "channel",
        has_input_scale=has_input_scale,
        rounds_input=inputs is not None,
        dtype=E4M3 if kind == "float" else torch.int8,
    )
