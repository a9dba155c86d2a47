"""What a weight of a quantised checkpoint takes, as config.json says it or the option `quantization`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # importing the package is among what bench.py measures
    from nanovllm.checkpoint.model_config import ModelConfig


class WeightFormat(NamedTuple):
    """How the matrices of layers are stored, experts among them, but not routers, embedding and head.

    Attributes:
        bits: of a weight.
        group: weights that share a scale; None: those of a row, the length of which is hidden_size (most rows' is).
        group_bytes: of a group's scale, and of its zero if it has one.
        in_8_bits: the rows of a prompt are rounded too, so that products are of 8 bits.
    """

    bits: int
    group: int | None
    group_bytes: int
    in_8_bits: bool

    def bytes_per_weight(self, row: int) -> float:
        """Bytes of a weight in rows of some length, with its part of the scales and zeros."""
        return self.bits / 8 + self.group_bytes / (self.group or row)


def weight_format(config: ModelConfig, quantization: str | None) -> WeightFormat | None:
    """The format of a checkpoint, or of what the option `quantization` makes of a plain one; None: it stays plain.

    Raises:
        ValueError: an unknown method.
    """
    facts = config.quantization_config
    method = facts.get("quant_method", quantization)
    if method is None:
        return None
    if method == "fp8":
        group = 128 * 128 if facts.get("weight_block_size") else None
        return WeightFormat(8, group, group_bytes=4, in_8_bits=True)
    if method in ("gguf", "int4"):  # of a file, what stays codes
        return WeightFormat(4, 32, group_bytes=4, in_8_bits=False)
    if method == "int8":
        return WeightFormat(8, None, group_bytes=4, in_8_bits=False)
    if method in ("gptq", "awq"):
        has_zeros = facts.get("zero_point", True) if method == "awq" else not facts.get("sym", True)
        bits = facts.get("bits") or facts.get("w_bit", 4)  # older names of AWQ's come second
        group = facts.get("group_size") or facts.get("q_group_size", 128)
        return WeightFormat(bits, group if group > 0 else None, 2 + has_zeros, in_8_bits=False)
    if method == "compressed-tensors":
        return _compressed_tensors(next(iter(facts["config_groups"].values())))
    raise ValueError(f"no floor is known of weights by {method!r}")


def _compressed_tensors(group: dict[str, Any]) -> WeightFormat:
    """The format of an object in config_groups; only its weights and activations count."""
    weights = group["weights"]
    in_8_bits = bool(group.get("input_activations"))
    if weights.get("block_structure"):
        height, width = weights["block_structure"]
        return WeightFormat(weights["num_bits"], height * width, 4, in_8_bits)
    if weights.get("strategy") == "group":
        has_zeros = not weights.get("symmetric", True)
        return WeightFormat(weights["num_bits"], weights["group_size"], 2 + has_zeros, in_8_bits)
    return WeightFormat(weights["num_bits"], None, 4, in_8_bits)
