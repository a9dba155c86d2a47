# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""What stands around linear layers with many rows: sums of their parts, RMS normalisation, an MLP's activation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton, use_triton
from nanovllm.kernels.all_reduce import MAX_ROWS, POLLS, Peers, wait_for_parts

BLOCK = 1024
Parts = Tensor | Peers | None  # of a sum that is still to be added, by whoever reads it next


@triton.jit(do_not_specialize=["rank", "index"])
def _rms_norm_kernel(
    x_ptr, x_stride, weight_ptr, eps, y_ptr, parts_ptr, part_numel, addresses_ptr, rank, offset, step_ptr, index,
    given_up_ptr, SIZE: tl.constexpr, PARTS: tl.constexpr, MAX_ROWS: tl.constexpr, POLLS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, triton.next_power_of_2(SIZE))
    mask = offs < SIZE
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    pdl_wait(PDL)
    x_ptr += row * x_stride + offs
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 0:
        if addresses_ptr is not None:
            wait_for_parts(addresses_ptr, rank, tl.load(step_ptr) + index, given_up_ptr, PARTS, MAX_ROWS, POLLS)
        for i in tl.static_range(PARTS):  # in the same order on every rank, so that all get the same sum
            if addresses_ptr is None:
                part_ptr = parts_ptr + i * part_numel
            else:
                part_ptr = (tl.load(addresses_ptr + i) + offset).to(x_ptr.dtype)
                part_ptr = tl.multiple_of(part_ptr, 16)  # so that 16 bytes are read at once
            # Past the cache of the SM, which may still have what lay there two sums ago.
            x += tl.load(part_ptr + row * SIZE + offs, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        rounded = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr, rounded, mask=mask)
        x = rounded.to(tl.float32)
    if weight_ptr is not None:
        rstd = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
        tl.store(y_ptr + row * SIZE + offs, x * rstd * weight, mask=mask)


def rms_norm_torch(x: Tensor, weight: Tensor | None, eps: float, parts: Tensor | None = None) -> Tensor:
    """What `rms_norm` computes, said plainly."""
    if parts is not None:
        x.copy_(x.float() + parts.float().sum(0))
    if weight is None:
        return x
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, parts: Parts = None) -> Tensor:
    """Normalise rows: x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, 2019), having added parts to them.

    x: [N, H], rows any distance apart, elements of a row contiguous; the sum of the parts is added to it in place.
    parts: [P, N, H], contiguous, or the ranks' in their memory, N at most MAX_ROWS. weight: [H]; None to only add.
    Arithmetic in float32. Returns [N, H] in x's dtype, contiguous; x without a weight.
    """
    if not use_triton(x):
        return rms_norm_torch(x, weight, eps, parts)
    rows, size = x.shape
    y = x if weight is None else torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if isinstance(parts, Peers):
        num_parts, source = len(parts.addresses), (None, 0, *parts[1:])
    else:
        num_parts, source = 0 if parts is None else len(parts), (parts, x.numel(), None, 0, 0, None, 0, None)
    _rms_norm_kernel[(rows,)](
        x, x.stride(0), weight, eps, y, *source, SIZE=size, PARTS=num_parts, MAX_ROWS=MAX_ROWS, POLLS=POLLS,
        num_warps=min(max(triton.next_power_of_2(size) // 512, 1), 16), **pdl_options(x.device),
    )  # fmt: skip
    return y


@triton.jit
def _silu_and_mul_kernel(x_ptr, y_ptr, x_stride, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    x = x_ptr + row * x_stride + offs
    pdl_wait(PDL)
    gate = tl.load(x, mask=mask).to(tl.float32)
    up = tl.load(x + size, mask=mask).to(tl.float32)
    tl.store(y_ptr + row * size + offs, gate / (1.0 + tl.exp(-gate)) * up, mask=mask)


def silu_and_mul_torch(x: Tensor) -> Tensor:
    """What `silu_and_mul` computes, said plainly."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020).

    x: [N, 2 I], gate then up, rows any distance apart. Arithmetic in float32. Returns [N, I] in x's dtype, contiguous.
    """
    if not use_triton(x):
        return silu_and_mul_torch(x)
    rows, size = x.shape[0], x.shape[1] // 2
    y = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    grid = rows, triton.cdiv(size, BLOCK)
    _silu_and_mul_kernel[grid](x, y, x.stride(0), size, BLOCK=BLOCK, num_warps=4, **pdl_options(x.device))
    return y
