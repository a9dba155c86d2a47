"""Plain checkpoints that are rounded to 4 bits while they are loaded: `quantization="int4"`, on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.quantized_weight import pack_int4
from nanovllm.kernels.round_rows import SMALLEST_SCALE
from nanovllm.quantization.groups import FilledGroups

GROUP = 32  # columns of a row; with 64 the perplexity of SmolLM2-135M-Instruct is 25% higher
LARGEST_CODE = 15
LEAST_SQUARES_TURNS = 3
ROWS_AT_ONCE = 512  # which take several times their memory while they are rounded


def round_groups(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds a matrix [N, K]: uint8 codes [N, K], float32 scales and zeros [N, K / GROUP], for each group its own.

    At first the codes go from a group's least number to its largest, which is exact where the numbers were made of
    such codes. Then, in turns, scale and offset are those of the least squares of the numbers over their codes, and
    codes are chosen anew, as in Lloyd's algorithm (1982). The turn with the least error counts.
    """
    x = numbers.float().unflatten(1, (-1, GROUP))
    offset, highest = x.aminmax(dim=2, keepdim=True)
    scale = ((highest - offset) / LARGEST_CODE).clamp(min=SMALLEST_SCALE.value)
    least = torch.full_like(offset, torch.inf)
    best_codes, best_scale, best_offset = torch.zeros_like(x), scale, offset
    for _ in range(1 + LEAST_SQUARES_TURNS):
        codes = ((x - offset) / scale).round_().clamp_(0, LARGEST_CODE)
        error = (codes * scale + offset - x).square_().sum(2, keepdim=True)
        is_better = error < least  # not if it is NaN: codes that are all alike have no least squares
        least = torch.where(is_better, error, least)
        best_codes = torch.where(is_better, codes, best_codes)
        best_scale = torch.where(is_better, scale, best_scale)
        best_offset = torch.where(is_better, offset, best_offset)
        mean_code = codes.mean(2, keepdim=True)
        spread = codes - mean_code
        scale = (spread * x).sum(2, keepdim=True) / spread.square().sum(2, keepdim=True)
        offset = x.mean(2, keepdim=True) - scale * mean_code
    return best_codes.flatten(1).to(torch.uint8), best_scale.squeeze(2), (-best_offset / best_scale).squeeze(2)


def round_tensor(source: Any, rows: slice, groups: slice, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
    """Rounds a part of a plain tensor, see `FilledGroups`. No rank cuts a group, so their number changes no result."""
    numbers = source[rows, groups.start * GROUP : groups.stop * GROUP]
    parts = zip(*(tensor.split(ROWS_AT_ONCE) for tensor in (numbers, codes, scales, zeros)), strict=True)
    for part, own_codes, own_scales, own_zeros in parts:
        whole_codes, part_scales, part_zeros = round_groups(part)
        own_codes.copy_(pack_int4(whole_codes))
        own_scales.copy_(part_scales)
        own_zeros.copy_(part_zeros)


ROUNDED_INT4 = FilledGroups(4, GROUP, round_tensor)
