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
from nanovllm.kernels.linear_rows import finish_rows, load_addends
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.kernels.tuning import LARGE_WEIGHT_BYTES, row_tile

IS_INTERPRETED = tl.constexpr(INTERPRETED)


def _dot_asm(pairs_of_word: list[str], in_float16: bool) -> tl.constexpr:
    """PTX: a run's four words, $1 to $4, times the pairs of x, $5 and on: the sum, in float32, $0.

    pairs_of_word: for each pair of a word, the instructions that make `pair` of `{word}`.
    in_float16: the products of eight pairs are added up in float16, before they are in float32.
    """
    lines = [] if in_float16 else ["mov.f32 $0, 0f00000000;"]
    for index in range(4 * len(pairs_of_word)):
        word, x = f"${1 + index // len(pairs_of_word)}", f"${5 + index}"
        lines.append(pairs_of_word[index % len(pairs_of_word)].format(word=word))
        if not in_float16:
            lines += UNPACK.format(pair="pair", first="a", second="b"), UNPACK.format(pair=x, first="c", second="d")
            lines.append("fma.rn.f32 $0, a, c, $0; fma.rn.f32 $0, b, d, $0;")
        elif index % 8 == 0:
            lines.append(f"mul.rn.f16x2 sum, pair, {x};")
        else:
            lines.append(f"fma.rn.f16x2 sum, pair, {x}, sum;")
        if in_float16 and index % 8 == 7:
            lines.append(UNPACK.format(pair="sum", first="a", second="b"))
            lines.append("add.f32 $0, a, b;" if index == 7 else "add.f32 a, a, b; add.f32 $0, $0, a;")
    registers = ".reg .b16 low, high, even, odd; .reg .b32 codes, pair, sum; .reg .f32 a, b, c, d;"
    return tl.constexpr("{ " + registers + " ".join(lines) + " }")


UNPACK = "mov.b32 {{even, odd}}, {pair}; cvt.f32.f16 {first}, even; cvt.f32.f16 {second}, odd; "
# A pair of neighbours.
E4M3_PAIRS = ["mov.b32 {{low, high}}, {word}; cvt.rn.f16x2.e4m3x2 pair, low;", "cvt.rn.f16x2.e4m3x2 pair, high;"]
# A mask leaves bytes 0 and 2, or 1 and 3. As float16, which has subnormal numbers, they count units of 2^-24.
INT8_PAIRS = [
    "xor.b32 codes, {word}, 0x80808080; and.b32 pair, codes, 0x00ff00ff;",
    "shr.u32 codes, codes, 8; and.b32 pair, codes, 0x00ff00ff;",
]
# The same of halves of bytes, of which the high ones count units of 2^-20.
INT4_PAIRS = [
    "and.b32 pair, {word}, 0x000f000f;",
    "and.b32 pair, {word}, 0x00f000f0;",
    "shr.u32 codes, {word}, 8; and.b32 pair, codes, 0x000f000f;",
    "and.b32 pair, codes, 0x00f000f0;",
]
DOT_E4M3, DOT_E4M3_EXACTLY = _dot_asm(E4M3_PAIRS, True), _dot_asm(E4M3_PAIRS, False)
DOT_INT8, DOT_INT8_EXACTLY = _dot_asm(INT8_PAIRS, True), _dot_asm(INT8_PAIRS, False)
DOT_INT4, DOT_INT4_EXACTLY = _dot_asm(INT4_PAIRS, True), _dot_asm(INT4_PAIRS, False)
ADD_HALVES = tl.constexpr(
    "{ .reg .b16 even, odd; .reg .f32 a, b; " + UNPACK.format(pair="$1", first="a", second="b") + "add.f32 $0, a, b; }"
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
def _add_halves(pair):
    """The sum of a word's two float16, float32."""
    if IS_INTERPRETED:
        first, second = _halves(pair)
        total = first + second
    else:
        total = tl.inline_asm_elementwise(ADD_HALVES, "=f,r", [pair], dtype=tl.float32, is_pure=True, pack=1)
    return total


@triton.jit
def _split_parts(words):
    """[RUNS, 2 or 4] -> that many of [RUNS, 1]."""
    if words.shape[1] == 2:
        first, second = tl.split(words)
        parts = (first[:, None], second[:, None])
    else:
        even, odd = tl.split(tl.reshape(words, (words.shape[0], 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        parts = (first[:, None], second[:, None], third[:, None], fourth[:, None])
    return parts


@triton.jit
def _pairs_of(x, FORM: tl.constexpr):
    """Runs of x, float32 [RUNS, PARTS, 8]: the pairs that `_multiply` takes, in the order in which it meets codes.

    Also float32 [RUNS, 1]: what a product is worth, and the sums of x, as products with codes of 1. Elements are
    divided by a power of two, so that the largest is within what float16 has; nothing is lost but of numbers that are
    2^-16 of it, as float16 has more digits than bfloat16.
    """
    RUNS: tl.constexpr = x.shape[0]
    PARTS: tl.constexpr = x.shape[1]
    LARGEST: tl.constexpr = 2.0 if FORM == "e4m3" else 16384.0  # to less than twice that
    ONE: tl.constexpr = 1.0 if FORM == "e4m3" else 1.0 / 16777216.0  # what a code of 1 is in float16
    largest = tl.maximum(tl.max(tl.max(tl.abs(x), 2), 1), 1e-30)[:, None]
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    worth = exponent.to(tl.float32, bitcast=True) / (LARGEST * ONE)
    x *= (LARGEST * (0x7F000000 - exponent).to(tl.float32, bitcast=True))[:, :, None]
    of_part = tl.full((1, PARTS, 1), 1.0, tl.float32)
    if FORM == "int4":  # in the high halves of bytes, those of the last two parts, a code of 1 is 16 times as much
        of_part = tl.where(tl.arange(0, PARTS) < 2, 1.0, 16.0)[None, :, None]
        x /= of_part
    even, odd = tl.split(tl.reshape(x, (RUNS, PARTS, 2, 2, 2)))
    if FORM == "e4m3":  # neighbours
        first, second = tl.split(_pair(even, odd))
    else:
        e0, e2 = tl.split(even)
        o1, o3 = tl.split(odd)
        first, second = _pair(e0, e2), _pair(o1, o3)
    sums = tl.sum(tl.sum((_add_halves(first) + _add_halves(second)) * of_part, 2), 1)[:, None] * ONE
    f0, f1 = tl.split(first)
    s0, s1 = tl.split(second)
    f0, f1, s0, s1 = _split_parts(f0), _split_parts(f1), _split_parts(s0), _split_parts(s1)
    if FORM == "int4":
        first_words = (f0[0], f0[2], s0[0], s0[2], f1[0], f1[2], s1[0], s1[2])
        last_words = (f0[1], f0[3], s0[1], s0[3], f1[1], f1[3], s1[1], s1[3])
        pairs = first_words + last_words
    else:
        pairs = (f0[0], s0[0], f1[0], s1[0], f0[1], s0[1], f1[1], s1[1])
    return pairs, worth, sums


@triton.jit
def _code(word, index: tl.constexpr, FORM: tl.constexpr):
    """In the interpreter: the number that the PTX makes of a word's code."""
    if FORM == "int4":  # of the byte index // 2 the low half, then the high one
        code = ((word >> (4 * index)) & 15).to(tl.float32) * (1.0 if index % 2 else 1.0 / 16.0) / 1048576.0
    elif FORM == "int8":
        code = (((word >> (8 * index)) & 0xFF) ^ 0x80).to(tl.float32) / 16777216.0
    else:
        code = ((word >> (8 * index)) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return code


@triton.jit
def _multiply(words, pairs, FORM: tl.constexpr, ASM: tl.constexpr):
    """Runs of codes, words [RUNS, BLOCK_N, 4], times those of x: float32 [RUNS, BLOCK_N]."""
    RUNS: tl.constexpr = words.shape[0]
    BLOCK_N: tl.constexpr = words.shape[1]
    even, odd = tl.split(tl.reshape(words, (RUNS, BLOCK_N, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    if IS_INTERPRETED:
        numbers = (w0, w1, w2, w3)
        total = tl.zeros((RUNS, BLOCK_N), tl.float32)
        for word in tl.static_range(4):
            for index in tl.static_range(8 if FORM == "int4" else 4):
                if FORM == "int4":
                    pair = _halves(pairs[4 * word + index // 2 % 2 * 2 + index % 2])[index // 4]
                elif FORM == "int8":
                    pair = _halves(pairs[2 * word + index % 2])[index // 2]
                else:
                    pair = _halves(pairs[2 * word + index // 2])[index % 2]
                total += _code(numbers[word], index, FORM) * pair
    else:
        CONSTRAINTS: tl.constexpr = "=f,r,r,r,r" + ",r" * len(pairs)
        operands = (w0, w1, w2, w3) + pairs  # noqa: RUF005 (no unpacking in Triton)
        total = tl.inline_asm_elementwise(ASM, CONSTRAINTS, operands, dtype=tl.float32, is_pure=True, pack=1)
    return total


@triton.jit
def _load_values(
    ptr, features, run, mask, SCALE_ROWS: tl.constexpr, SCALE_RUNS: tl.constexpr, NUM_SCALES: tl.constexpr
):
    """A scale or zero of each run and feature, float32 [RUNS, BLOCK_N], or [1, BLOCK_N] where a row has one."""
    offs = (features // SCALE_ROWS * NUM_SCALES)[None, :]
    if NUM_SCALES > 1:
        offs += (run // SCALE_RUNS)[:, None]
        values = tl.load(ptr + offs, mask=mask, other=0)
    else:
        values = tl.load(ptr + offs)
    return values.to(tl.float32)


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
    ASM: tl.constexpr,
    GATE: tl.constexpr,
    ADDED: tl.constexpr,
    STORE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    RUNS: tl.constexpr,
    IS_LATE: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCKS times BLOCK_N features, by one program, RUNS runs of codes at a time: all of a row if BLOCKS is not 1."""
    PER_RUN: tl.constexpr = 32 if FORM == "int4" else 16
    NUM_RUNS: tl.constexpr = K // PER_RUN
    SCALE_RUNS: tl.constexpr = SCALE_COLUMNS // PER_RUN
    tl.static_assert(BLOCKS == 1 or RUNS >= NUM_RUNS)
    runs = tl.arange(0, RUNS)
    k = runs[:, None, None] * PER_RUN + tl.arange(0, PER_RUN // 8)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    words_ptr += runs[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    first = tl.program_id(0) * BLOCKS
    features = _features(first, N, BLOCK_N, GATE, IS_RAGGED)
    row_ptr = words_ptr + features.to(tl.int64)[None, :, None] * (4 * NUM_RUNS)
    words = tl.load(row_ptr, mask=(runs < NUM_RUNS)[:, None, None], other=0)
    squares = tl.zeros((RUNS,), tl.float32)
    for block in tl.static_range(BLOCKS):
        acc = tl.zeros((RUNS, BLOCK_N), tl.float32)
        for start in tl.static_range(0, NUM_RUNS, RUNS):
            mask = runs < NUM_RUNS - start
            if block == 0:
                if norm_ptr is not None:
                    norm = tl.load(norm_ptr + start * PER_RUN + k, mask=mask[:, None, None], other=0.0)
                if start == 0:
                    pdl_wait(PDL, LAUNCH=not IS_LATE)
            if start == 0:
                addends = load_addends(first + block, features, bias_ptr, y_ptr, 0, 1, N, 1, GATE, ADDED)
            if block == 0:
                x = tl.load(x_ptr + start * PER_RUN + k, mask=mask[:, None, None], other=0.0).to(tl.float32)
                if norm_ptr is not None:
                    squares += tl.sum(tl.sum(x * x, 2), 1)
                    x *= norm.to(tl.float32)
                pairs, worth, sums = _pairs_of(x, FORM)
            mask = mask[:, None]
            scales = _load_values(scales_ptr, features, start + runs, mask, SCALE_ROWS, SCALE_RUNS, NUM_SCALES)
            total = _multiply(words, pairs, FORM, ASM)
            if FORM != "e4m3":  # the PTX takes codes as unsigned
                zero = 8.0 if FORM == "int4" else 128.0
                if zeros_ptr is not None:
                    zeros = _load_values(zeros_ptr, features, start + runs, mask, SCALE_ROWS, SCALE_RUNS, NUM_SCALES)
                    zero = zeros if FORM == "int4" else zeros + 128.0
                total -= zero * sums
            acc += total * (scales * worth)
            if start + RUNS < NUM_RUNS:
                left = (runs < NUM_RUNS - start - RUNS)[:, None, None]
                words = tl.load(row_ptr + (start + RUNS) * 4, mask=left, other=0)
        if block + 1 < BLOCKS:
            features = _features(first + block + 1, N, BLOCK_N, GATE, IS_RAGGED)
            row_ptr = words_ptr + features.to(tl.int64)[None, :, None] * (4 * NUM_RUNS)
            words = tl.load(row_ptr, mask=(runs < NUM_RUNS)[:, None, None], other=0)
        elif PDL and IS_LATE:
            tl.extra.cuda.gdc_launch_dependents()
        y = tl.sum(acc, 0)
        if norm_ptr is not None:
            y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
        finish_rows(y[None, :], addends, first + block, y_ptr, 0, 1, N, destination, GATE, STORE)


@triton.jit
def _features(block, N, BLOCK_N: tl.constexpr, GATE: tl.constexpr, IS_RAGGED: tl.constexpr):
    """The features of a block, [BLOCK_N]: with a gate, gates beside their ups; behind the last one, that again."""
    features = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if IS_RAGGED:
        features = tl.minimum(features, N - 1)
    if GATE is not None:
        features = features // 2 + features % 2 * (N // 2)
    return features


def takes_row(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether the kernel can compute x W^T: of one row in 16 bits, and of whole runs that have one scale each."""
    run = 128 // weight.bits
    is_whole = weight.shape[1] % run == 0 and weight.block[1] % run == 0
    return len(x) == 1 and x.dtype in (torch.bfloat16, torch.float16) and is_whole


# By the codes' dtype: the form, and the PTX for rows in bfloat16 and in float16, which shows any rounding.
FORMS = {
    E4M3: ("e4m3", DOT_E4M3, DOT_E4M3_EXACTLY),
    torch.int8: ("int8", DOT_INT8, DOT_INT8_EXACTLY),
    torch.uint8: ("int4", DOT_INT4, DOT_INT4_EXACTLY),
}


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
    form, fast, exact = FORMS[weight.codes.dtype]
    tile = row_tile(num_features, weight.codes.size(1), weight.bits)
    _one_row_kernel[(triton.cdiv(num_features, tile.blocks * tile.block_n),)](
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
        FORM=form,
        ASM=fast if x.dtype == torch.bfloat16 else exact,
        GATE=gate,
        ADDED=is_added,
        STORE=store,
        BLOCKS=tile.blocks,
        BLOCK_N=tile.block_n,
        IS_RAGGED=num_features % (tile.blocks * tile.block_n) != 0,
        RUNS=tile.runs,
        IS_LATE=weight.codes.nbytes >= LARGE_WEIGHT_BYTES,
        num_warps=tile.warps,
        **pdl_options(x.device),
    )
