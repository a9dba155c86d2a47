# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Rows in 8 bits, for products in 8 bits: each with a scale, or one for each group of its elements."""

import torch
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton, use_triton
from nanovllm.kernels.e4m3 import E4M3, E4M3_MAX
from nanovllm.kernels.rms_norm import num_warps, rms_norm_torch

LARGEST = {E4M3: E4M3_MAX, torch.int8: 127.0}
SMALLEST_SCALE = tl.constexpr(1e-12)
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it in float32 is rounded to an integer


@triton.jit
def _round_rows_kernel(
    x_ptr,
    x_stride,
    norm_ptr,
    eps,
    codes_ptr,
    scales_ptr,
    input_scale_ptr,
    rows,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row, as [groups, GROUP]."""
    GROUPS: tl.constexpr = triton.next_power_of_2(triton.cdiv(SIZE, GROUP))
    GROUP_PAD: tl.constexpr = triton.next_power_of_2(GROUP)
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    cols = groups[:, None] * GROUP + tl.arange(0, GROUP_PAD)[None, :]
    mask = (cols < SIZE) & (tl.arange(0, GROUP_PAD) < GROUP)[None, :]
    if norm_ptr is not None:
        weight = tl.load(norm_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    pdl_wait(PDL)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        x = x * (tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / SIZE + eps) * weight)
    if input_scale_ptr is not None:
        scales = tl.load(input_scale_ptr) + tl.zeros((GROUPS,), tl.float32)
    else:
        scales = tl.maximum(tl.max(tl.abs(x), 1) / LARGEST, SMALLEST_SCALE)
    scales += 0.0 * tl.sum(x, 1)  # maxima drop NaN, and codes of 8 bits may have none
    x = tl.minimum(tl.maximum(x / scales[:, None], -LARGEST), LARGEST)
    if codes_ptr.dtype.element_ty == tl.int8:
        x = (x + ROUNDING) - ROUNDING
    tl.store(codes_ptr + row * SIZE + cols, x.to(codes_ptr.dtype.element_ty), mask=mask)
    tl.store(scales_ptr + groups * rows + row, scales, mask=groups * GROUP < SIZE)


def round_rows_torch(
    x: Tensor,
    dtype: torch.dtype,
    group: int,
    norm: Tensor | None = None,
    eps: float = 0.0,
    input_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `round_rows` computes, said plainly."""
    largest = LARGEST[dtype]
    x = x.float() if norm is None else rms_norm_torch(x.float(), norm, eps)
    padding = -x.size(1) % group
    groups = torch.nn.functional.pad(x, (0, padding)).unflatten(1, (-1, group))
    if input_scale is None:
        scales = (groups.abs().amax(2) / largest).clamp(min=SMALLEST_SCALE.value)
    else:
        scales = input_scale.expand(groups.shape[:2])
    scales = scales + 0.0 * groups.sum(2)
    codes = (groups / scales[..., None]).clamp(-largest, largest).flatten(1)[:, : x.size(1)]
    codes = codes.round() if dtype == torch.int8 else codes
    return codes.to(dtype), scales.t().contiguous()


def round_rows(
    x: Tensor,
    dtype: torch.dtype,
    group: int,
    norm: Tensor | None = None,
    eps: float = 0.0,
    input_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rounds rows, perhaps normalised ones: number = code * scale.

    Args:
        x: [M, K], rows any distance apart, elements of a row contiguous.
        dtype: of the codes, float8_e4m3fn or int8.
        group: elements of a row that have one scale; K: the whole row.
        norm: [K], the weight of an RMSNorm of the rows, with `eps`.
        input_scale: float32 [1], the scale of everything, beyond whose reach numbers become the largest; None: each
            group has the one that makes its largest number the largest code.

    Returns:
        codes [M, K], contiguous, and float32 scales [groups, M]; NaN for a group with NaN or infinity.
    """
    if not use_triton(x):
        return round_rows_torch(x, dtype, group, norm, eps, input_scale)
    rows, size = x.shape
    codes = torch.empty((rows, size), dtype=dtype, device=x.device)
    scales = torch.empty((triton.cdiv(size, group), rows), dtype=torch.float32, device=x.device)
    _round_rows_kernel[(rows,)](
        x,
        x.stride(0),
        norm,
        eps,
        codes,
        scales,
        input_scale,
        rows,
        SIZE=size,
        GROUP=group,
        LARGEST=LARGEST[dtype],
        num_warps=num_warps(size),
        **pdl_options(x.device),
    )
    return codes, scales
