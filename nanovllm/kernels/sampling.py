# ruff: noqa: ANN001, ANN201, ANN202 (Triton types the arguments of its kernels itself)
"""Sampling of the next tokens, the fast way. `sampling_torch.py` explains it, and says the same in plain torch.

Filters without a sort: each (min-p, top-k, top-p) keeps the tokens whose logit reaches a threshold, so it is enough to
find the largest threshold that still keeps k tokens (top-k) or a share p of the mass (top-p), by bisection on the bits
of the float. Tokens that tie at a threshold stay together. A kernel of its own, so that few rows fill the GPU too,
deals a row out to SPLITS * LANES lanes, which note their two best logits. The bisection holds those in registers: they
are all that reaches a threshold above every lane's third best, so that it seldom reads the row again.

A draw in one pass: argmax(logits / temperature + noise). Several programs read a row, and each offers its best token
as one number, made by `pack_draw`. The largest wins, among the programs of a row as among the ranks that hold parts of
the vocabulary.

The functions take CUDA tensors, or any in Triton's interpreter. What torch and Triton must do alike bit for bit, the
hash and the packed form of a draw, is written once, here.
"""

import torch
from torch import Tensor

from nanovllm.kernels import INTERPRETED, tl, triton

IS_INTERPRETED = tl.constexpr(INTERPRETED)

# Tuned on an H200 with 151,936 bfloat16 logits a row, 1 to 256 rows.
SPLITS = tl.constexpr(8)  # programs that look for a row's best logits
LANES = tl.constexpr(1024)  # of each of them
BEST_WARPS = 8
SEARCH_BLOCK = tl.constexpr(4096)  # logits that the bisection reads at once
SEARCH_WARPS = 16
DRAW_BLOCK = tl.constexpr(2048)  # logits that a program of the draw reads at once
DRAW_WARPS = 8


def draw_part(batch_size: int) -> int:
    """Logits of one program of the draw: of few rows few, to have many programs. One row: 4 us, else 14."""
    return DRAW_BLOCK.value if batch_size <= 8 else 8 * DRAW_BLOCK.value


# Numbers of float32.
LOWEST = tl.constexpr(-3.0e38)  # finite, so that differences to it are numbers
SMALLEST_NORMAL = tl.constexpr(1.1754944e-38)
LARGEST_BELOW_1 = tl.constexpr(0.99999994)
TWO_TO_MINUS_32 = tl.constexpr(2.3283064365386963e-10)
LOG2_E = tl.constexpr(1.442695)
LN_2 = tl.constexpr(0.6931472)
MINUS_LN_LN_2 = tl.constexpr(0.36651292)


# ---- what torch and Triton share: each function for tensors, and under the name with `_jit` inside kernels ----------
# Their constants are defaults of arguments, since a function of Triton's sees no plain number outside of it.

LOW_32_BITS = 0xFFFFFFFF
LAST_ID = 0x7FFFFFFF  # behind all token ids, which have 31 bits
INFINITE_ORDER = 0x7F800000  # the order of infinity; that of minus infinity is -INFINITE_ORDER - 1


def flip(bits):
    """The bits of a float32, as a signed number, to one that orders as the floats do, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def hash32(x):
    """Mixes 32-bit numbers, a tensor's in int64 or a kernel's in uint32 (constants of C. Wellons' "lowbias32")."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def pack_draw(order, token_ids, LAST_ID: tl.constexpr = LAST_ID):
    """A token and the order (`flip`) of its score, both int64, in one int64.

    The larger one has the better score or, among equals, the lower id, so that a maximum decides a draw. The id takes
    31 of the lower 32 bits: no result is -1, which `max_over_ranks` cannot send.
    """
    return (order << 32) | (LAST_ID - token_ids)


def unpack_draw(
    packed,
    INFINITE_ORDER: tl.constexpr = INFINITE_ORDER,
    LOW_32_BITS: tl.constexpr = LOW_32_BITS,
    LAST_ID: tl.constexpr = LAST_ID,
):
    """The token ids of packed draws, and whether they are any: not if the score is infinite or NaN."""
    order = packed >> 32
    is_token = (order >= -INFINITE_ORDER) & (order < INFINITE_ORDER)
    return LAST_ID - (packed & LOW_32_BITS), is_token


flip_jit = triton.jit(flip)
hash32_jit = triton.jit(hash32)
pack_draw_jit = triton.jit(pack_draw)
unpack_draw_jit = triton.jit(unpack_draw)


def unpack_token_ids(packed: Tensor) -> Tensor:
    """The token ids, int64 [B], of packed draws; -1 where there is none."""
    token_ids, is_token = unpack_draw(packed)
    return torch.where(is_token, token_ids, -1)


# ---- filters --------------------------------------------------------------------------------------------------------


@triton.jit
def _load_filters(filters, row, size):
    """A row's 1 / temperature, top_k (0: off), top_p, min_p, and whether it is filtered at all."""
    rows_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr = filters
    row = tl.load(rows_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_k = tl.where(top_k < size, tl.maximum(top_k, 0), 0)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    return 1.0 / temperature, top_k, top_p, min_p, (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))


@triton.jit
def _best_kernel(logits_ptr, filters, best_ptr, missed_ptr, size):
    """One of the SPLITS parts of a row: each lane's two best logits, and the best one that they miss."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    _inv_temperature, _top_k, _top_p, _min_p, is_filtered = _load_filters(filters, row, size)
    if not is_filtered:
        return
    logits_ptr += row * size
    lanes = tl.arange(0, LANES)
    first = tl.full((LANES,), LOWEST, tl.float32)
    second, third = first, first
    for n in tl.range(0, size, SPLITS * LANES, loop_unroll_factor=4):
        offs = n + split * LANES + lanes
        x = tl.load(logits_ptr + offs, mask=offs < size, other=float("-inf")).to(tl.float32)
        not_first = tl.minimum(first, x)
        first = tl.maximum(first, x)
        third = tl.maximum(third, tl.minimum(second, not_first))
        second = tl.maximum(second, not_first)
    best_ptr += (row * SPLITS + split) * (2 * LANES) + lanes
    tl.store(best_ptr, first)
    tl.store(best_ptr + LANES, second)
    tl.store(missed_ptr + row * SPLITS + split, tl.max(third, 0))


@triton.jit
def _weigh(x, low, high, inv_temperature, MASS: tl.constexpr):
    """1 or, with MASS, exp((x - high) / temperature), of each x >= low, else 0."""
    return tl.where(x >= low, tl.exp((x - high) * inv_temperature) if MASS else 1.0, 0.0)


@triton.jit
def _measure(logits, low, enough, MASS: tl.constexpr):
    """The weight of a row; that of its best logits alone, if it is `enough` or if no other can reach `low`."""
    best, missed, x_ptr, size, high, inv_temperature = logits
    total = tl.sum(_weigh(best, low, high, inv_temperature, MASS), 0)
    if (total < enough) & (low <= missed):
        lanes = tl.arange(0, SEARCH_BLOCK)
        acc = tl.zeros((SEARCH_BLOCK,), tl.float32)
        for n in tl.range(0, size, SEARCH_BLOCK, loop_unroll_factor=4):
            x = tl.load(x_ptr + n + lanes, mask=n + lanes < size, other=float("-inf")).to(tl.float32)
            acc += _weigh(x, low, high, inv_temperature, MASS)
        total = tl.sum(acc, 0)
    return total


@triton.jit
def _search(logits, low, high, target, MASS: tl.constexpr):
    """The largest threshold from low to high that measures `target` or more; low where none does."""
    # The low bits of a float32 that are the same in all numbers of the logits' type need no search.
    SHIFT: tl.constexpr = 23 - logits[2].dtype.element_ty.fp_mantissa_width
    good = flip_jit(low.to(tl.int32, bitcast=True)) >> SHIFT
    bad = (flip_jit(high.to(tl.int32, bitcast=True)) >> SHIFT) + 1
    while good + 1 < bad:
        middle = (good & bad) + ((good ^ bad) >> 1)  # the mean, without overflow
        threshold = flip_jit(middle << SHIFT).to(tl.float32, bitcast=True)
        if _measure(logits, threshold, target, MASS) >= target:
            good = middle
            low = threshold
        else:
            bad = middle
    return low


@triton.jit
def _threshold_kernel(logits_ptr, filters, best_ptr, missed_ptr, low_ptr, size):
    """A row's threshold, from its best logits: that of min-p, raised by top-k, raised by top-p."""
    row = tl.program_id(0).to(tl.int64)
    inv_temperature, top_k, top_p, min_p, is_filtered = _load_filters(filters, row, size)
    if not is_filtered:
        tl.store(low_ptr + row, float("-inf"))
        return
    best = tl.load(best_ptr + row * (2 * SPLITS * LANES) + tl.arange(0, 2 * SPLITS * LANES)).to(tl.float32)
    high = tl.max(best, 0)
    missed = tl.max(tl.load(missed_ptr + row * SPLITS + tl.arange(0, SPLITS)), 0)
    logits = (best, missed, logits_ptr + row * size, size, high, inv_temperature)
    low = tl.maximum(high + tl.log(min_p) / inv_temperature, LOWEST)  # min_p 0: the log is -inf
    if top_k > 0:
        low = _search(logits, low, high, top_k, False)
    if top_p < 1.0:
        mass = _measure(logits, low, float("inf"), True)
        low = _search(logits, low, high, top_p * mass, True)
    tl.store(low_ptr + row, low)


def filter_thresholds(
    logits: Tensor, rows: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The least logits, float32 [B], that the filters of the rows keep; see `sampling_torch.filter_thresholds`.

    All contiguous; logits in bfloat16, float16 or float32. On an H200, V 151,936 in bfloat16, top_k 20 and top_p 0.95:
    256 rows 53 us, one row 17 us. Filters that keep thousands of tokens cost up to ten times as much.
    """
    num_rows, size = logits.shape
    filters = rows, temperature, top_k, top_p, min_p
    best = torch.empty((num_rows, SPLITS.value, 2, LANES.value), dtype=logits.dtype, device=logits.device)
    missed = torch.empty((num_rows, SPLITS.value), dtype=torch.float32, device=logits.device)
    low = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _best_kernel[(num_rows, SPLITS.value)](logits, filters, best, missed, size, num_warps=BEST_WARPS)
    _threshold_kernel[(num_rows,)](logits, filters, best, missed, low, size, num_warps=SEARCH_WARPS)
    return low


# ---- the draw -------------------------------------------------------------------------------------------------------


@triton.jit
def _log2(x):
    """The logarithm, to 22 bits of it or of the number 1: of a normal x, in the GPU's one instruction for it."""
    if IS_INTERPRETED:
        y = tl.log2(x)
    else:  # tl.log2 is a polynomial of 25 instructions
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def _gumbel2(seed, position, token_ids):
    """The noise in units of ln 2, less the constant that all tokens share."""
    key = hash32_jit(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32)
    key = hash32_jit(hash32_jit(key) ^ hash32_jit(position.to(tl.uint32)))
    bits = hash32_jit(token_ids.to(tl.uint32) + key)
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * TWO_TO_MINUS_32, LARGEST_BELOW_1)
    # -log2(1 - u), by its series where 1 - u would round u away.
    series = uniform * (1 + uniform * (0.5 + uniform * 0.33333334)) * LOG2_E
    exponential = tl.where(uniform < 0.03, series, -_log2(1 - uniform))
    return -_log2(exponential)


@triton.jit
def _draw_kernel(
    logits_ptr, rows_ptr, temperature_ptr, seed_ptr, position_ptr, low_ptr, packed_ptr, size, start, PART: tl.constexpr
):
    """The best of PART logits of a row, offered to `packed_ptr`."""
    row = tl.program_id(0)
    begin = tl.program_id(1) * PART
    request = tl.load(rows_ptr + row)
    temperature = tl.load(temperature_ptr + request)
    seed = tl.load(seed_ptr + request)
    position = tl.load(position_ptr + row)
    low = float("-inf") if low_ptr is None else tl.load(low_ptr + row)
    logits_ptr += row.to(tl.int64) * size
    # Scores are in units of ln 2 too. Of no use to greedy rows. Never 0, for which -inf would become NaN.
    scale = tl.maximum(LOG2_E / temperature, SMALLEST_NORMAL)
    best = tl.full((DRAW_BLOCK,), float("-inf"), tl.float32)
    best_ids = begin + tl.arange(0, DRAW_BLOCK)
    for offset in range(begin, begin + PART, DRAW_BLOCK):
        ids = offset + tl.arange(0, DRAW_BLOCK)
        scores = tl.load(logits_ptr + ids, mask=ids < size, other=float("-inf")).to(tl.float32)
        scores = tl.where(scores < low, float("-inf"), scores)
        if temperature > 0:
            scores = scores * scale + _gumbel2(seed, position, start + ids)
        best_ids = tl.where(scores > best, ids, best_ids)
        best = tl.maximum(scores, best, propagate_nan=tl.PropagateNan.ALL)
    best = tl.where(best == best, best, float("inf"))  # NaN: none is the largest
    top = tl.max(best, 0)
    token_id = start + tl.min(tl.where(best == top, best_ids, 0x7FFFFFFF), 0)
    if temperature > 0:
        top = top * LN_2 + MINUS_LN_LN_2
    order = flip_jit(top.to(tl.int32, bitcast=True))
    tl.atomic_max(packed_ptr + row, pack_draw_jit(order.to(tl.int64), token_id.to(tl.int64)))


def draw(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    start: int = 0,
    low: Tensor | None = None,
) -> Tensor:
    """The best of logits / temperature + noise in each row, packed, int64 [B]; see `sampling_torch.draw`.

    All contiguous; logits in any float type.
    """
    batch_size, vocab_size = logits.shape
    packed = torch.full((batch_size,), torch.iinfo(torch.int64).min, dtype=torch.int64, device=logits.device)
    part = draw_part(batch_size)
    _draw_kernel[batch_size, triton.cdiv(vocab_size, part)](
        logits, rows, temperature, seeds, positions, low, packed, vocab_size, start, PART=part, num_warps=DRAW_WARPS
    )
    return packed


def sample(
    logits: Tensor,
    rows: Tensor,
    row_ints: Tensor,
    row_floats: Tensor,
    positions: Tensor,
    start: int,
    is_filtered: bool,
) -> Tensor:
    """The draws, packed, int64 [B], of B rows of logits; see `sampling_torch.sample`."""
    top_k, seeds = row_ints[:2]
    temperature, top_p, min_p = row_floats[:3]
    low = filter_thresholds(logits, rows, temperature, top_k, top_p, min_p) if is_filtered else None
    return draw(logits, rows, temperature, seeds, positions, start, low)
