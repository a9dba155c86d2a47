# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""y = x W^T for few rows, with the norm before it and the activation or the residual addition after it fused in.

With few rows a linear layer is a read of its weights, and a decode step a chain of short reads. Where kernels can
start before the one ahead of them ends (`pdl_options`), this one loads weights, which nobody writes, before it waits.
"""

import torch
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton, use_triton
from nanovllm.kernels.norm_act import rms_norm, silu_and_mul
from nanovllm.parallel.all_reduce import Peers, send

# From this many weights on, programs of the next kernel are in the way of this one's loads: they start when those are
# done. One request on Qwen3-8B: 238 tok/s, else 221. If all started late, one on 0.6B: 1,360, else 1,532.
LARGE_WEIGHT = 2**23
SMALL_BATCH = 8  # rows up to which the kernel beats the matrix product of the library; 0 turns it off

# BLOCK_N, BLOCK_K and warps for 1, up to 4 and more rows, and for up to 2,048, 4,096, 8,192 and more features: the
# fastest on an H200 with the shapes of Qwen3-0.6B and 8B. Few features make few programs: each has many warps, to have
# all of its weights on the way at once.
TILES = (
    ((8, 256, 16), (8, 256, 4), (16, 256, 4), (8, 256, 4)),
    ((8, 256, 8), (8, 128, 4), (16, 128, 4), (32, 64, 4)),
    ((8, 256, 8), (16, 64, 8), (16, 64, 4), (32, 64, 4)),
)


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(x_ptr, x_stride, weight_ptr, bias_ptr, norm_ptr, eps, y_ptr, y_stride, rows, N, addresses,
        rank: tl.constexpr, offset, K: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, RANKS: tl.constexpr,
        IS_LATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
        WARPS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    # A program computes BLOCK_N features. Its warps split K, BLOCK_K each at a time: axis 0 of the tiles is the warp.
    STEP: tl.constexpr = WARPS * BLOCK_K
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = features < N
    if GATED:  # a gate beside its up
        features = features // 2 + features % 2 * (N // 2)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, WARPS)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    w_ptr = weight_ptr + features.to(tl.int64)[None, :, None] * K + k
    w = tl.load(w_ptr, mask=mask_n[None, :, None] & (k < K), other=0.0)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + k, mask=k < K, other=0.0)
    pdl_wait(PDL, LAUNCH=not IS_LATE)
    x_ptr += m[None, :, None] * x_stride + k
    mask_m = (m < rows)[None, :, None]
    x = tl.load(x_ptr, mask=mask_m & (k < K), other=0.0)
    acc = tl.zeros((WARPS, BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((WARPS, BLOCK_M), tl.float32)
    for ahead in tl.range(STEP, K + STEP, STEP, num_stages=1):
        left = ahead + k < K
        next_w = tl.load(w_ptr + ahead, mask=mask_n[None, :, None] & left, other=0.0)
        next_x = tl.load(x_ptr + ahead, mask=mask_m & left, other=0.0)
        if norm_ptr is not None:
            h = x.to(tl.float32)
            squares += tl.sum(h * h, 2)
            x = (h * norm.to(tl.float32)).to(w.dtype)
            norm = tl.load(norm_ptr + ahead + k, mask=left, other=0.0)
        if BLOCK_M == 1:  # too little to multiply for the tensor cores to pay
            acc += tl.sum(x.to(tl.float32) * w.to(tl.float32), 2)[:, None, :]
        else:
            acc = tl.dot(x, tl.trans(w, 0, 2, 1), acc, input_precision="ieee")
        w, x = next_w, next_x
    if PDL and IS_LATE:
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.sum(acc, 0)
    if norm_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + features, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    SHARE: tl.constexpr = 2 if GATED else 1
    if GATED:
        gate, up = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_N // 2, 2)))
        y = gate / (1.0 + tl.exp(-gate)) * up
    n = tl.program_id(0) * (BLOCK_N // SHARE) + tl.arange(0, BLOCK_N // SHARE)
    mask = (m < rows)[:, None] & (n < N // SHARE)[None, :]
    offs = m[:, None] * y_stride + n[None, :]
    if ADDED:
        y += tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if RANKS > 0:
        send(y.to(w.dtype), offs, mask, rows * N, addresses, rank, offset, RANKS)
    else:
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: Tensor | None = None, eps: float = 0.0,
        residual: Tensor | None = None, gated: bool = False, out: Tensor | None = None) -> Tensor:  # fmt: skip
    """What `linear` computes, one operation after another; also its way with many rows, perhaps into `out`."""
    if norm is not None:
        x = rms_norm(x, norm, eps)
    if residual is not None and bias is None and not gated:
        return residual.addmm_(x, weight.t())
    y = torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    if gated:
        y = silu_and_mul(y)
    return y if residual is None else residual.add_(y)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: Tensor | None = None, eps: float = 0.0,
        parts: Peers | None = None, residual: Tensor | None = None, gated: bool = False,
        peers: Peers | None = None) -> Tensor | None:  # fmt: skip
    """y = x W^T + bias, of normalised rows, through a gate, onto a residual.

    x: [M, K], rows any distance apart, elements of a row contiguous. weight: [N, K], contiguous. bias: [N]. norm: [K],
    the weight of an RMSNorm of x's rows with `eps`. parts: given with norm, what is added to x first, in place. gated:
    the features are N/2 gates, then N/2 ups, and y is silu(gate) * up. residual: [M, N] (gated: [M, N/2]), not
    overlapping x; y is added to it in place and it is returned. peers: where y is left as this rank's part of a sum,
    without a gate or residual; packets take at most SMALL_BATCH rows. All in one dtype: float32, float16 or bfloat16;
    sums in float32. Returns [M, N] (gated: [M, N/2]), or nothing of use with peers.
    """
    rows, (n, k) = len(x), weight.shape
    if peers is not None and peers.form == "shares":
        share = peers.share(rows)
        for peer, x_share in enumerate(x.split(share)):
            linear_torch(x_share, weight, bias, out=peers.view(peer, peers.rank * share, len(x_share), n, x.dtype))
        return None
    if parts is not None:
        x, norm = rms_norm(x, norm, eps, parts), None
    if not use_triton(x) or not 0 < rows <= SMALL_BATCH:
        out = None if peers is None else peers.view(peers.rank, peers.rank * rows, rows, n, x.dtype)
        return linear_torch(x, weight, bias, norm, eps, residual, gated, out)
    y = residual
    if y is None and peers is None:
        y = torch.empty((rows, n // 2 if gated else n), dtype=x.dtype, device=x.device)
    is_large = weight.numel() >= LARGE_WEIGHT
    block_n, block_k, warps = TILES[(rows > 1) + (rows > 4)][(n > 2048) + (n > 4096) + (n > 8192)]
    block_n = 4 if is_large and rows == 1 else block_n  # two GPUs, one request on Qwen3-8B: a step 3% shorter
    whole_k = max(triton.next_power_of_2(k), 16)
    block_k = min(block_k, whole_k)
    warps = min(warps, whole_k // block_k)
    _linear_kernel[(triton.cdiv(n, block_n),)](
        x, x.stride(0), weight, bias, norm, eps, y, n if y is None else y.stride(0), rows, n,
        *(peers[2:5] if peers else (None, 0, 0)), K=k, GATED=gated, ADDED=residual is not None,
        RANKS=len(peers.buffers) if peers else 0, IS_LATE=is_large, BLOCK_M=triton.next_power_of_2(rows),
        BLOCK_N=block_n, BLOCK_K=block_k, WARPS=warps, num_warps=warps, **pdl_options(x.device))  # fmt: skip
    return y
