# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""`linear` with a weight in few bits, for many rows: the way of each form of weight.

In 8 bits, with rows rounded too: cuBLAS multiplies codes, and a kernel applies the scales, which is faster than the
library's products with a scale for each row, and computes the activation or adds to the residual on the way. Blocks of
weights have products of their own. Everything else is multiplied in the rows' dtype.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton, use_triton
from nanovllm.kernels.activation import GATES, Gate, gate_and_mul
from nanovllm.kernels.dequantize import dequantize
from nanovllm.kernels.e4m3 import E4M3
from nanovllm.kernels.quantized_tiles import multiply_tiles
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.kernels.round_rows import round_rows

BLOCK = 1024


@triton.jit
def _scale_kernel(
    codes_ptr,
    x_scales_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    y_stride,
    size,
    N,
    GATE: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK elements of a row of y, [M, size]; of the products, [M, N]."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < size
    scales = tl.load(scales_ptr + n, mask=mask, other=0.0)
    if GATE is not None:
        up_scales = tl.load(scales_ptr + size + n, mask=mask, other=0.0)
    pdl_wait(PDL)
    x_scale = tl.load(x_scales_ptr + row)
    codes_ptr += row * N + n
    y = tl.load(codes_ptr, mask=mask, other=0.0).to(tl.float32) * scales * x_scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
    if GATE is not None:
        up = tl.load(codes_ptr + size, mask=mask, other=0.0).to(tl.float32) * up_scales * x_scale
        if bias_ptr is not None:
            up += tl.load(bias_ptr + size + n, mask=mask, other=0.0).to(tl.float32)
        y = gate_and_mul(y, up, GATE)
    y_ptr += row * y_stride + n
    if ADDED:
        y += tl.load(y_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=mask)


def scale_products_torch(
    products: Tensor,
    x_scales: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    gate: Gate | None,
    y: Tensor,
    is_added: bool,
) -> None:
    """What `scale_products` computes, said plainly."""
    numbers = products.float() * x_scales.t() * scales.t()
    if bias is not None:
        numbers += bias.float()
    if gate is not None:
        numbers = GATES[gate](numbers)
    y.copy_(y.float() + numbers if is_added else numbers)


def scale_products(
    products: Tensor,
    x_scales: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    gate: Gate | None,
    y: Tensor,
    is_added: bool,
) -> None:
    """Makes numbers of the products of codes, and what `linear` makes of them.

    products: [M, N], contiguous. x_scales: float32 [1, M]. scales: float32 [N, 1]. bias: [N]. y: [M, N] (gated: [M,
    N/2]), rows any distance apart; the result is written to it, or added.
    """
    if not use_triton(products):
        scale_products_torch(products, x_scales, scales, bias, gate, y, is_added)
        return
    rows, size = y.shape
    _scale_kernel[rows, triton.cdiv(size, BLOCK)](
        products,
        x_scales,
        scales,
        bias,
        y,
        y.stride(0),
        size,
        products.size(1),
        GATE=gate,
        ADDED=is_added,
        BLOCK=BLOCK,
        num_warps=4,
        **pdl_options(products.device),
    )


def multiplies_blocks(device: torch.device, weight: QuantizedWeight) -> bool:
    """Whether the library multiplies e4m3 with a scale for each block of 128 x 128: on Hopper, from CUDA 12.9 on.

    It takes the scales of four blocks of columns at a time.
    """
    version = tuple(map(int, torch.version.cuda.split(".")))
    num_features, size = weight.shape
    is_whole = weight.block == (128, 128) and num_features % 128 == 0 and size % 512 == 0
    return is_whole and torch.cuda.get_device_capability(device)[0] == 9 and version >= (12, 9)


def linear_quantized(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gate: Gate | None,
    out: Tensor | None,
) -> Tensor:
    """`linear_torch` with a weight in few bits, its columns in the order of x, on a GPU or in the interpreter."""
    rows, (num_features, size) = len(x), weight.shape
    has_one_scale = weight.scales.size(1) == 1
    is_float = weight.codes.dtype == E4M3
    if weight.rounds_input and weight.is_readable:
        group = size if has_one_scale else weight.block[1]
        codes, x_scales = round_rows(x, weight.codes.dtype, group, norm, eps, weight.input_scale)
        in_library = is_float and x.is_cuda and num_features % 16 == size % 16 == 0
        if in_library and weight.block == (1, size):
            y = residual if residual is not None else out
            if y is None:
                y = x.new_empty(rows, num_features // 2 if gate else num_features)
            # In float16 the products of codes, which have no scale yet, might be infinite.
            dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
            products = multiply_codes(codes, weight, dtype)
            scale_products(products, x_scales, weight.scales, bias, gate, y, is_added=residual is not None)
            return y
        if in_library and multiplies_blocks(x.device, weight) and x.dtype == torch.bfloat16:
            numbers = multiply_blocks(codes, x_scales, weight)
        else:
            numbers = multiply_tiles(codes, x_scales, weight, x.dtype)
    else:
        x = x if norm is None else rms_norm(x, norm, eps)
        numbers = x @ dequantize(weight, x.dtype).t()
    if bias is not None:
        numbers += bias
    if gate is not None:
        numbers = GATES[gate](numbers)
    if residual is not None:
        return residual.add_(numbers)
    return numbers if out is None else out.copy_(numbers)


def multiply_codes(x: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """x [M, K] times a weight's codes [N, K], both e4m3 -> [M, N] in a dtype, as if there were no scales."""
    return torch._scaled_mm(x, weight.codes.t(), weight.one, weight.one, out_dtype=dtype, use_fast_accum=True)


def multiply_blocks(x: Tensor, x_scales: Tensor, weight: QuantizedWeight) -> Tensor:
    """x W^T in bfloat16, [M, N], both e4m3: codes [M, K] and scales [K / 128, M], and a weight in blocks."""
    rows = len(x)
    if rows % 4:  # the library takes scales 16 bytes apart
        x = pad(x.view(torch.uint8), (0, 0, 0, -rows % 4)).view(E4M3)
        x_scales = pad(x_scales, (0, -rows % 4))
    y = torch._scaled_mm(x, weight.codes.t(), x_scales.t(), weight.scales.t(), out_dtype=torch.bfloat16)
    return y[:rows]
