# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Removing unlikely tokens before sampling: min-p, top-k and top-p of each row of logits.

Each filter keeps the tokens whose logit reaches a threshold, so nothing needs sorting: it is enough to find the
largest threshold that still keeps k tokens (top-k) or a share p of the mass (top-p), by bisection on the bits of the
float. Tokens that tie at a threshold stay together.

Three kernels, so that few rows fill the GPU too. A row is dealt out to SPLITS * LANES lanes, which note their two best
logits and pass over the row once. The thresholds are searched among those: if no lane's third best reaches the one
that is found, nothing was missed; else it is a lower bound, from which the search goes on in the whole row. The last
kernel masks.
"""

import torch
from torch import Tensor

from nanovllm.kernels import tl, triton, use_triton

SPLITS = 8
LANES = 1024
BLOCK = 8192
LOWEST = tl.constexpr(-3.0e38)  # finite, so that differences to it are numbers
# The low bits of a float32 that are the same in all numbers of a type: no need to search them.
SHIFTS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def _load_filters(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, size):
    """A row's 1 / temperature, top_k (0: off), top_p, min_p, and whether it is filtered at all."""
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_k = tl.where(top_k < size, tl.maximum(top_k, 0), 0)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    return 1.0 / temperature, top_k, top_p, min_p, (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))


@triton.jit
def _sample_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, best_ptr, stats_ptr, size,
    SPLITS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One of the SPLITS parts of a row: each lane's two best logits and, over all lanes, (best, third best, mass)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    inv_temperature, top_k, _top_p, min_p, filtered = _load_filters(
        temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, size
    )
    if not filtered:
        return
    lanes = tl.arange(0, LANES)
    part = tl.cdiv(size, SPLITS * LANES) * LANES
    begin = tl.minimum(split * part, size)  # an unrolled loop may not begin beyond its end
    end = tl.minimum(begin + part, size)
    logits_ptr += row * size
    first = tl.full((LANES,), LOWEST, tl.float32)
    second = first
    third = first
    for n in tl.range(begin, end, LANES, loop_unroll_factor=4):
        x = tl.load(logits_ptr + n + lanes, mask=n + lanes < end, other=float("-inf")).to(tl.float32)
        not_first = tl.minimum(first, x)
        first = tl.maximum(first, x)
        third = tl.maximum(third, tl.minimum(second, not_first))
        second = tl.maximum(second, not_first)
    high = tl.max(first, 0)
    mass = tl.zeros((LANES,), tl.float32)
    if (top_k == 0) & (min_p <= 0.0):  # top-p needs the mass of the whole row
        for n in tl.range(begin, end, LANES, loop_unroll_factor=4):
            x = tl.load(logits_ptr + n + lanes, mask=n + lanes < end, other=float("-inf")).to(tl.float32)
            mass += tl.exp((x - high) * inv_temperature)
    best_ptr += (row * SPLITS + split) * (2 * LANES) + lanes
    tl.store(best_ptr, first)
    tl.store(best_ptr + LANES, second)
    stats_ptr += (row * SPLITS + split) * 3
    tl.store(stats_ptr, high)
    tl.store(stats_ptr + 1, tl.max(third, 0))
    tl.store(stats_ptr + 2, tl.sum(mass, 0))


@triton.jit
def _to_key(x):
    """An int32 that orders as the float32 x does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _measure(x_ptr, size, low, high, inv_temperature, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The number of x >= low or, with MASS, the sum of their exp((x - high) / temperature)."""
    lanes = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for n in tl.range(0, size, BLOCK, loop_unroll_factor=2):
        x = tl.load(x_ptr + n + lanes, mask=n + lanes < size, other=float("-inf")).to(tl.float32)
        weight = tl.exp((x - high) * inv_temperature) if MASS else 1.0
        acc += tl.where(x >= low, weight, 0.0)
    return tl.sum(acc, 0)


@triton.jit
def _search(
    x_ptr, size, target, low, high, inv_temperature, MASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest threshold from low to high that measures `target` or more; low where none does."""
    good = _to_key(low) >> SHIFT
    bad = (_to_key(high) >> SHIFT) + 1
    while good + 1 < bad:
        middle = (good & bad) + ((good ^ bad) >> 1)  # the mean, without overflow
        key = middle << SHIFT
        threshold = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        if _measure(x_ptr, size, threshold, high, inv_temperature, MASS, BLOCK) >= target:
            good = middle
            low = threshold
        else:
            bad = middle
    return low


@triton.jit
def _threshold_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, best_ptr, stats_ptr, low_ptr, size,
    SHIFT: tl.constexpr, SPLITS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The threshold of a row; -inf where it is not filtered."""
    row = tl.program_id(0).to(tl.int64)
    inv_temperature, top_k, top_p, min_p, filtered = _load_filters(
        temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, size
    )
    if not filtered:
        tl.store(low_ptr + row, float("-inf"))
        return
    SAMPLE: tl.constexpr = 2 * SPLITS * LANES
    logits_ptr += row * size
    best_ptr += row * SAMPLE
    stats_ptr += (row * SPLITS + tl.arange(0, SPLITS)) * 3
    highs = tl.load(stats_ptr)
    high = tl.max(highs, 0)
    missed = tl.max(tl.load(stats_ptr + 1), 0)  # all that is larger is in the sample
    mass = tl.sum(tl.load(stats_ptr + 2) * tl.exp((highs - high) * inv_temperature), 0)
    low = LOWEST
    if min_p > 0.0:
        low = tl.maximum(low, high + tl.log(min_p) / inv_temperature)
    if top_k > 0:
        low = _search(best_ptr, SAMPLE, top_k, low, high, inv_temperature, False, SHIFT, BLOCK)
        if low <= missed:
            low = _search(logits_ptr, size, top_k, low, high, inv_temperature, False, SHIFT, BLOCK)
    if top_p < 1.0:
        if (top_k > 0) | (min_p > 0.0):
            if low > missed:
                mass = _measure(best_ptr, SAMPLE, low, high, inv_temperature, True, BLOCK)
            else:
                mass = _measure(logits_ptr, size, low, high, inv_temperature, True, BLOCK)
        low = _search(best_ptr, SAMPLE, top_p * mass, low, high, inv_temperature, True, SHIFT, BLOCK)
        if low <= missed:
            low = _search(logits_ptr, size, top_p * mass, low, high, inv_temperature, True, SHIFT, BLOCK)
    tl.store(low_ptr + row, low)


@triton.jit
def _mask_kernel(logits_ptr, low_ptr, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    low = tl.load(low_ptr + row)
    if low == float("-inf"):
        return
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * size + offs, mask=offs < size)
    tl.store(logits_ptr + row * size + offs, tl.where(x.to(tl.float32) >= low, x, float("-inf")), mask=offs < size)


def filter_logits_torch(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """What `filter_logits` computes, said plainly, with a sort."""
    size = logits.shape[1]
    ordered = logits.float().sort(dim=-1, descending=True).values
    high = ordered[:, :1]
    low = torch.where(min_p > 0, temperature * torch.log(min_p), -torch.inf)[:, None] + high
    last_kept = torch.where(top_k > 0, top_k.clamp(max=size), size).long() - 1
    low = torch.maximum(low, ordered.gather(1, last_kept[:, None]))
    mass = torch.where(ordered >= low, torch.exp((ordered - high) / temperature[:, None]), 0.0).double().cumsum(-1)
    last_kept = (mass < top_p[:, None] * mass[:, -1:]).sum(-1, keepdim=True).clamp(max=size - 1)
    low = torch.where((top_p < 1)[:, None], torch.maximum(low, ordered.gather(1, last_kept)), low)
    return logits.masked_fill_((logits < low) & (temperature > 0)[:, None], -torch.inf)


def filter_logits(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set the logits of the tokens that a row's filters remove to -inf, in place.

    logits: [B, V], contiguous; bfloat16, float16 or float32. temperature: [B] float32; a row at 0 (greedy) is left
    alone. With probabilities softmax(logits / temperature), three filters apply in this order: min_p [B] float32
    keeps p >= min_p * max(p) (0: all); top_k [B] int32 keeps the k largest of the rest (<= 0: all); top_p [B] float32
    keeps the smallest set of the largest whose share of the mass that is left reaches top_p (1: all). Ties at a border
    are kept, and so is always the largest. Returns logits.

    On an H200, V 151,936 in bfloat16, top_k 20 and top_p 0.95: 256 rows 109 us, one row 26 us. Reading and writing
    256 rows takes 57 us. A top_p that keeps thousands of tokens costs up to three times as much.
    """
    if not use_triton(logits):
        return filter_logits_torch(logits, temperature, top_k, top_p, min_p)
    rows, size = logits.shape
    if rows:
        filters = temperature, top_k, top_p, min_p
        best = torch.empty((rows, SPLITS, 2, LANES), dtype=logits.dtype, device=logits.device)
        stats = torch.empty((rows, SPLITS, 3), dtype=torch.float32, device=logits.device)
        low = torch.empty(rows, dtype=torch.float32, device=logits.device)
        _sample_kernel[(rows, SPLITS)](logits, *filters, best, stats, size, SPLITS=SPLITS, LANES=LANES, num_warps=4)
        _threshold_kernel[(rows,)](
            logits, *filters, best, stats, low, size,
            SHIFT=SHIFTS[logits.dtype], SPLITS=SPLITS, LANES=LANES, BLOCK=BLOCK, num_warps=32,
        )  # fmt: skip
        _mask_kernel[(rows, triton.cdiv(size, BLOCK))](logits, low, size, BLOCK=BLOCK, num_warps=8)
    return logits
