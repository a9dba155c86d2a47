# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Products of many rows with a weight in few bits, tile by tile: in 8 bits if the rows are rounded too, else in theirs."""

import torch
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton
from nanovllm.kernels.quantized_linear import CODE_OFFSET, RUN, split_bytes
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.kernels.tuning import products_tile


@triton.jit(do_not_specialize=["rows"])
def _tiles_kernel(
    x_ptr,
    x_scales_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    y_ptr,
    rows,
    N,
    K: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N features of BLOCK_M rows, the features first: tensor cores want 64 rows of a tile, and there are few of x.

    Rows in 8 bits have a scale, or one for each SCALE_COLUMNS if the weights have; x_scales_ptr: [scales, rows].
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    IS_ROUNDED: tl.constexpr = x_scales_ptr is not None
    PER_PART: tl.constexpr = NUM_SCALES > 1 or not IS_ROUNDED  # scales are applied to parts of a sum
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, BLOCK_K // PER_BYTE)[None, :]
    k = byte
    if BITS == 4:
        k = byte // RUN * (2 * RUN) + byte % RUN
    safe_m = tl.where(m < rows, m, 0)
    safe_n = tl.where(features < N, features, 0)
    codes_ptr += safe_n.to(tl.int64)[:, None] * (K // PER_BYTE) + byte
    offs_s = safe_n // SCALE_ROWS * NUM_SCALES
    pdl_wait(PDL)
    x_ptr += safe_m.to(tl.int64)[:, None] * K + k
    is_int: tl.constexpr = IS_ROUNDED and codes_ptr.dtype.element_ty == tl.int8
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if is_int else tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        left = k < K - start
        codes = tl.load(codes_ptr + start // PER_BYTE, mask=left, other=0.0)
        x = tl.load(x_ptr + start, mask=left, other=0.0)
        if not PER_PART:
            acc = tl.dot(codes, tl.trans(x), acc, out_dtype=acc.dtype)
        else:
            scales = tl.load(scales_ptr + offs_s + start // SCALE_COLUMNS).to(tl.float32)
            if IS_ROUNDED:
                products = (
                    tl.dot(codes, tl.trans(x))
                    * tl.load(x_scales_ptr + start // SCALE_COLUMNS * rows + safe_m)[None, :]
                )
            elif BITS == 8:
                products = tl.dot(codes.to(tl.float32).to(x.dtype), tl.trans(x), input_precision="ieee")
                zeros = tl.zeros((BLOCK_N,), tl.float32)
            else:
                low, high = split_bytes(codes)
                high_x = tl.load(x_ptr + RUN + start, mask=left, other=0.0)
                products = tl.dot(low.to(x.dtype), tl.trans(x), input_precision="ieee")
                products = tl.dot(high.to(x.dtype), tl.trans(high_x), products, input_precision="ieee")
                zeros = tl.full((BLOCK_N,), 8.0, tl.float32)
            if zeros_ptr is not None:
                zeros = tl.load(zeros_ptr + offs_s + start // SCALE_COLUMNS).to(tl.float32)
            if not IS_ROUNDED and (BITS == 4 or zeros_ptr is not None):
                total = tl.sum(x.to(tl.float32), 1)
                if BITS == 4:
                    total += tl.sum(high_x.to(tl.float32), 1)
                    zeros += CODE_OFFSET
                products -= zeros[:, None] * total[None, :]
            acc += products * scales[:, None]
    y = acc.to(tl.float32)
    if not PER_PART:
        y *= tl.load(scales_ptr + offs_s)[:, None] * tl.load(x_scales_ptr + safe_m)[None, :]
    mask = (features < N)[:, None] & (m < rows)[None, :]
    tl.store(y_ptr + m.to(tl.int64)[None, :] * N + features[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)


def multiply_tiles(x: Tensor, x_scales: Tensor | None, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """x W^T in a dtype: x [M, K], contiguous, is in that dtype too, or in 8 bits with the scales of `round_rows`."""
    rows, (num_features, size) = len(x), weight.shape
    y = torch.empty((rows, num_features), dtype=dtype, device=x.device)
    tile = products_tile(rows, size, weight.block[1])
    _tiles_kernel[triton.cdiv(rows, tile.block_m), triton.cdiv(num_features, tile.block_n)](
        x,
        x_scales,
        weight.codes,
        weight.scales,
        weight.zeros,
        y,
        rows,
        num_features,
        K=size,
        SCALE_ROWS=weight.block[0],
        SCALE_COLUMNS=weight.block[1],
        NUM_SCALES=weight.scales.size(1),
        BITS=weight.bits,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **pdl_options(x.device),
    )
    return y
