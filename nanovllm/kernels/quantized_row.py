# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""`linear` with a weight in few bits, for one row, where the time goes into making numbers of codes.

At 4.4 TB/s a processor of an H200 gets 20 codes of 8 bits a cycle, or 40 of 4 bits, and has 128 lanes to convert and
to multiply them. So codes are read as words of 32 bits, become pairs of float16, which takes few instructions, and are
multiplied in pairs. A few products are added up in float16, whose error is small beside that of rounding x to
bfloat16, then they are added in float32. And programs stay for many features, as making pairs of x takes its time too.
"""

import torch
from torch import Tensor

from nanovllm.kernels import INTERPRETED, pdl_options, pdl_wait, tl, triton
from nanovllm.kernels.activation import Gate
from nanovllm.kernels.linear_rows import finish_rows
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.kernels.tuning import LARGE_WEIGHT, gpu_of, row_tile

IS_INTERPRETED = tl.constexpr(INTERPRETED)


def _dot_asm(num_x: int, declarations: str, codes: list[list[str]]) -> tl.constexpr:
    """PTX: of four words, $1 to $4, and pairs of x, $5 and on, with pairs of zeros behind them, the sum, float32 $0.

    codes: for each pair of x that belongs to a word, the instructions that make a pair of numbers, `pair`, of `word`.
    """
    lines = []
    for word in range(4):
        for index, instructions in enumerate(codes):
            lines += [line.format(word=f"${1 + word}", zeros=f"${5 + num_x}") for line in instructions]
            x = f"${5 + word * len(codes) + index}"
            is_first = word == index == 0
            lines.append(f"mul.rn.f16x2 sum, pair, {x};" if is_first else f"fma.rn.f16x2 sum, pair, {x}, sum;")
    body = " ".join(lines)
    total = "mov.b32 {first, second}, sum; cvt.f32.f16 a, first; cvt.f32.f16 b, second; add.f32 $0, a, b;"
    registers = ".reg .b16 first, second; .reg .b32 codes, pair, sum; .reg .f32 a, b;"
    return tl.constexpr("{ " + registers + declarations + body + total + " }")


DOT_E4M3 = _dot_asm(
    8,
    ".reg .b16 low, high;",
    [["mov.b32 {{low, high}}, {word};", "cvt.rn.f16x2.e4m3x2 pair, low;"], ["cvt.rn.f16x2.e4m3x2 pair, high;"]],
)
# In float16, 0x6400 is 1024, whose last bits count ones. What is subtracted is 1024 and the zero; int8 has 128 added.
DOT_INT8 = _dot_asm(
    8,
    "",
    [
        [
            "xor.b32 codes, {word}, 0x80808080;",
            "prmt.b32 pair, codes, 0x64646464, 0x4140;",
            "sub.rn.f16x2 pair, pair, {zeros};",
        ],
        ["prmt.b32 pair, codes, 0x64646464, 0x4342;", "sub.rn.f16x2 pair, pair, {zeros};"],
    ],
)
# A mask keeps four bits of a word and those 16 higher: the pairs of x are not of neighbours, but of those two apart.
DOT_INT4 = _dot_asm(
    16,
    "",
    [
        [
            f"shr.b32 codes, {{word}}, {shift};",
            "lop3.b32 pair, codes, 0x000f000f, 0x64006400, 0xea;",
            "sub.rn.f16x2 pair, pair, {zeros};",
        ]
        for shift in (0, 8, 4, 12)
    ],
)


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
def _split_words(x):
    """[..., 4] -> four tensors; a two-dimensional one."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first[None, :], second[None, :], third[None, :], fourth[None, :]


@triton.jit
def _low_and_high(x):
    """[1, 2 runs] -> two of [1, runs], of the low halves of bytes and of the high ones."""
    low, high = tl.split(tl.reshape(x, (x.shape[1] // 2, 2)))
    return low[None, :], high[None, :]


@triton.jit
def _pairs_of(x, FORM: tl.constexpr):
    """The elements of a row, float16 [K], as pairs in the order in which a run's codes meet them: int32 [1, runs].

    Of 8 bits, a run has four words of four codes: two pairs each. Of 4 bits, it has four words of eight codes: of the
    low halves of bytes two pairs, then of the high ones, which belong to the elements 16 behind.
    """
    if FORM == "int4":
        RUNS: tl.constexpr = x.shape[0] // 32
        even, odd = tl.split(tl.reshape(x, (RUNS * 2, 4, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        evens, odds = _split_words(_pair(first, third)), _split_words(_pair(second, fourth))
        e0, h0 = _low_and_high(evens[0])
        e1, h1 = _low_and_high(evens[1])
        e2, h2 = _low_and_high(evens[2])
        e3, h3 = _low_and_high(evens[3])
        o0, i0 = _low_and_high(odds[0])
        o1, i1 = _low_and_high(odds[1])
        o2, i2 = _low_and_high(odds[2])
        o3, i3 = _low_and_high(odds[3])
        pairs = (e0, o0, h0, i0, e1, o1, h1, i1, e2, o2, h2, i2, e3, o3, h3, i3)
    else:
        RUNS: tl.constexpr = x.shape[0] // 16
        even, odd = tl.split(tl.reshape(x, (RUNS, 4, 2, 2)))
        first, second = tl.split(_pair(even, odd))
        f0, f1, f2, f3 = _split_words(first)
        s0, s1, s2, s3 = _split_words(second)
        pairs = (f0, s0, f1, s1, f2, s2, f3, s3)
    return pairs


@triton.jit
def _number(word, index: tl.constexpr, FORM: tl.constexpr):
    """In the interpreter: the number of a word's code."""
    if FORM == "int4":
        number = ((word >> (4 * index)) & 15).to(tl.float32)
    elif FORM == "int8":
        number = ((word >> (8 * index)) & 0xFF).to(tl.int8).to(tl.float32)
    else:
        number = ((word >> (8 * index)) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return number


@triton.jit
def _multiply(words, pairs, zeros, FORM: tl.constexpr):
    """Runs of codes, words [BLOCK_N, RUNS, 4], times those of x: float32 [BLOCK_N, RUNS].

    zeros: int32 [BLOCK_N, RUNS or 1], pairs in float16 of what the asm subtracts.
    """
    BLOCK_N: tl.constexpr = words.shape[0]
    RUNS: tl.constexpr = words.shape[1]
    even, odd = tl.split(tl.reshape(words, (BLOCK_N, RUNS, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    if IS_INTERPRETED:
        numbers = (w0, w1, w2, w3)
        PER_WORD: tl.constexpr = 8 if FORM == "int4" else 4
        OFFSET: tl.constexpr = 1024.0 if FORM == "int4" else 1152.0
        total = tl.zeros((BLOCK_N, RUNS), tl.float32)
        zero = tl.zeros((1, 1), tl.float32) if FORM == "e4m3" else _halves(zeros)[0] - OFFSET
        for word in tl.static_range(4):
            for index in tl.static_range(PER_WORD):
                if FORM == "int4":  # byte index // 2; its low half, then its high one
                    pair = _halves(pairs[4 * word + index % 2 * 2 + index // 2 % 2])[index // 4]
                else:
                    pair = _halves(pairs[2 * word + index // 2])[index % 2]
                total += (_number(numbers[word], index, FORM) - zero) * pair
    elif FORM == "e4m3":
        p0, p1, p2, p3, p4, p5, p6, p7 = pairs
        total = tl.inline_asm_elementwise(
            DOT_E4M3,
            "=f,r,r,r,r,r,r,r,r,r,r,r,r",
            [w0, w1, w2, w3, p0, p1, p2, p3, p4, p5, p6, p7],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    elif FORM == "int8":
        p0, p1, p2, p3, p4, p5, p6, p7 = pairs
        total = tl.inline_asm_elementwise(
            DOT_INT8,
            "=f,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [w0, w1, w2, w3, p0, p1, p2, p3, p4, p5, p6, p7, zeros],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15 = pairs
        total = tl.inline_asm_elementwise(
            DOT_INT4,
            "=f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [w0, w1, w2, w3, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, zeros],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return total


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
    PDL: tl.constexpr,
):
    """BLOCK_N features at a time of all of x. A run are the 16 bytes of codes that a thread loads at once."""
    PER_RUN: tl.constexpr = 32 if FORM == "int4" else 16
    RUNS: tl.constexpr = triton.next_power_of_2(triton.cdiv(K, PER_RUN))
    ROW_WORDS: tl.constexpr = K // PER_RUN * 4
    runs = tl.arange(0, RUNS)
    n = tl.arange(0, BLOCK_N)
    mask_runs = (runs < K // PER_RUN)[None, :]
    run_words = runs[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    blocks = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0)
    features = _features(block * BLOCK_N + n, N, GATE)
    mask = (block * BLOCK_N + n < N)[:, None] & mask_runs
    words = tl.load(words_ptr + features[:, None, None] * ROW_WORDS + run_words, mask=mask[:, :, None], other=0)
    pdl_wait(PDL, LAUNCH=not IS_LATE)
    k = tl.arange(0, RUNS * PER_RUN)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        rstd = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
        x *= tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), 0), 1e-30)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 0.5
    pairs = _pairs_of((x * (1.0 / power)).to(tl.float16), FORM)
    if norm_ptr is not None:
        power *= rstd
    columns = (runs * PER_RUN // SCALE_COLUMNS)[None, :]
    OFFSET: tl.constexpr = 1024.0 if FORM == "int4" else 1152.0
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=1):
        ahead = (block + tl.num_programs(0)) * BLOCK_N + n
        next_features = _features(ahead, N, GATE)
        next_mask = (ahead < N)[:, None] & mask_runs
        next_words = tl.load(
            words_ptr + next_features[:, None, None] * ROW_WORDS + run_words, mask=next_mask[:, :, None], other=0
        )
        offs_s = (features // SCALE_ROWS * NUM_SCALES)[:, None]
        mask_n = (block * BLOCK_N + n < N)[:, None]
        if NUM_SCALES > 1:
            offs_s += columns
            mask_n = mask
        scales = tl.load(scales_ptr + offs_s, mask=mask_n, other=0.0).to(tl.float32)
        zeros = tl.full(offs_s.shape, 8.0 if FORM == "int4" else 0.0, tl.float32)
        if zeros_ptr is not None:
            zeros = tl.load(zeros_ptr + offs_s, mask=mask_n, other=0).to(tl.float32)
        zeros = (zeros + OFFSET).to(tl.float16)
        total = _multiply(words, pairs, _pair(zeros, zeros), FORM)
        if NUM_SCALES > 1:
            total *= scales
        y = tl.sum(total, 1)
        if NUM_SCALES == 1:
            y *= tl.reshape(scales, (BLOCK_N,))
        y = (y * power)[None, :]
        finish_rows(y, block, features, bias_ptr, y_ptr, 0, 1, N, destination, GATE, ADDED, STORE)
        words, features, mask = next_words, next_features, next_mask
    if PDL and IS_LATE:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _features(n, N, GATE: tl.constexpr):
    """The features of columns n: with a gate, one beside its up."""
    if GATE is not None:
        n = n // 2 + n % 2 * (N // 2)
    return n.to(tl.int64)


def takes_row(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether the kernel can compute x W^T: one row in 16 bits, and runs that are whole and have one scale."""
    codes_of_run = 128 // weight.bits
    is_whole = weight.shape[1] % codes_of_run == 0 and weight.block[1] % codes_of_run == 0
    return len(x) == 1 and x.dtype in (torch.bfloat16, torch.float16) and is_whole


FORMS = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8", torch.uint8: "int4"}


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
    tile = row_tile(num_features, weight.codes.size(1), gpu_of(x.device))
    _one_row_kernel[(tile.num_programs,)](
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
        num_warps=tile.warps,
        **pdl_options(x.device),
    )
