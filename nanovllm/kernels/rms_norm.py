# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Root-mean-square normalisation of rows."""

import torch
from torch import Tensor

from nanovllm.kernels import tl, triton, use_triton


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, y_ptr, x_stride, eps, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, SIZE_PAD)
    mask = offs < SIZE
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    tl.store(y_ptr + row * SIZE + offs, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=mask)


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What `rms_norm` computes, said plainly."""
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise rows: x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, 2019).

    x: [N, H], rows any distance apart, elements of a row contiguous. weight: [H]. Arithmetic in float32. Returns
    [N, H] in x's dtype, contiguous.
    """
    if not use_triton(x):
        return rms_norm_torch(x, weight, eps)
    rows, size = x.shape
    y = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if rows:
        size_pad = triton.next_power_of_2(size)
        num_warps = min(max(size_pad // 512, 1), 16)
        _rms_norm_kernel[(rows,)](x, weight, y, x.stride(0), eps, SIZE=size, SIZE_PAD=size_pad, num_warps=num_warps)
    return y
