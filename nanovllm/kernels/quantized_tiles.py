# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Products in 8 bits, tile by tile: of what the library does not multiply, integers and blocks of odd sizes."""

import torch
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.kernels.tuning import products_tile


@triton.jit(do_not_specialize=["rows"])
def _tiles_kernel(
    x_ptr,
    x_scales_ptr,
    codes_ptr,
    scales_ptr,
    y_ptr,
    rows,
    N,
    K: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N features of BLOCK_M rows, the features first: tensor cores want 64 rows of a tile, and x may have few.

    x has a scale for each row, or as many as a row of the weight has; x_scales_ptr: [scales, rows].
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)[None, :]
    safe_m = tl.where(m < rows, m, 0)
    safe_n = tl.where(features < N, features, 0)
    codes_ptr += safe_n.to(tl.int64)[:, None] * K + k
    scales_ptr += safe_n // SCALE_ROWS * NUM_SCALES
    pdl_wait(PDL)
    x_ptr += safe_m.to(tl.int64)[:, None] * K + k
    SUM: tl.constexpr = tl.int32 if codes_ptr.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if NUM_SCALES > 1 else SUM)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        left = k < K - start
        codes = tl.load(codes_ptr + start, mask=left, other=0.0)
        x = tl.load(x_ptr + start, mask=left, other=0.0)
        if NUM_SCALES > 1:
            column = start // SCALE_COLUMNS
            scales = tl.load(scales_ptr + column)[:, None] * tl.load(x_scales_ptr + column * rows + safe_m)[None, :]
            acc += tl.dot(codes, tl.trans(x), out_dtype=SUM) * scales
        else:
            acc = tl.dot(codes, tl.trans(x), acc, out_dtype=SUM)
    y = acc.to(tl.float32)
    if NUM_SCALES == 1:
        y *= tl.load(scales_ptr)[:, None] * tl.load(x_scales_ptr + safe_m)[None, :]
    mask = (features < N)[:, None] & (m < rows)[None, :]
    tl.store(y_ptr + m.to(tl.int64)[None, :] * N + features[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)


def multiply_tiles_torch(x: Tensor, x_scales: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """What `multiply_tiles` computes, said plainly."""
    scales = x_scales.t()
    if scales.size(1) > 1:
        scales = scales.repeat_interleave(weight.block[1], 1)[:, : x.size(1)]
    return (x.float() * scales @ weight.dequantize(torch.float32).t()).to(dtype)


def multiply_tiles(x: Tensor, x_scales: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """x W^T, in a dtype, [M, N]: codes [M, K] and scales of `round_rows`, with a weight of the same kind of codes."""
    rows, (num_features, size) = len(x), weight.shape
    y = torch.empty((rows, num_features), dtype=dtype, device=x.device)
    tile = products_tile(rows, size, weight.block[1])
    _tiles_kernel[triton.cdiv(rows, tile.block_m), triton.cdiv(num_features, tile.block_n)](
        x,
        x_scales,
        weight.codes,
        weight.scales,
        y,
        rows,
        num_features,
        K=size,
        SCALE_ROWS=weight.block[0],
        SCALE_COLUMNS=weight.block[1],
        NUM_SCALES=weight.scales.size(1),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **pdl_options(x.device),
    )
    return y
