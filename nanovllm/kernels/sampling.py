# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Sampling of the next tokens: the thresholds that filters set, and a draw among the logits that reach them.

Each filter (min-p, top-k, top-p) keeps the tokens whose logit reaches a threshold, so nothing needs sorting: it is
enough to find the largest threshold that still keeps k tokens (top-k) or a share p of the mass (top-p), by bisection
on the bits of the float. Tokens that tie at a threshold stay together. A kernel of its own, so that few rows fill the
GPU too, deals a row out to SPLITS * LANES lanes, which note their two best logits. The bisection holds those in
registers: they are all that reaches a threshold above every lane's third best, so that it seldom reads the row again.

The draw takes one pass, with the Gumbel-max trick: argmax(logits / temperature + g) with independent standard Gumbel
noise g is a draw from softmax(logits / temperature) (Gumbel 1954; arXiv 1411.0030). The noise is a hash of (seed,
position, token id), so that a request draws the same tokens whatever it is batched with and however the vocabulary is
split over ranks.
"""

import torch
from torch import Tensor

from nanovllm.kernels import tl, triton, use_triton

SPLITS = tl.constexpr(8)
LANES = tl.constexpr(1024)
SEARCH_BLOCK = tl.constexpr(4096)
DRAW_BLOCK = tl.constexpr(2048)
DRAW_PART = tl.constexpr(8 * 2048)  # logits of one program
LOWEST = tl.constexpr(-3.0e38)  # finite, so that differences to it are numbers
MASK = 0xFFFFFFFF
INFINITE = 0x7F800000  # the order of infinity, as `_flip` gives it; that of its negative is -INFINITE - 1


def _flip(bits):
    """The bits of a float32 to an int32 that orders as it does, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _hash32(x):
    """Mixes 32-bit numbers, a tensor's in int64 or a kernel's in uint32 (constants of C. Wellons' "lowbias32")."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


_flip_jit, _hash32_jit = triton.jit(_flip), triton.jit(_hash32)


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
def _sample_kernel(logits_ptr, filters, best_ptr, missed_ptr, size):
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
    good = _flip_jit(low.to(tl.int32, bitcast=True)) >> SHIFT
    bad = (_flip_jit(high.to(tl.int32, bitcast=True)) >> SHIFT) + 1
    while good + 1 < bad:
        middle = (good & bad) + ((good ^ bad) >> 1)  # the mean, without overflow
        threshold = _flip_jit(middle << SHIFT).to(tl.float32, bitcast=True)
        if _measure(logits, threshold, target, MASS) >= target:
            good = middle
            low = threshold
        else:
            bad = middle
    return low


@triton.jit
def _threshold_kernel(logits_ptr, filters, best_ptr, missed_ptr, low_ptr, size):
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


def filter_thresholds_torch(logits: Tensor, rows: Tensor, *filters: Tensor) -> Tensor:
    """What `filter_thresholds` computes, said plainly, with a sort."""
    temperature, top_k, top_p, min_p = (values[rows, None] for values in filters)
    ordered = logits.float().sort(dim=-1, descending=True).values
    high, size = ordered[:, :1], logits.size(1)
    low = torch.where(min_p > 0, high + temperature * torch.log(min_p), -torch.inf)
    low = torch.where(top_k > 0, torch.maximum(low, ordered.gather(1, top_k.clamp(1, size) - 1)), low)
    mass = torch.where(ordered >= low, torch.exp((ordered - high) / temperature), 0.0).double().cumsum(-1)
    last_kept = (mass < top_p * mass[:, -1:]).sum(-1, keepdim=True).clamp(max=size - 1)
    low = torch.where(top_p < 1, torch.maximum(low, ordered.gather(1, last_kept)), low)
    return torch.where(temperature > 0, low, -torch.inf)[:, 0]


def filter_thresholds(logits: Tensor, rows: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor,
        min_p: Tensor) -> Tensor:  # fmt: skip
    """The least logits, float32 [B], that the filters of the rows keep; -inf where a row is not filtered.

    All contiguous. logits: [B, V]; bfloat16, float16 or float32. rows: [B] int64, where in the others a row's filters
    stand. temperature: [R] float32; a row at 0 (greedy) is not filtered. With probabilities softmax(logits /
    temperature), three filters apply in this order: min_p [R] float32 keeps p >= min_p * max(p) (0: all); top_k [R]
    int64 keeps the k largest of the rest (<= 0: all); top_p [R] float32 keeps the smallest set of the largest whose
    share of the mass that is left reaches top_p (1: all). Ties at a border are kept, and so is always the largest.

    On an H200, V 151,936 in bfloat16, top_k 20 and top_p 0.95: 256 rows 53 us, one row 17 us. Filters that keep
    thousands of tokens cost up to ten times as much.
    """
    if not use_triton(logits):
        return filter_thresholds_torch(logits, rows, temperature, top_k, top_p, min_p)
    num_rows, size = logits.shape
    filters = rows, temperature, top_k, top_p, min_p
    best = torch.empty((num_rows, SPLITS.value, 2, LANES.value), dtype=logits.dtype, device=logits.device)
    missed = torch.empty((num_rows, SPLITS.value), dtype=torch.float32, device=logits.device)
    low = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _sample_kernel[(num_rows, SPLITS.value)](logits, filters, best, missed, size, num_warps=8)
    _threshold_kernel[(num_rows,)](logits, filters, best, missed, low, size, num_warps=16)
    return low


def gumbel_noise_torch(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [B, V], of int64 seeds [B], int positions [B] and int64 token ids [V]."""
    keys = _hash32(_hash32(seeds & MASK) ^ ((seeds >> 32) & MASK))
    keys = _hash32(keys ^ _hash32(positions.long()))
    bits = _hash32((token_ids + keys[:, None]) & MASK)
    # The winner has a small exponential: from a uniform near 0, where float32 is fine, and not from one near 1.
    uniform = ((bits.float() + 0.5) * 2**-32).clamp(max=1 - 2**-24)  # the largest float32 below 1
    return -torch.log(-torch.log1p(-uniform))


def draw_torch(logits: Tensor, rows: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, start: int = 0,
        low: Tensor | None = None) -> Tensor:  # fmt: skip
    """See `draw`."""
    temperature, seeds = temperature[rows], seeds[rows]
    scores = logits.float()
    if low is not None:
        scores = scores.masked_fill(scores < low[:, None], -torch.inf)
    if temperature.any():
        token_ids = torch.arange(start, start + logits.size(1), device=logits.device)
        noisy = scores / temperature[:, None] + gumbel_noise_torch(seeds, positions, token_ids)
        scores = torch.where(temperature[:, None] == 0, scores, noisy)
    scores = torch.where(logits.float() < torch.inf, scores, torch.inf)  # NaN too
    best, index = scores.max(dim=-1)
    return (_flip(best.view(torch.int32)).long() << 32) | (0x7FFFFFFF - (start + index))


def unpack_token_ids(packed: Tensor) -> Tensor:
    """The token ids, int64 [B], of what `draw` returns; -1 for a row that has no finite maximum."""
    order = packed >> 32
    is_finite = (order >= -INFINITE) & (order < INFINITE)
    return torch.where(is_finite, 0x7FFFFFFF - (packed & MASK), -1)


@triton.jit
def _gumbel2(seed, position, token_ids):
    """The noise in units of ln 2, less the constant that all tokens share."""
    key = _hash32_jit(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32)
    key = _hash32_jit(_hash32_jit(key) ^ _hash32_jit(position.to(tl.uint32)))
    bits = _hash32_jit(token_ids.to(tl.uint32) + key)
    # 2**-32 and the largest float32 below 1.
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # -log2(1 - u), by its series where 1 - u would round u away.
    series = uniform * (1 + uniform * (0.5 + uniform * 0.33333334)) * 1.442695
    exponential = tl.where(uniform < 0.03, series, -tl.log2(1 - uniform))
    return -tl.log2(exponential)


@triton.jit
def _draw_kernel(logits_ptr, rows_ptr, temperature_ptr, seed_ptr, position_ptr, low_ptr, packed_ptr, size, start):
    row = tl.program_id(0)
    begin = tl.program_id(1) * DRAW_PART
    request = tl.load(rows_ptr + row)
    temperature = tl.load(temperature_ptr + request)
    seed = tl.load(seed_ptr + request)
    position = tl.load(position_ptr + row)
    low = float("-inf") if low_ptr is None else tl.load(low_ptr + row)
    logits_ptr += row.to(tl.int64) * size
    # Of no use to greedy rows. Never 0, for which -inf would become NaN.
    scale = tl.maximum(1.442695 / temperature, 1.1754944e-38)
    best = tl.full((DRAW_BLOCK,), float("-inf"), tl.float32)
    best_ids = begin + tl.arange(0, DRAW_BLOCK)
    for offset in range(begin, begin + DRAW_PART, DRAW_BLOCK):
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
        top = top * 0.6931472 + 0.36651292  # ln 2 and -ln ln 2
    order = _flip_jit(top.to(tl.int32, bitcast=True))
    packed = (order.to(tl.int64) << 32) | (0x7FFFFFFF - token_id).to(tl.int64)
    tl.atomic_max(packed_ptr + row, packed)


def draw(logits: Tensor, rows: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, start: int = 0,
        low: Tensor | None = None) -> Tensor:  # fmt: skip
    """The best of logits / temperature + noise in each row, and the token id that has it.

    Args, all contiguous:
        logits: [B, V] of the token ids from `start` on, any float type.
        rows: int64 [B], where in temperature and seeds a row's stand.
        temperature: float32 [R]; 0 is greedy: the best logit, without noise.
        seeds: int64 [R].
        positions: int64 or int32 [B].
        start: the first column's token id.
        low: float32 [B]; a row's logits below it are not drawn. None: all may be.

    Returns:
        int64 [B], (score, id) packed so that the larger number has the better score or, among equals, the lower id:
        the maximum over several ranks' results is the result for all of the vocabulary. The id takes 31 of the lower
        32 bits, so that no result is -1, which `max_over_ranks` cannot send. A row with infinite or NaN logits has an
        infinite score, one without any above -inf a score of -inf: `unpack_token_ids` gives -1 for both.
    """
    if not use_triton(logits):
        return draw_torch(logits, rows, temperature, seeds, positions, start, low)
    batch_size, vocab_size = logits.shape
    packed = torch.full((batch_size,), torch.iinfo(torch.int64).min, dtype=torch.int64, device=logits.device)
    grid = batch_size, triton.cdiv(vocab_size, DRAW_PART.value)
    _draw_kernel[grid](logits, rows, temperature, seeds, positions, low, packed, vocab_size, start, num_warps=8)
    return packed
