"""GPTQ checkpoints (arXiv 2210.17323) as AutoGPTQ and GPTQModel write them: 4 or 8 bits.

Tensors: qweight int32 [K / codes of a word, N], qzeros int32 [K / group, N / codes of a word], scales [K / group, N],
g_idx int32 [K], the group of each column of the weight [N, K]. With desc_act columns were quantised in another order
than they are stored in, so that a group's are anywhere; they are brought together here. In the format "gptq" zeros are
stored less one, in the bits of a code, in "gptq_v2" as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nanovllm.checkpoint.facts import JsonFacts
from nanovllm.quantization.groups import GROUP_SIZES, Groups, take, unpack_words
from nanovllm.quantization.names import is_listed, names_of

if TYPE_CHECKING:
    from nanovllm.weights.linear_base import LinearBase

BLOCK_MODULES = "modules_in_block_to_quantize"


@dataclass(frozen=True)
class GptqGroups(Groups):
    """Codes that are packed along the columns, zeros along the features."""

    zeros_stored_less: int = 1

    def create(self, layer: LinearBase) -> None:
        self.check_sizes(layer, are_rows_packed=True)
        layer.add_parameter("qweight", torch.int32, (1, self.codes_per_word), is_transposed=True)
        self.add_zeros(layer, "qzeros", is_transposed=True, stored_less=self.zeros_stored_less)
        self.add_scales(layer, "scales", is_transposed=True)
        self.add_groups(layer, "g_idx")

    def finish(self, layer: LinearBase) -> None:
        order = self.order_of(layer, "g_idx")
        del layer.g_idx
        codes = unpack_words(take(layer, "qweight").t(), self.bits)
        largest = (1 << self.bits) - 1
        zeros = (unpack_words(take(layer, "qzeros"), self.bits).t() + self.zeros_stored_less) & largest
        layer.weight = self.weight_of(layer, codes, take(layer, "scales").t(), zeros.contiguous(), order)


class Gptq:
    """quant_method "gptq"."""

    def __init__(self, facts: JsonFacts) -> None:
        for key in ("lm_head", "is_marlin_format"):
            if facts.flag(key):
                raise facts.error(f"{key}=true is not supported")
        if facts.raw.get("dynamic"):
            raise facts.error(f"dynamic={facts.raw['dynamic']!r}: rules for single modules are not supported")
        for key in ("desc_act", "sym"):  # g_idx and qzeros are stored in any case, and say it of each layer
            facts.flag(key)
        facts.choice("pack_dtype", ("int32",), "int32")
        key = "checkpoint_format" if "checkpoint_format" in facts.raw else "format"
        stored_less = 1 if facts.choice(key, ("gptq", "gptq_v2"), "gptq") == "gptq" else 0
        bits, group_size = facts.choice("bits", (4, 8)), facts.choice("group_size", GROUP_SIZES)
        self.scheme = GptqGroups(bits, group_size, stored_less)
        self.quantized = _flat_names(facts)
        self.ignored = names_of(facts, "modules_to_not_convert")

    def scheme_of(self, names: list[str]) -> GptqGroups | None:
        is_plain = is_listed(names, self.ignored) or (self.quantized and not is_listed(names, self.quantized))
        return None if is_plain else self.scheme


def _flat_names(facts: JsonFacts) -> list[str]:
    """The matrices of a layer that are quantised, which are listed in groups; none: all are."""
    groups = facts.raw.get(BLOCK_MODULES) or []
    if not isinstance(groups, list) or not all(isinstance(group, (list, str)) for group in groups):
        raise facts.error(f"{BLOCK_MODULES} must be a list of lists of names, got {groups!r}")
    names = [name for group in groups for name in ([group] if isinstance(group, str) else group)]
    return names_of(JsonFacts(facts.path, {BLOCK_MODULES: names}), BLOCK_MODULES)
