"""AWQ checkpoints (arXiv 2306.00978) as AutoAWQ's "gemm" layout has them: 4 bits with a zero for each group.

Tensors: qweight int32 [K, N / 8], qzeros int32 [K / group, N / 8], scales [K / group, N], all with the columns of the
weight [N, K] first. Codes that follow each other along N share a word, but not in their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanovllm.checkpoint.facts import JsonFacts
from nanovllm.quantization.groups import GROUP_SIZES, Groups, take, unpack_words
from nanovllm.quantization.names import is_listed, names_of

if TYPE_CHECKING:
    from nanovllm.weights.linear_base import LinearBase

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which of a word's codes, lowest bits first, each of 8 features has


@dataclass(frozen=True)
class AwqGroups(Groups):
    """Codes and zeros that are packed along the features."""

    def create(self, layer: LinearBase) -> None:
        self.check_sizes(layer, are_rows_packed=True)
        layer.add_parameter("qweight", torch.int32, (self.codes_per_word, 1), is_transposed=True)
        self.add_zeros(layer, "qzeros", is_transposed=True)
        self.add_scales(layer, "scales", is_transposed=True)

    def finish(self, layer: LinearBase) -> None:
        codes, zeros = unpack_features(take(layer, "qweight")), unpack_features(take(layer, "qzeros"))
        layer.weight = self.weight_of(layer, codes, take(layer, "scales").t(), zeros)


def unpack_features(words: Tensor) -> Tensor:
    """int32 [K, N / 8] in AWQ's order -> uint8 [N, K]."""
    return unpack_words(words, 4).unflatten(-1, (-1, 8))[..., ORDER].flatten(-2).t().contiguous()


class Awq:
    """quant_method "awq". Keys have other names in configurations of transformers than in AutoAWQ's own."""

    def __init__(self, facts: JsonFacts) -> None:
        for key in ("version", "format"):
            facts.choice(key, ("gemm", "GEMM"), "gemm")
        bits_key = "w_bit" if "w_bit" in facts.raw else "bits"
        group_key = "q_group_size" if "q_group_size" in facts.raw else "group_size"
        facts.flag("zero_point")  # zeros are stored in any case
        bits, group_size = facts.choice(bits_key, (4,)), facts.choice(group_key, GROUP_SIZES)
        self.scheme = AwqGroups(bits, group_size)
        self.ignored = names_of(facts, "modules_to_not_convert")

    def scheme_of(self, names: list[str]) -> AwqGroups | None:
        return None if is_listed(names, self.ignored) else self.scheme
