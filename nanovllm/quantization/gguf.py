"""GGUF's types Q4_0 and Q4_1, whose codes of 4 bits stay as a file has them.

32 weights of a row are a block: a scale d in float16, of Q4_1 the least weight m too, and 16 bytes whose low halves
are the first 16 codes, as in `pack_int4`. A weight is d * (code - 8), or d * code + m. (The layout is that of ggml's
block_q4_0 and block_q4_1.)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from nanovllm.checkpoint.gguf.names import find_gguf_tensors
from nanovllm.quantization.groups import FilledGroups

KINDS = ("Q4_0", "Q4_1")
BLOCK = 32  # weights
CODE_BYTES = 16  # of a block


def read_blocks(source: Any, rows: slice, groups: slice, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
    """Takes a part of a file's tensor as it is, see `FilledGroups`."""
    blocks = source.blocks(rows)[:, groups]
    codes.copy_(blocks[..., -CODE_BYTES:].flatten(1))
    d = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    scales.copy_(d)
    if source.kind.name == "Q4_0":
        zeros.fill_(8)
        return
    m = blocks[..., 2:4].contiguous().view(torch.float16).squeeze(-1)
    # Where all weights of a block are alike, d and the codes are 0.
    scales.copy_(torch.where(d == 0, m, d))
    zeros.copy_(torch.where(d == 0, -1.0, -m.float() / d.float()))


BLOCKS = FilledGroups(4, BLOCK, read_blocks)


class Gguf:
    """A GGUF file whose codes stay as they are."""

    def __init__(self, path: str) -> None:
        """`path` is the file's, or a folder's that has it."""
        self.path = path

    def scheme_of(self, names: list[str]) -> FilledGroups | None:
        """As `Method.scheme_of`: what is stored by other types is plain."""
        kinds = _kinds_of(self.path)
        return BLOCKS if any(kinds.get(f"{name}.weight") in KINDS for name in names) else None


@functools.cache
def _kinds_of(path: str) -> dict[str, str]:
    """The types of a file's tensors, by the names that models give them."""
    return {name: tensor.kind.name for name, tensor in find_gguf_tensors(path).items()}
