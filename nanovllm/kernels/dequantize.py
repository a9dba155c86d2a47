# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""A weight in few bits as a matrix, for so many rows that making it costs little beside multiplying with it."""

import torch
from torch import Tensor

from nanovllm.kernels import tl, triton, use_triton
from nanovllm.kernels.quantized_weight import INT4_RUN, QuantizedWeight

RUN = tl.constexpr(INT4_RUN)
BLOCK = 1024


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    numbers_ptr,
    K: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = k < K
    at = row // SCALE_ROWS * NUM_SCALES + k // SCALE_COLUMNS
    if BITS == 4:
        byte = k // (2 * RUN) * RUN + k % RUN
        codes = tl.load(codes_ptr + row * (K // 2) + byte, mask=mask, other=0)
        codes = (codes >> (k // RUN % 2 * 4).to(tl.uint8)) & 15
        zeros = tl.full((BLOCK,), 8.0, tl.float32)
    else:
        codes = tl.load(codes_ptr + row * K + k, mask=mask, other=0.0)
        zeros = tl.zeros((BLOCK,), tl.float32)
    if zeros_ptr is not None:
        zeros = tl.load(zeros_ptr + at, mask=mask, other=0).to(tl.float32)
    scales = tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32)
    numbers = (codes.to(tl.float32) - zeros) * scales
    tl.store(numbers_ptr + row * K + k, numbers.to(numbers_ptr.dtype.element_ty), mask=mask)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The numbers of a matrix, [N, K] in a dtype, columns in the order of the codes."""
    if not use_triton(weight.codes) or not weight.is_readable:
        return weight.dequantize(dtype)
    num_rows, size = weight.shape
    numbers = torch.empty((num_rows, size), dtype=dtype, device=weight.codes.device)
    _dequantize_kernel[num_rows, triton.cdiv(size, BLOCK)](
        weight.codes,
        weight.scales,
        weight.zeros,
        numbers,
        K=size,
        SCALE_ROWS=weight.block[0],
        SCALE_COLUMNS=weight.block[1],
        NUM_SCALES=weight.scales.size(1),
        BITS=weight.bits,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return numbers
