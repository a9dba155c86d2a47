# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""`linear` with a weight in few bits, for one row, where the time goes into making numbers of codes.

At 4.4 TB/s a processor of an H200 gets 20 codes of 8 bits a cycle, or 40 of 4 bits, and has 128 lanes to convert and
to multiply them. So codes are read as words of 32 bits, become pairs of float16, which takes few instructions, and are
multiplied in pairs. A few products are added up in float16, whose error is small beside that of rounding x to
bfloat16, then they are added in float32.
"""

import torch
from torch import Tensor

from nanovllm.kernels import INTERPRETED, pdl_options, pdl_wait, tl, triton
from nanovllm.kernels.activation import Gate
from nanovllm.kernels.e4m3 import E4M3
from nanovllm.kernels.linear_rows import finish_rows
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.kernels.tuning import LARGE_WEIGHT, row_tile

IS_INTERPRETED = tl.constexpr(INTERPRETED)
# Each takes a word of codes, $1, and pairs of x, and gives a pair of sums. Of bytes, the first pair is that of the
# first two; of halves of bytes, of those four bits 16 apart, which one mask keeps.
DOT_E4M3 = tl.constexpr("""{
    .reg .b16 first, second;
    .reg .b32 low, high;
    mov.b32 {first, second}, $1;
    cvt.rn.f16x2.e4m3x2 low, first;
    cvt.rn.f16x2.e4m3x2 high, second;
    mul.rn.f16x2 low, low, $2;
    fma.rn.f16x2 $0, high, $3, low;
}""")
# In float16, 0x6400 is 1024, whose last bits count ones; 0x6480 is 1152, and int8 has its sign where 128 is added.
DOT_INT8 = tl.constexpr("""{
    .reg .b32 codes, low, high;
    xor.b32 codes, $1, 0x80808080;
    prmt.b32 low, codes, 0x64646464, 0x4140;
    prmt.b32 high, codes, 0x64646464, 0x4342;
    sub.rn.f16x2 low, low, $4;
    sub.rn.f16x2 high, high, $4;
    mul.rn.f16x2 low, low, $2;
    fma.rn.f16x2 $0, high, $3, low;
}""")
DOT_INT4 = tl.constexpr("""{
    .reg .b32 codes, pair, sum;
    lop3.b32 pair, $1, 0x000f000f, 0x64006400, 0xea;
    sub.rn.f16x2 pair, pair, $6;
    mul.rn.f16x2 sum, pair, $2;
    shr.b32 codes, $1, 8;
    lop3.b32 pair, codes, 0x000f000f, 0x64006400, 0xea;
    sub.rn.f16x2 pair, pair, $6;
    fma.rn.f16x2 sum, pair, $3, sum;
    shr.b32 codes, $1, 4;
    lop3.b32 pair, codes, 0x000f000f, 0x64006400, 0xea;
    sub.rn.f16x2 pair, pair, $6;
    fma.rn.f16x2 sum, pair, $4, sum;
    shr.b32 codes, $1, 12;
    lop3.b32 pair, codes, 0x000f000f, 0x64006400, 0xea;
    sub.rn.f16x2 pair, pair, $6;
    fma.rn.f16x2 $0, pair, $5, sum;
}""")
ADD_PAIR = tl.constexpr("""{
    .reg .b16 first, second;
    .reg .f32 a, b;
    mov.b32 {first, second}, $1;
    cvt.f32.f16 a, first;
    cvt.f32.f16 b, second;
    add.f32 $0, a, b;
}""")


@triton.jit
def _pair(a, b):
    """Two float16 in a word."""
    a, b = a.to(tl.int16, bitcast=True).to(tl.int32), b.to(tl.int16, bitcast=True).to(tl.int32)
    return (a & 0xFFFF) | (b << 16)


@triton.jit
def _halves(pair):
    """The float16 of a word, in float32."""
    first = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    second = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def _to_float16(x):
    """Rows x [P, B] in float16, times a power of two for each that makes the largest 2 to 4; and the inverse of that.

    Nothing is lost but of numbers that are 2^-16 of the largest: float16 has more digits than bfloat16.
    """
    largest = tl.maximum(tl.max(tl.abs(x), 1), 1e-30)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 0.5
    return (x * (1.0 / power)[:, None]).to(tl.float16), power


@triton.jit
def _words_of(x, PAIR_APART: tl.constexpr):
    """Rows [P, B] in float16 -> two words of each four elements, int32 [P, 1, B / 4]: neighbours, or those apart."""
    PARTS: tl.constexpr = x.shape[0]
    WORDS: tl.constexpr = x.shape[1] // 4
    even, odd = tl.split(tl.reshape(x, (PARTS, WORDS, 2, 2)))
    if PAIR_APART:
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        low, high = _pair(first, third), _pair(second, fourth)
    else:
        low, high = tl.split(_pair(even, odd))
    return low[:, None, :], high[:, None, :]


@triton.jit
def _dot(words, low, high, zeros, FORM: tl.constexpr):
    """The sums of products of words of four codes, as pairs in float16."""
    if IS_INTERPRETED:
        pairs = tl.zeros(words.shape, tl.float32)  # their sums, in truth
        xs = _halves(low) + _halves(high)
        for index in tl.static_range(4):
            code = ((words >> (8 * index)) & 0xFF).to(tl.uint8)
            if FORM == "e4m3":
                number = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            else:
                number = code.to(tl.int8, bitcast=True).to(tl.float32) + 1152.0 - _halves(zeros)[0]
            pairs += number * xs[index]
    elif FORM == "e4m3":
        pairs = tl.inline_asm_elementwise(
            DOT_E4M3, "=r,r,r,r", [words, low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        pairs = tl.inline_asm_elementwise(
            DOT_INT8, "=r,r,r,r,r", [words, low, high, zeros], dtype=tl.int32, is_pure=True, pack=1
        )
    return pairs


@triton.jit
def _dot_int4(words, low, high, more_low, more_high, zeros):
    """The same of words of eight codes, of which the high halves of bytes belong to `more`."""
    if IS_INTERPRETED:
        pairs = tl.zeros(words.shape, tl.float32)  # their sums, in truth
        xs = _halves(low) + _halves(high) + _halves(more_low) + _halves(more_high)
        shifts = (0, 16, 8, 24, 4, 20, 12, 28)
        for index in tl.static_range(8):
            code = ((words >> shifts[index]) & 15).to(tl.float32)
            pairs += (code + 1024.0 - _halves(zeros)[0]) * xs[index]
    else:
        pairs = tl.inline_asm_elementwise(
            DOT_INT4,
            "=r,r,r,r,r,r,r",
            [words, low, high, more_low, more_high, zeros],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return pairs


@triton.jit
def _total(pairs):
    """The sums of pairs, float32."""
    if not IS_INTERPRETED:
        pairs = tl.inline_asm_elementwise(ADD_PAIR, "=f,r", [pairs], dtype=tl.float32, is_pure=True, pack=1)
    return pairs


@triton.jit
def _load_x(x_ptr, norm_ptr, k, mask):
    """Elements of x, float32 [P, B], times the norm's weight if there is one; and the sums of their squares [P]."""
    x = tl.load(x_ptr + k, mask=mask, other=0.0).to(tl.float32)
    squares = tl.sum(x * x, 1)
    if norm_ptr is not None:
        x *= tl.load(norm_ptr + k, mask=mask, other=0.0).to(tl.float32)
    return x, squares


@triton.jit
def _one_row_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    norm_ptr,
    eps,
    y_ptr,
    N,
    destination,
    K: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    FORM: tl.constexpr,
    GATE: tl.constexpr,
    ADDED: tl.constexpr,
    STORE: tl.constexpr,
    IS_LATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N features, by one program. Axis 0 of the tiles are PARTS parts of K, with one scale for each feature."""
    PER_WORD: tl.constexpr = 8 if FORM == "int4" else 4
    WORDS: tl.constexpr = BLOCK_K // PER_WORD
    STEP: tl.constexpr = PARTS * BLOCK_K
    HALF: tl.constexpr = BLOCK_K // 2
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (features < N)[None, :, None]
    if GATE is not None:  # a gate beside its up
        features = features // 2 + features % 2 * (N // 2)
    parts = tl.arange(0, PARTS)
    word = parts[:, None, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
    words_ptr += features.to(tl.int64)[None, :, None] * (K // PER_WORD) + word
    offs_s = (features // SCALE_ROWS * NUM_SCALES)[None, :, None]
    if FORM == "int4":  # the low halves of bytes, then the high ones
        run = tl.arange(0, HALF)
        k = parts[:, None] * BLOCK_K + (run // 16 * 32 + run % 16)[None, :]
    else:
        k = parts[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    next_words = tl.load(words_ptr, mask=mask_n & (word < K // PER_WORD), other=0)
    pdl_wait(PDL, LAUNCH=not IS_LATE)
    acc = tl.zeros((PARTS, BLOCK_N, WORDS), tl.float32)
    squares = tl.zeros((PARTS,), tl.float32)
    for start in tl.static_range(0, K, STEP):
        words = next_words
        if start + STEP < K:
            ahead = (start + STEP) // PER_WORD
            next_words = tl.load(words_ptr + ahead, mask=mask_n & (word < K // PER_WORD - ahead), other=0)
        column = ((start + parts * BLOCK_K) // SCALE_COLUMNS)[:, None, None]
        mask_s = mask_n & (column < NUM_SCALES)
        scales = tl.load(scales_ptr + offs_s + column, mask=mask_s, other=0.0).to(tl.float32)
        zeros = tl.full((PARTS, BLOCK_N, 1), 8.0 if FORM == "int4" else 0.0, tl.float32)
        if zeros_ptr is not None:
            zeros = tl.load(zeros_ptr + offs_s + column, mask=mask_s, other=0).to(tl.float32)
        zeros = (zeros + (1024.0 if FORM == "int4" else 1152.0)).to(tl.float16)
        x, sums = _load_x(x_ptr, norm_ptr, start + k, k < K - start)
        squares += sums
        if FORM == "int4":
            more_x, sums = _load_x(x_ptr, norm_ptr, start + k + 16, k < K - start)
            squares += sums
            x, power = _to_float16(tl.reshape(tl.join(x, more_x), (PARTS, BLOCK_K)))
            x, more_x = tl.split(tl.reshape(x, (PARTS, HALF, 2)))
            low, high = _words_of(x, PAIR_APART=True)
            more_low, more_high = _words_of(more_x, PAIR_APART=True)
            pairs = _dot_int4(words, low, high, more_low, more_high, _pair(zeros, zeros))
        else:
            x, power = _to_float16(x)
            low, high = _words_of(x, PAIR_APART=False)
            pairs = _dot(words, low, high, _pair(zeros, zeros), FORM)
        acc += _total(pairs) * (scales * power[:, None, None])
    if PDL and IS_LATE:
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.sum(tl.sum(acc, 2), 0)
    if norm_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    finish_rows(y[None, :], features, bias_ptr, y_ptr, 0, 1, N, destination, GATE, ADDED, STORE)


def takes_row(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether the kernel can compute x W^T: of one row in 16 bits, in words of which each has one scale."""
    return len(x) == 1 and x.dtype in (torch.bfloat16, torch.float16) and weight.shape[1] % 32 == 0


FORMS = {E4M3: "e4m3", torch.int8: "int8", torch.uint8: "int4"}


def launch_row(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Gate | None,
    is_added: bool,
    store: triton.JITFunction,
    destination: tuple | None,
) -> None:
    """`launch_linear` of one row in bfloat16 or float16 with a weight in few bits, columns in the order of x."""
    num_features, size = weight.shape
    tile = row_tile(size, weight.block[1])
    _one_row_kernel[(triton.cdiv(num_features, tile.block_n),)](
        x,
        weight.codes.view(torch.int32),
        weight.scales,
        weight.zeros,
        bias,
        norm,
        eps,
        y,
        num_features,
        destination,
        K=size,
        SCALE_ROWS=weight.block[0],
        SCALE_COLUMNS=weight.block[1],
        NUM_SCALES=weight.scales.size(1),
        FORM=FORMS[weight.codes.dtype],
        GATE=gate,
        ADDED=is_added,
        STORE=store,
        IS_LATE=weight.codes.nbytes >= 2 * LARGE_WEIGHT,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        PARTS=tile.parts,
        num_warps=tile.warps,
        **pdl_options(x.device),
    )
