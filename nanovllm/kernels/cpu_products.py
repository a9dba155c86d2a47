"""Products with a weight in few bits on a CPU, by torch's own operators, which read codes as they are.

They are made for rows in bfloat16: others are multiplied by the dequantised numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.kernels.quantized_weight import QuantizedWeight, unpack_int4

INT4_GROUPS = (32, 64, 128, 256)  # columns of a group that the operator knows
INT4_ROWS = 16  # that it packs together
INNER_K_TILES = 1  # without a meaning on CPUs


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
    if weight.codes.dtype == torch.int8 and group == size and weight.zeros is None:
        return CpuWeight(weight.codes, weight.scales.flatten().to(dtype), num_features, None, weight.order)
    if weight.bits == 4 and group in INT4_GROUPS and num_features % INT4_ROWS == 0:
        scales = weight.scales.float()
        offsets = torch.zeros_like(scales) if weight.zeros is None else (8 - weight.zeros.float()) * scales
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_int4(weight.codes).int(), INNER_K_TILES)
        scales = torch.stack([scales, offsets], dim=-1).transpose(0, 1).to(dtype).contiguous()
        return CpuWeight(codes, scales, num_features, group, weight.order)
    return weight
