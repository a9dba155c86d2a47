# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Drawing a token from each row of logits, in one pass, with noise that depends only on a seed and a position.

The Gumbel-max trick: argmax(logits / temperature + g) with independent standard Gumbel noise g is a draw from
softmax(logits / temperature) (Gumbel 1954; arXiv 1411.0030). The noise is a hash of (seed, position, token id), so
that a request draws the same tokens whatever it is batched with and however the vocabulary is split over ranks.
"""

import torch
from torch import Tensor

from nanovllm.kernels import INTERPRETED, tl, triton, use_triton

MASK = 0xFFFFFFFF
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1
BLOCK = 2048
PART = 8 * BLOCK  # logits of one program


def hash32(x: Tensor) -> Tensor:
    """Mixes 32-bit numbers held in int64 (the constants of C. Wellons' "lowbias32")."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def gumbel_noise_torch(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [B, V], of int64 seeds [B], positions [B] and token ids [V]."""
    keys = hash32(hash32(seeds & MASK) ^ ((seeds >> 32) & MASK))
    keys = hash32(keys ^ hash32(positions))
    bits = hash32((token_ids + keys[:, None]) & MASK)
    # The winner has a small exponential: from a uniform near 0, where float32 is fine, and not from one near 1.
    uniform = ((bits.float() + 0.5) * 2**-32).clamp(max=BELOW_ONE)
    return -torch.log(-torch.log1p(-uniform))


def draw_torch(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, start: int = 0) -> Tensor:
    """See `draw`."""
    scores = logits.float()
    if temperatures.any():
        token_ids = torch.arange(start, start + logits.size(1), device=logits.device)
        noisy = scores / temperatures[:, None] + gumbel_noise_torch(seeds, positions, token_ids)
        scores = torch.where(temperatures[:, None] == 0, scores, noisy)
    best, index = scores.max(dim=-1)
    order = best.view(torch.int32).long()
    order = torch.where(order < 0, order ^ 0x7FFFFFFF, order)
    return (order << 32) | (MASK - (start + index))


def unpack_token_ids(packed: Tensor) -> Tensor:
    """The token ids, int64 [B], of what `draw` returns."""
    return MASK - (packed & MASK)


@triton.jit
def _hash32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _log2(x, FAST: tl.constexpr):
    # tl.log2 takes a dozen instructions, the hardware's own one; the interpreter knows no assembly.
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def _gumbel2(seed, position, token_ids, FAST: tl.constexpr):
    """The noise in units of ln 2, less the constant that all tokens share."""
    key = _hash32(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32)
    key = _hash32(_hash32(key) ^ _hash32(position.to(tl.uint32)))
    bits = _hash32(token_ids.to(tl.uint32) + key)
    # 2**-32 and the largest float32 below 1.
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # -log2(1 - u), by its series where 1 - u would round u away.
    series = uniform * (1 + uniform * (0.5 + uniform * 0.33333334)) * 1.442695
    exponential = tl.where(uniform < 0.03, series, -_log2(1 - uniform, FAST))
    return -_log2(exponential, FAST)


@triton.jit
def _draw_kernel(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, packed_ptr,
    vocab_size, start, BLOCK: tl.constexpr, PART: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    begin = tl.program_id(1) * PART
    temperature = tl.load(temperature_ptr + row)
    seed = tl.load(seed_ptr + row)
    position = tl.load(position_ptr + row)
    logits_ptr += row.to(tl.int64) * vocab_size
    scale = 1.442695 / temperature  # of no use to greedy rows
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_ids = begin + tl.arange(0, BLOCK)
    for offset in range(begin, begin + PART, BLOCK):
        ids = offset + tl.arange(0, BLOCK)
        scores = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        if temperature > 0:
            scores = scores * scale + _gumbel2(seed, position, start + ids, FAST)
        best_ids = tl.where(scores > best, ids, best_ids)
        best = tl.maximum(scores, best)
    top = tl.max(best, 0)
    token_id = start + tl.min(tl.where(best == top, best_ids, 0x7FFFFFFF), 0)
    if temperature > 0:
        top = top * 0.6931472 + 0.36651292  # ln 2 and -ln ln 2
    order = top.to(tl.int32, bitcast=True)
    order = order ^ ((order >> 31) & 0x7FFFFFFF)
    packed = (order.to(tl.int64) << 32) | (0xFFFFFFFF - token_id.to(tl.int64))
    tl.atomic_max(packed_ptr + row, packed)


def draw(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, start: int = 0) -> Tensor:
    """The best of logits / temperature + noise in each row, and the token id that has it.

    Args:
        logits: [B, V] of the token ids from `start` on, any float type, contiguous.
        temperatures: float32 [B]; 0 is greedy: the best logit, without noise.
        seeds: int64 [B].
        positions: int64 or int32 [B].
        start: the first column's token id.

    Returns:
        int64 [B], (score, id) packed so that the larger number has the better score or, among equals, the lower id:
        the maximum over several ranks' results is the result for all of the vocabulary.
    """
    if not use_triton(logits):
        return draw_torch(logits, temperatures, seeds, positions, start)
    batch_size, vocab_size = logits.shape
    packed = torch.full((batch_size,), torch.iinfo(torch.int64).min, dtype=torch.int64, device=logits.device)
    _draw_kernel[batch_size, triton.cdiv(vocab_size, PART)](
        logits, temperatures, seeds, positions, packed,
        vocab_size, start, BLOCK=BLOCK, PART=PART,
        FAST=not INTERPRETED, num_warps=8,
    )  # fmt: skip
    return packed
