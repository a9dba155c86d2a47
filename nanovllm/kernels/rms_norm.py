# ruff: noqa: ANN001, ANN201, ANN202 (Triton types the arguments of its kernels itself)
"""RMS normalisation, behind a product or before one of many rows; with few rows the product's kernel normalises."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton, use_triton


@triton.jit
def normalise(x, weight, eps, SIZE: tl.constexpr):
    """One row, float32 [SIZE or more, zeros behind], and the weight."""
    return x * (tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * weight)


def num_warps(size: int) -> int:
    """Warps of a program that holds a row of some size."""
    return min(max(triton.next_power_of_2(size) // 512, 1), 16)


@triton.jit
def _rms_norm_kernel(
    x_ptr, x_stride, weight_ptr, eps, y_ptr, y_stride, SIZE: tl.constexpr, ADDED: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, triton.next_power_of_2(SIZE))
    mask = cols < SIZE
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    pdl_wait(PDL)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    y = normalise(x, weight, eps, SIZE)
    y_ptr += row * y_stride + cols
    if ADDED:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32) + tl.load(y_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr, y, mask=mask)


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """What `rms_norm` computes, said plainly."""
    y = F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    return y if residual is None else residual.add_(y)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Normalise rows: x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, 2019).

    x: [N, H], rows any distance apart, elements of a row contiguous. weight: [H]. residual: likewise, not overlapping
    x; the result, rounded to x's dtype, is added to it in place and it is returned. Arithmetic in float32. Returns
    [N, H] in x's dtype, without a residual contiguous.
    """
    if not use_triton(x):
        return rms_norm_torch(x, weight, eps, residual)
    rows, size = x.shape
    y = residual
    if y is None:
        y = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    options = {"num_warps": num_warps(size), **pdl_options(x.device)}
    is_added = residual is not None
    _rms_norm_kernel[(rows,)](x, x.stride(0), weight, eps, y, y.stride(0), SIZE=size, ADDED=is_added, **options)
    return y
