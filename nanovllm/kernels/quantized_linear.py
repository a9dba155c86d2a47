# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""`linear` with a weight in few bits, for a few rows that stay in 16 bits.

Codes become numbers in registers, so that only codes are read from memory. As in kernels/linear.py the norm before and
the activation or the residual addition after are fused in, and the first codes are on their way before the kernel
waits for the one ahead of it.
"""

from torch import Tensor

from nanovllm.kernels import INTERPRETED, pdl_options, pdl_wait, tl, triton
from nanovllm.kernels.activation import Gate
from nanovllm.kernels.linear_rows import finish_rows, load_addends, store_rows
from nanovllm.kernels.quantized_weight import INT4_RUN, QuantizedWeight
from nanovllm.kernels.tuning import LARGE_WEIGHT_BYTES, quantized_tile

IS_INTERPRETED = tl.constexpr(INTERPRETED)
RUN = tl.constexpr(INT4_RUN)
# The exponent of 128 in bfloat16, whose last four bits then count ones: 128 + code needs no arithmetic.
CODE_OFFSET = tl.constexpr(128.0)
SPLIT_BYTES = tl.constexpr("""{
    .reg .b32 low, high;
    and.b32 low, $4, 0x0f0f0f0f;
    shr.b32 high, $4, 4;
    and.b32 high, high, 0x0f0f0f0f;
    prmt.b32 $0, low, 0x43434343, 0x4140;
    prmt.b32 $1, low, 0x43434343, 0x4342;
    prmt.b32 $2, high, 0x43434343, 0x4140;
    prmt.b32 $3, high, 0x43434343, 0x4342;
}""")


@triton.jit
def _split_bytes(codes):
    """The low and the high halves of bytes, as bfloat16, CODE_OFFSET more than they are: four bytes a time."""
    if IS_INTERPRETED:
        low = (codes & 15).to(tl.float32) + CODE_OFFSET
        high = (codes >> 4).to(tl.float32) + CODE_OFFSET
    else:
        low, high = tl.inline_asm_elementwise(
            SPLIT_BYTES, "=r,=r,=r,=r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def _products(x, numbers):
    """x [P, M, B] times numbers [P, N, B], which both must have a form for tensor cores -> float32 [P, M, N]."""
    return tl.dot(x, tl.trans(numbers.to(x.dtype), 0, 2, 1), input_precision="ieee")


@triton.jit
def _load_x(x_ptr, norm_ptr, k, mask_m, mask_k):
    """Elements k of rows x_ptr [1, M, 1], times the norm's weight if there is one: [P, M, B].

    Also the sums of their squares, float32 [P, M]; without a norm, zeros.
    """
    x = tl.load(x_ptr + k, mask=mask_m & mask_k, other=0.0)
    squares = tl.zeros((x.shape[0], x.shape[1]), tl.float32)
    if norm_ptr is not None:
        h = x.to(tl.float32)
        squares = tl.sum(h * h, 2)
        x = (h * tl.load(norm_ptr + k, mask=mask_k, other=0.0).to(tl.float32)).to(x.dtype)
    return x, squares


@triton.jit(do_not_specialize=["rows"])
def _few_rows_kernel(
    x_ptr,
    x_stride,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    norm_ptr,
    eps,
    y_ptr,
    y_stride,
    rows,
    N,
    destination,
    K: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    BITS: tl.constexpr,
    GATE: tl.constexpr,
    ADDED: tl.constexpr,
    STORE: tl.constexpr,
    IS_LATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N features of all rows, by one program.

    Axis 0 of the tiles are PARTS parts of K, of BLOCK_K columns each; a part has one scale for each feature, one of
    NUM_SCALES. Of 4 bits, a byte has a code of column k and one of column k + RUN. (It is long because it is one pass,
    as the kernel of plain weights is.)
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    BLOCK_B: tl.constexpr = BLOCK_K // PER_BYTE
    STEP: tl.constexpr = PARTS * BLOCK_K
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = features < N
    if GATE is not None:  # a gate beside its up
        features = features // 2 + features % 2 * (N // 2)
    m = tl.arange(0, BLOCK_M)
    parts = tl.arange(0, PARTS)[:, None]
    byte = parts[:, :, None] * BLOCK_B + tl.arange(0, BLOCK_B)[None, None, :]
    k = byte
    if BITS == 4:
        k = byte // RUN * (2 * RUN) + byte % RUN
    codes_ptr += features.to(tl.int64)[None, :, None] * (K // PER_BYTE) + byte
    scales_at = features[None, :] // SCALE_ROWS * NUM_SCALES
    mask_w = mask_n[None, :, None]
    next_codes = tl.load(codes_ptr, mask=mask_w & (k < K), other=0.0)
    pdl_wait(PDL, LAUNCH=not IS_LATE)
    block = tl.program_id(0)
    addends = load_addends(block, features, bias_ptr, y_ptr, y_stride, rows, N, BLOCK_M, GATE, ADDED)
    x_ptr += m[None, :, None] * x_stride
    mask_m = (m < rows)[None, :, None]
    acc = tl.zeros((PARTS, BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((PARTS, BLOCK_M), tl.float32)
    for start in tl.static_range(0, K, STEP):  # a fourth faster than a loop, but seconds to compile
        codes, ahead = next_codes, start + STEP
        next_codes = tl.load(codes_ptr + ahead // PER_BYTE, mask=mask_w & (k < K - ahead), other=0.0)
        mask_s = mask_n[None, :] & (start + parts * BLOCK_K < K)
        offs_s = scales_at + (start + parts * BLOCK_K) // SCALE_COLUMNS
        scales = tl.load(scales_ptr + offs_s, mask=mask_s, other=0.0).to(tl.float32)
        zeros = tl.full((PARTS, BLOCK_N), 8.0 if BITS == 4 else 0.0, tl.float32)
        if zeros_ptr is not None:
            zeros = tl.load(zeros_ptr + offs_s, mask=mask_s, other=0).to(tl.float32)
        x, sums = _load_x(x_ptr, norm_ptr, start + k, mask_m, k < K - start)
        squares += sums
        if BITS == 4:
            high_x, sums = _load_x(x_ptr, norm_ptr, start + k + RUN, mask_m, k < K - start)
            squares += sums
            low, high = _split_bytes(codes)
            products = _products(x, low) + _products(high_x, high)
            total = tl.sum(x.to(tl.float32), 2) + tl.sum(high_x.to(tl.float32), 2)
            products -= total[:, :, None] * (zeros + CODE_OFFSET)[:, None, :]
        else:
            products = _products(x, codes.to(tl.float32))
            if zeros_ptr is not None:
                products -= tl.sum(x.to(tl.float32), 2)[:, :, None] * zeros[:, None, :]
        acc += products * scales[:, None, :]
    if PDL and IS_LATE:
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.sum(acc, 0)
    if norm_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)[:, None]
    finish_rows(y, addends, block, y_ptr, y_stride, rows, N, destination, GATE, STORE)


def launch_quantized_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Gate | None,
    is_added: bool,
    store: triton.JITFunction = store_rows,
    destination: tuple | None = None,
) -> None:
    """`launch_linear` with a weight in few bits, the columns of which are in the order of x."""
    rows, (num_features, size) = len(x), weight.shape
    tile = quantized_tile(size, weight.block[1])
    _few_rows_kernel[(triton.cdiv(num_features, tile.block_n),)](
        x,
        x.stride(0),
        weight.codes,
        weight.scales,
        weight.zeros,
        bias,
        norm,
        eps,
        y,
        num_features if y is None else y.stride(0),
        rows,
        num_features,
        destination,
        K=size,
        SCALE_ROWS=weight.block[0],
        SCALE_COLUMNS=weight.block[1],
        NUM_SCALES=weight.scales.size(1),
        BITS=weight.bits,
        GATE=gate,
        ADDED=is_added,
        STORE=store,
        IS_LATE=weight.codes.nbytes >= LARGE_WEIGHT_BYTES,
        BLOCK_M=triton.next_power_of_2(rows),
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        PARTS=tile.parts,
        num_warps=tile.warps,
        **pdl_options(x.device),
    )
