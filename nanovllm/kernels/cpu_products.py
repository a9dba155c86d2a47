"""Products that are CPUs' own.

Those with a weight in few bits are by torch's own operators, which read codes as they are. They are made for rows in
bfloat16: others are multiplied by the dequantised numbers.
"""

import functools
import platform
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.kernels.quantized_weight import QuantizedWeight, unpack_int4

INT8_COLUMNS = 16  # that the operator multiplies at once: it reads beyond the end of other rows
INT4_GROUPS = (32, 64, 128, 256)  # columns of a group that the operator knows
INT4_ROWS = 16  # that it packs together
INNER_K_TILES = 1  # without a meaning on CPUs
NUM_REFINED_LOGITS = 8  # the largest of a row


@dataclass(frozen=True)
class CpuWeight:
    """A matrix [N, K] of codes, as the operators take it.

    Attributes:
        codes: int8 [N, K]; or those of 4 bits as torch packs them.
        scales: bfloat16 [N], number = code * scale; or [K / group, N, 2], number = (code - 8) * scale + offset.
        num_features: N.
        group: the columns of codes of 4 bits that have one scale; None: codes are int8.
        order: int64 [K], the element of x that each column belongs to; None: its own.
    """

    codes: Tensor
    scales: Tensor
    num_features: int
    group: int | None
    order: Tensor | None

    def __len__(self) -> int:
        return self.num_features

    def multiply(self, x: Tensor) -> Tensor:
        """x W^T, bfloat16 [M, N], of rows x [M, K] in bfloat16."""
        x = x.contiguous() if self.order is None else x.index_select(1, self.order)
        if self.group is None:
            return torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scales)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.codes, self.group, self.scales)


def for_cpu(weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight | CpuWeight:
    """The weight as the operators take it, if they can, and rows come in `dtype`; else as it is."""
    num_features, size = weight.shape
    rows, group = weight.block
    if dtype != torch.bfloat16 or rows > 1:
        return weight
    is_whole_rows = group == size and weight.zeros is None and size % INT8_COLUMNS == 0
    if weight.codes.dtype == torch.int8 and is_whole_rows:
        return CpuWeight(weight.codes, weight.scales.flatten().to(dtype), num_features, None, weight.order)
    if weight.bits == 4 and group in INT4_GROUPS and num_features % INT4_ROWS == 0:
        scales = weight.scales.float()
        offsets = torch.zeros_like(scales) if weight.zeros is None else (8 - weight.zeros.float()) * scales
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_int4(weight.codes).int(), INNER_K_TILES)
        scales = torch.stack([scales, offsets], dim=-1).transpose(0, 1).to(dtype).contiguous()
        return CpuWeight(codes, scales, num_features, group, weight.order)
    return weight


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16, AVX512-BF16, AMX or ARM's, and torch uses them."""
    if platform.machine() in ("aarch64", "arm64"):
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def half_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Logits x W^T, float32 [M, V], of x [M, K] and a weight [V, K] in bfloat16 or float16.

    Torch rounds what it sums in float32 to the dtype of x. At 20 bfloat16's steps are 1/8 apart, so that the best
    tokens often tie; the largest logits, of which one will be drawn, are computed once more without rounding.
    """
    logits = torch.mm(x, weight.t()).float()
    tokens = logits.topk(min(NUM_REFINED_LOGITS, len(weight))).indices
    return logits.scatter_(1, tokens, torch.einsum("mk,mtk->mt", x.float(), weight[tokens].float()))
