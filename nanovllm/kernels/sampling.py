# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Removing unlikely tokens before sampling: min-p, top-k and top-p of each row of logits.

Each filter keeps the tokens whose logit reaches a threshold, so nothing needs sorting: it is enough to find the
largest threshold that still keeps k tokens (top-k) or a share p of the mass (top-p), by bisection on the bits of the
float. Tokens that tie at a threshold stay together.
"""

import torch

from nanovllm.kernels import tl, triton, use_triton

BLOCK = 8192  # lanes of a program, which owns one row
SLOTS = 4  # candidates that a lane can set aside
STAGES = 4
# The low bits of a float32 that are the same in all numbers of a type: no need to search them.
SHIFTS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def _to_key(x):
    """An int32 that orders as the float32 x does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _measure(x_ptr, size, low, high, inv_temperature, MASS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The number of x >= low or, with MASS, the sum of their exp((x - high) / temperature)."""
    lanes = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for begin in tl.range(0, size, BLOCK, num_stages=STAGES):
        x = tl.load(x_ptr + begin + lanes, mask=begin + lanes < size, other=float("-inf")).to(tl.float32)
        weight = tl.exp((x - high) * inv_temperature) if MASS else 1.0
        acc += tl.where(x >= low, weight, 0.0)
    return tl.sum(acc, 0)


@triton.jit
def _search(
    x_ptr, size, target, low, high, inv_temperature,
    MASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The largest threshold from low to high that measures `target` or more; low where none does."""
    good = _to_key(low) >> SHIFT
    bad = (_to_key(high) >> SHIFT) + 1
    while good + 1 < bad:
        middle = (good & bad) + ((good ^ bad) >> 1)  # the mean, without overflow
        key = middle << SHIFT
        threshold = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        if _measure(x_ptr, size, threshold, high, inv_temperature, MASS, BLOCK, STAGES) >= target:
            good = middle
            low = threshold
        else:
            bad = middle
    return low


@triton.jit
def _filter_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, buffer_ptr, size,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    has_top_k = (top_k > 0) & (top_k < size)
    if (temperature == 0.0) | ((top_p >= 1.0) & (min_p <= 0.0) & (has_top_k == 0)):
        return
    logits_ptr += row * size
    buffer_ptr += row * (SLOTS * BLOCK)
    inv_temperature = 1.0 / temperature
    lanes = tl.arange(0, BLOCK)

    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for begin in tl.range(0, size, BLOCK, num_stages=STAGES):
        x = tl.load(logits_ptr + begin + lanes, mask=begin + lanes < size, other=float("-inf")).to(tl.float32)
        best = tl.maximum(best, x)
    high = tl.max(best, 0)
    low = -3.0e38
    if min_p > 0.0:
        low = tl.maximum(low, high + temperature * tl.log(min_p))

    # The lanes' best are a sample of the row, so what they keep is a lower bound of the threshold, and a close one.
    tl.store(buffer_ptr + lanes, best.to(logits_ptr.dtype.element_ty))
    tl.debug_barrier()
    mass = 0.0
    if has_top_k:
        low = _search(buffer_ptr, BLOCK, top_k, low, high, inv_temperature, False, SHIFT, BLOCK, STAGES)
    elif min_p <= 0.0:
        mass = _measure(logits_ptr, size, low, high, inv_temperature, True, BLOCK, STAGES)
        low = _search(buffer_ptr, BLOCK, top_p * mass, low, high, inv_temperature, True, SHIFT, BLOCK, STAGES)
    tl.debug_barrier()

    # Set aside the few that reach the bound, each lane in slots of its own, and search only them.
    count = tl.zeros((BLOCK,), tl.int32)
    for begin in tl.range(0, size, BLOCK, num_stages=STAGES):
        x = tl.load(logits_ptr + begin + lanes, mask=begin + lanes < size, other=float("-inf"))
        found = x.to(tl.float32) >= low
        tl.store(buffer_ptr + count * BLOCK + lanes, x, mask=found & (count < SLOTS))
        count += found.to(tl.int32)
    slots = tl.max(count, 0)
    candidates_ptr = logits_ptr
    num_candidates = size
    if slots <= SLOTS:
        for slot in range(slots):
            tl.store(buffer_ptr + slot * BLOCK + lanes, float("-inf"), mask=count <= slot)
        candidates_ptr = buffer_ptr
        num_candidates = slots * BLOCK
    tl.debug_barrier()
    if has_top_k:
        low = _search(candidates_ptr, num_candidates, top_k, low, high, inv_temperature, False, SHIFT, BLOCK, STAGES)
    if top_p < 1.0:
        if has_top_k | (min_p > 0.0):
            mass = _measure(candidates_ptr, num_candidates, low, high, inv_temperature, True, BLOCK, STAGES)
        low = _search(
            candidates_ptr, num_candidates, top_p * mass, low, high, inv_temperature, True, SHIFT, BLOCK, STAGES
        )

    tl.debug_barrier()
    for begin in tl.range(0, size, BLOCK, num_stages=STAGES):
        mask = begin + lanes < size
        x = tl.load(logits_ptr + begin + lanes, mask=mask)
        tl.store(logits_ptr + begin + lanes, tl.where(x.to(tl.float32) >= low, x, float("-inf")), mask=mask)


def filter_logits_torch(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
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


def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Set the logits of the tokens that a row's filters remove to -inf, in place.

    logits: [B, V], contiguous; bfloat16, float16 or float32. temperature: [B] float32; a row at 0 (greedy) is left
    alone. With probabilities softmax(logits / temperature), three filters apply in this order: min_p [B] float32
    keeps p >= min_p * max(p) (0: all); top_k [B] int32 keeps the k largest of the rest (<= 0: all); top_p [B] float32
    keeps the smallest set of the largest whose share of the mass that is left reaches top_p (1: all). Ties at a border
    are kept, and so is always the largest. Returns logits.
    """
    if not use_triton(logits):
        return filter_logits_torch(logits, temperature, top_k, top_p, min_p)
    rows, size = logits.shape
    if rows:
        buffer = torch.empty((rows, SLOTS, BLOCK), dtype=logits.dtype, device=logits.device)
        _filter_kernel[(rows,)](
            logits, temperature, top_k, top_p, min_p, buffer, size,
            SHIFT=SHIFTS[logits.dtype], BLOCK=BLOCK, SLOTS=SLOTS, STAGES=STAGES, num_warps=16,
        )  # fmt: skip
    return logits
