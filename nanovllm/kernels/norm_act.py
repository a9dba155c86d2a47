# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""What comes before and after a linear layer with many rows: RMS normalisation, and the gated activation of an MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton, use_triton
from nanovllm.parallel.all_reduce import Peers, meet_kernel, receive, send

BLOCK = 1024


@triton.jit(do_not_specialize=["share"])
def _rms_norm_kernel(
    x_ptr, x_stride, weight_ptr, eps, y_ptr, stride: tl.int64, share, addresses, rank: tl.constexpr, offset,
    given_up_ptr, SIZE: tl.constexpr, RANKS: tl.constexpr, FORM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program + rank * share if FORM == "shares" else program
    cols = tl.arange(0, triton.next_power_of_2(SIZE))
    mask = cols < SIZE
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    x_ptr += row * x_stride + cols
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    pdl_wait(PDL)
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    if RANKS > 0:
        offs, part = program * SIZE + cols, None
        if FORM == "parts":
            part_ptr = tl.multiple_of((addresses[rank] + offset).to(tl.pointer_type(DTYPE)), 16) + rank * stride
            part = tl.load(part_ptr + offs, mask=mask, other=0.0)
            send(part, offs, mask, stride, addresses, rank, offset, RANKS)
        SENT: tl.constexpr = FORM != "shares"
        total = receive(part, offs, mask, stride, addresses, rank, offset, given_up_ptr, DTYPE, RANKS, SENT)
        rounded = (x + total).to(DTYPE)
        tl.store(x_ptr, rounded, mask=mask)
        x = rounded.to(tl.float32)
    if weight_ptr is not None:
        x *= tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * weight
    if FORM == "shares":
        for peer in tl.static_range(RANKS):
            sums_ptr = tl.multiple_of((addresses[peer] + offset).to(tl.pointer_type(DTYPE)), 16)
            tl.store(sums_ptr + RANKS * stride + row * SIZE + cols, x, mask=mask)
    elif weight_ptr is not None:
        tl.store(y_ptr + row * SIZE + cols, x, mask=mask)


def rms_norm_torch(x: Tensor, weight: Tensor | None, eps: float, parts: Tensor | None = None) -> Tensor:
    """What `rms_norm` computes, said plainly, with parts of shape [ranks, N, H]."""
    if parts is not None:
        x.copy_(x.float() + parts.float().sum(0))
    if weight is None:
        return x
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, peers: Peers | None = None) -> Tensor:
    """Normalise rows: x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, 2019).

    x: [N, H], rows any distance apart, elements of a row contiguous. peers: where the ranks leave parts of a sum that
    is added to x first, in place. weight: [H]; None to only add. Arithmetic in float32. Returns [N, H] in x's dtype,
    contiguous; x without a weight. Of a sum of shares, only the rank's own rows of x are read and written; what is
    returned, in the ranks' memory until the next such sum, has all rows.
    """
    if not use_triton(x):
        return rms_norm_torch(x, weight, eps)
    rows, size = x.shape
    y = x if weight is None else torch.empty((rows, size), dtype=x.dtype, device=x.device)
    form, ranks = (peers.form, len(peers.buffers)) if peers else (None, 0)
    num_rows = share = rows
    if form == "shares":
        share = peers.share(rows)
        num_rows = min(share, rows - peers.rank * share)
        y = peers.view(peers.rank, ranks * share, rows, size, x.dtype)
        meet_kernel[(1,)](peers.addresses, peers.rank, peers.given_up, RANKS=ranks, num_warps=1)
    _rms_norm_kernel[(num_rows,)](x, x.stride(0), weight, eps, y, share * size, share,
        *(peers[2:] if peers else (None, 0, 0, None)), SIZE=size, RANKS=ranks, FORM=form,
        num_warps=min(max(triton.next_power_of_2(size) // 512, 1), 16), **pdl_options(x.device))  # fmt: skip
    if form == "shares":
        meet_kernel[(1,)](peers.addresses, peers.rank, peers.given_up, RANKS=ranks, num_warps=1)
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
