# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Root-mean-square normalisation of rows, with the residual addition in front of it fused in."""

import torch

from nanovllm.kernels import pdl_wait, tl, triton, use_pdl, use_triton


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, SIZE_PAD)
    mask = offs < SIZE
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    pdl_wait(PDL)
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = residual_ptr + row * residual_stride + offs
        x += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
        tl.store(residual, x.to(residual_ptr.dtype.element_ty), mask=mask)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    tl.store(y_ptr + row * SIZE + offs, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=mask)


def rms_norm_torch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What `rms_norm` computes, said plainly."""
    h = x.float()
    if residual is not None:
        h = h + residual.float()
        residual.copy_(h)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.float()
    y = y.to(x.dtype)
    return y if residual is None else (y, residual)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise rows: y = h / sqrt(mean(h^2) + eps) * weight, with h = x, or x + residual (Zhang & Sennrich, 2019).

    x: [N, H], rows any distance apart, elements of a row contiguous. weight: [H]. residual: [N, H] or None; it is
    overwritten with x + residual. Arithmetic in float32. Returns y [N, H] in x's dtype, contiguous, or
    (y, residual) where a residual was given.
    """
    if not use_triton(x):
        return rms_norm_torch(x, weight, eps, residual)
    rows, size = x.shape
    y = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if rows:
        size_pad = triton.next_power_of_2(size)
        pdl = use_pdl(x.device)
        _rms_norm_kernel[(rows,)](
            x, residual, weight, y, x.stride(0), 0 if residual is None else residual.stride(0), eps,
            HAS_RESIDUAL=residual is not None, SIZE=size, SIZE_PAD=size_pad, PDL=pdl,
            launch_pdl=pdl, num_warps=min(max(size_pad // 512, 1), 16),
        )  # fmt: skip
    return y if residual is None else (y, residual)
