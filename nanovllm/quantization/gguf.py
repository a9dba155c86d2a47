"""GGUF's types Q4_0 and Q4_1, whose codes of 4 bits stay as a file has them.

32 weights of a row are a block: a scale d in float16, of Q4_1 the least weight m too, and 16 bytes whose low halves
are the first 16 codes, as in `pack_int4`. A weight is d * (code - 8), or d * code + m. (The layout is that of ggml's
block_q4_0 and block_q4_1.)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from nanovllm.checkpoint.gguf.names import find_gguf_tensors
from nanovllm.checkpoint.loader import Shard
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.quantization.groups import DUMMY_SCALES, take

if TYPE_CHECKING:
    from nanovllm.layers.linear import LinearBase

KINDS = ("Q4_0", "Q4_1")
BLOCK = 32  # weights
CODE_BYTES = 16  # of a block


@dataclass(frozen=True)
class BlockShard(Shard):
    """Blocks of a file's tensor: codes for the parameter, `scales` and `zeros`; columns are counted in blocks."""

    is_copied: ClassVar[bool] = False

    scales: Tensor | None = None
    zeros: Tensor | None = None

    def copy(self, source: Any, parameter: nn.Parameter) -> None:
        own = slice(self.start, self.start + self.size)
        blocks = source.blocks(own) if self.dim == 0 else source.blocks(slice(None))[:, own]
        codes, scales, zeros = parameter.data, self.scales, self.zeros
        if self.dim == 0:
            codes, scales, zeros = (place.narrow(0, self.offset, self.size) for place in (codes, scales, zeros))
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


@dataclass(frozen=True)
class Blocks:
    """Codes of 4 bits in blocks."""

    def create(self, layer: LinearBase) -> None:
        codes = layer.add_parameter("weight", torch.uint8, (1, 2))
        scales = layer.add_parameter("scales", torch.float16, (1, BLOCK))
        shards = [replace(shard, full_shape=(shard.full_shape[0], layer.columns.full_size)) for shard in scales.shards]
        # Neither is a parameter: the tensor that fills the codes fills them too; of dummies they stay as they are.
        layer.scales = take(layer, "scales").fill_(DUMMY_SCALES[4])
        layer.zeros = torch.full_like(layer.scales, 8, dtype=torch.float32)
        codes.shards = [BlockShard(**vars(shard), scales=layer.scales, zeros=layer.zeros) for shard in shards]

    def finish(self, layer: LinearBase) -> None:
        codes, scales, zeros = take(layer, "weight"), layer.scales, layer.zeros
        del layer.scales, layer.zeros
        layer.weight = QuantizedWeight(codes, scales, (1, BLOCK), zeros)


class Gguf:
    """A GGUF file whose codes stay as they are."""

    def __init__(self, path: str) -> None:
        """`path` is the file's, or a folder's that has it."""
        self.path = path

    def scheme_of(self, names: list[str]) -> Blocks | None:
        """As `Method.scheme_of`: what is stored by other types is plain."""
        kinds = _kinds_of(self.path)
        return Blocks() if any(kinds.get(f"{name}.weight") in KINDS for name in names) else None


@functools.cache
def _kinds_of(path: str) -> dict[str, str]:
    """The types of a file's tensors, by the names that models give them."""
    return {name: tensor.kind.name for name, tensor in find_gguf_tensors(path).items()}
