# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""`linear` with a weight in few bits, for one row, where the time goes into making numbers of codes.

At 4.4 TB/s a processor of an H200 gets 20 codes of 8 bits a cycle, or 40 of 4 bits, and has 128 lanes to convert and
to multiply them. So a thread takes a run of 16 bytes, makes pairs of float16 of it, which takes few instructions, and
multiplies pairs. The products of a run are added up in float16, whose error is small beside that of rounding x to
bfloat16, and runs in float32.
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


def _dot_asm(num_pairs: int, registers: str, pairs_of_word: list[str]) -> tl.constexpr:
    """PTX: a run's four words, $1 to $4, times the pairs of x, $5 and on: the sum, in float32, $0.

    pairs_of_word: for each pair of a word, the instructions that make `pair` of `{word}`. Behind the pairs of x is one
    that they may subtract, `{zeros}`.
    """
    lines = ["mov.b32 sum, 0;"]
    for word in range(4):
        for index, instructions in enumerate(pairs_of_word):
            x = 5 + word * len(pairs_of_word) + index
            lines.append(instructions.format(word=f"${1 + word}", zeros=f"${5 + num_pairs}"))
            lines.append(f"fma.rn.f16x2 sum, pair, ${x}, sum;")
    lines.append("mov.b32 {first, second}, sum; cvt.f32.f16 a, first; cvt.f32.f16 b, second; add.f32 $0, a, b;")
    declared = f".reg .b16 first, second; .reg .b32 codes, pair, sum; .reg .f32 a, b; {registers}"
    return tl.constexpr("{ " + declared + " ".join(lines) + " }")


DOT_E4M3 = _dot_asm(
    8,
    ".reg .b16 low, high;",
    ["mov.b32 {{low, high}}, {word}; cvt.rn.f16x2.e4m3x2 pair, low;", "cvt.rn.f16x2.e4m3x2 pair, high;"],
)
# In float16, 0x6400 is 1024, whose last bits count ones; to int8 128 is added first. All that goes with `zeros`.
DOT_INT8 = _dot_asm(
    8,
    "",
    [
        "xor.b32 codes, {word}, 0x80808080; prmt.b32 pair, codes, 0x64646464, 0x4140; "
        "sub.rn.f16x2 pair, pair, {zeros};",
        "prmt.b32 pair, codes, 0x64646464, 0x4342; sub.rn.f16x2 pair, pair, {zeros};",
    ],
)
# One mask keeps four bits and those 16 higher: bytes 0 and 2 of a word, 1 and 3, and the high halves of the same.
DOT_INT4 = _dot_asm(
    16,
    "",
    [
        f"shr.b32 codes, {{word}}, {shift}; lop3.b32 pair, codes, 0x000f000f, 0x64006400, 0xea; "
        "sub.rn.f16x2 pair, pair, {zeros};"
        for shift in (0, 8, 4, 12)
    ],
)


@triton.jit
def _pair(a, b):
    """Two float32 as float16 in a word."""
    if IS_INTERPRETED:
        low = a.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word = low | (b.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        word = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    return word


@triton.jit
def _halves(pair):
    """In the interpreter: the numbers of a word."""
    first = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    second = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def _pairs_of(x, ARE_NEIGHBOURS: tl.constexpr):
    """Eight elements each, float32 [RUNS, 8] -> four words of [RUNS, 1], two for four elements.

    Of four, the first two elements are in one word and the others in the next; else the first and third, and the rest.
    """
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2, 2)))
    if ARE_NEIGHBOURS:
        first, second = tl.split(_pair(even, odd))
    else:
        e0, e2 = tl.split(even)
        o1, o3 = tl.split(odd)
        first, second = _pair(e0, e2), _pair(o1, o3)
    f0, f1 = tl.split(first)
    s0, s1 = tl.split(second)
    return f0[:, None], s0[:, None], f1[:, None], s1[:, None]


@triton.jit
def _load_eight(x_ptr, norm_ptr, k, mask):
    """Elements k + 0..7 of x, float32 [RUNS, 8], times the norm's weight if there is one, and their squares [RUNS]."""
    k = k[:, None] + tl.arange(0, 8)[None, :]
    x = tl.load(x_ptr + k, mask=mask[:, None], other=0.0).to(tl.float32)
    squares = tl.sum(x * x, 1)
    if norm_ptr is not None:
        x *= tl.load(norm_ptr + k, mask=mask[:, None], other=0.0).to(tl.float32)
    return x, squares


@triton.jit
def _load_runs(x_ptr, norm_ptr, k, mask, FORM: tl.constexpr):
    """Runs of x that begin at k [RUNS], as pairs in the order in which `_multiply` meets a run's codes.

    Also float32 [RUNS]: a power of two by which they were divided, so that the largest is 2 to 4 (nothing is lost but
    of numbers that are 2^-16 of it: float16 has more digits than bfloat16), and the sums of their squares before the
    norm's weight.
    """
    a, squares = _load_eight(x_ptr, norm_ptr, k, mask)
    b, sums = _load_eight(x_ptr, norm_ptr, k + 8, mask)
    squares += sums
    largest = tl.maximum(tl.abs(a), tl.abs(b))
    if FORM == "int4":
        c, sums = _load_eight(x_ptr, norm_ptr, k + 16, mask)
        squares += sums
        d, sums = _load_eight(x_ptr, norm_ptr, k + 24, mask)
        squares += sums
        largest = tl.maximum(largest, tl.maximum(tl.abs(c), tl.abs(d)))
    largest = tl.maximum(tl.max(largest, 1), 1e-30)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 0.5
    inverse = (1.0 / power)[:, None]
    if FORM == "int4":  # a word has four elements and, in the high halves of its bytes, those 16 behind them
        l0, l1, l2, l3 = _pairs_of(a * inverse, ARE_NEIGHBOURS=False)
        l4, l5, l6, l7 = _pairs_of(b * inverse, ARE_NEIGHBOURS=False)
        h0, h1, h2, h3 = _pairs_of(c * inverse, ARE_NEIGHBOURS=False)
        h4, h5, h6, h7 = _pairs_of(d * inverse, ARE_NEIGHBOURS=False)
        pairs = (l0, l1, h0, h1, l2, l3, h2, h3, l4, l5, h4, h5, l6, l7, h6, h7)
    else:
        p0, p1, p2, p3 = _pairs_of(a * inverse, ARE_NEIGHBOURS=True)
        p4, p5, p6, p7 = _pairs_of(b * inverse, ARE_NEIGHBOURS=True)
        pairs = (p0, p1, p2, p3, p4, p5, p6, p7)
    return pairs, power, squares


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
    """Runs of codes, words [RUNS, BLOCK_N, 4], times those of x: float32 [RUNS, BLOCK_N].

    zeros: int32 [RUNS or 1, BLOCK_N or 1], pairs in float16 of what the asm subtracts.
    """
    RUNS: tl.constexpr = words.shape[0]
    BLOCK_N: tl.constexpr = words.shape[1]
    even, odd = tl.split(tl.reshape(words, (RUNS, BLOCK_N, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    if IS_INTERPRETED:
        numbers = (w0, w1, w2, w3)
        PER_WORD: tl.constexpr = 8 if FORM == "int4" else 4
        OFFSET: tl.constexpr = 1024.0 if FORM == "int4" else 1152.0
        total = tl.zeros((RUNS, BLOCK_N), tl.float32)
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
def _load_values(
    ptr, features, run, mask, SCALE_ROWS: tl.constexpr, SCALE_RUNS: tl.constexpr, NUM_SCALES: tl.constexpr
):
    """A scale or zero of each run and feature, float32 [RUNS, BLOCK_N], or [1, BLOCK_N] where a row has one."""
    offs = (features // SCALE_ROWS * NUM_SCALES)[None, :]
    if NUM_SCALES > 1:
        offs += (run // SCALE_RUNS)[:, None]
    else:
        mask = features[None, :] >= 0
    return tl.load(ptr + offs, mask=mask, other=0).to(tl.float32)


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
    RUNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N features, by one program, RUNS runs of codes at a time."""
    PER_RUN: tl.constexpr = 32 if FORM == "int4" else 16
    NUM_RUNS: tl.constexpr = K // PER_RUN
    SCALE_RUNS: tl.constexpr = SCALE_COLUMNS // PER_RUN
    OFFSET: tl.constexpr = 1024.0 if FORM == "int4" else 1152.0
    n = tl.arange(0, BLOCK_N)
    features = tl.program_id(0) * BLOCK_N + n
    mask_n = (features < N)[None, :]
    if GATE is not None:  # a gate beside its up
        features = features // 2 + features % 2 * (N // 2)
    runs = tl.arange(0, RUNS)
    words_ptr += features.to(tl.int64)[None, :, None] * (4 * NUM_RUNS)
    words_ptr += runs[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    next_words = tl.load(words_ptr, mask=(mask_n & (runs < NUM_RUNS)[:, None])[:, :, None], other=0)
    pdl_wait(PDL, LAUNCH=not IS_LATE)
    acc = tl.zeros((RUNS, BLOCK_N), tl.float32)
    squares = tl.zeros((RUNS,), tl.float32)
    for start in tl.static_range(0, NUM_RUNS, RUNS):
        words = next_words
        mask_r = runs < NUM_RUNS - start
        if start + RUNS < NUM_RUNS:
            left = (runs < NUM_RUNS - start - RUNS)[:, None]
            next_words = tl.load(words_ptr + (start + RUNS) * 4, mask=(mask_n & left)[:, :, None], other=0)
        mask = mask_n & mask_r[:, None]
        scales = _load_values(scales_ptr, features, start + runs, mask, SCALE_ROWS, SCALE_RUNS, NUM_SCALES)
        zeros = tl.full((1, 1), 8.0 if FORM == "int4" else 0.0, tl.float32)
        if zeros_ptr is not None:
            zeros = _load_values(zeros_ptr, features, start + runs, mask, SCALE_ROWS, SCALE_RUNS, NUM_SCALES)
        pairs, power, sums = _load_runs(x_ptr, norm_ptr, (start + runs) * PER_RUN, mask_r, FORM)
        squares += sums
        zeros += OFFSET
        acc += _multiply(words, pairs, _pair(zeros, zeros), FORM) * (scales * power[:, None])
    if PDL and IS_LATE:
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.sum(acc, 0)
    if norm_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    finish_rows(y[None, :], features, bias_ptr, y_ptr, 0, 1, N, destination, GATE, ADDED, STORE)


def takes_row(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether the kernel can compute x W^T: of one row in 16 bits, and of whole runs that have one scale each."""
    run = 128 // weight.bits
    is_whole = weight.shape[1] % run == 0 and weight.block[1] % run == 0
    return len(x) == 1 and x.dtype in (torch.bfloat16, torch.float16) and is_whole


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
    tile = row_tile(weight.codes.size(1))
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
        RUNS=tile.runs,
        num_warps=tile.warps,
        **pdl_options(x.device),
    )
