# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Log-probabilities of given tokens, their ranks, and the most likely tokens beside them, from rows of logits.

The fast way reads a row once and writes nothing of its size: programs take a part each and offer the part's best
tokens, which one more program a row merges. Tokens are compared in the packed form of `kernels.sampling`, so that of
equally likely ones the lower id comes first, whatever the batch. This file knows nothing of requests or texts.
"""

import torch
from torch import Tensor

from nanovllm.kernels import tl, triton, use_triton
from nanovllm.kernels.sampling import LOWEST, flip, flip_jit, pack_draw, pack_draw_jit, unpack_draw_jit

LANES = 1024  # of one program
TILES = 16  # logits of a lane
NUM_WARPS = 4
MOST_TOP = 128  # a part's best tokens are found one after the other; beyond this many torch is asked

NONE = tl.constexpr(-(2**63))  # no packed token


@triton.jit
def _pack(x, ids, size):
    """Tokens and their logits in one int64 each; NONE beyond the vocabulary."""
    order = flip_jit(x.to(tl.int32, bitcast=True)).to(tl.int64)
    return tl.where(ids < size, pack_draw_jit(order, ids.to(tl.int64)), NONE)


@triton.jit
def _part_kernel(
    logits_ptr,
    stride,
    token_ids_ptr,
    best_ptr,
    high_ptr,
    mass_ptr,
    count_ptr,
    size,
    num_top,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
):
    """Of a part of a row: its best tokens, packed, the best first; its largest logit; the sum of the others' exp
    against that; how many logits are larger than the given token's.

    Lane l has the tokens l, LANES + l, and so on. Where it gave its best one, it reads them again for the next.
    """
    row = tl.program_id(0).to(tl.int64)
    part = row * tl.num_programs(1) + tl.program_id(1)
    begin = tl.program_id(1) * (LANES * TILES)
    lanes = tl.arange(0, LANES)
    logits_ptr += row * stride
    given = tl.load(logits_ptr + tl.maximum(tl.load(token_ids_ptr + row), 0)).to(tl.float32)
    best = tl.full((LANES,), float("-inf"), tl.float32)
    best_ids = begin + lanes
    mass = tl.zeros((LANES,), tl.float32)
    count = tl.zeros((LANES,), tl.int32)
    for tile in tl.range(0, TILES, loop_unroll_factor=4):
        ids = begin + tile * LANES + lanes
        x = tl.load(logits_ptr + ids, mask=ids < size, other=float("-inf")).to(tl.float32)
        count += (x > given).to(tl.int32)
        high = tl.maximum(best, LOWEST)
        ratio = tl.exp(-tl.abs(x - high))
        mass = tl.where(x > high, mass * ratio + 1.0, mass + ratio)
        best_ids = tl.where(x > best, ids, best_ids)
        best = tl.maximum(best, x)
    high = tl.maximum(best, LOWEST)
    highest = tl.max(high, 0)
    tl.store(high_ptr + part, highest)
    tl.store(mass_ptr + part, tl.sum(mass * tl.exp(high - highest), 0))
    tl.store(count_ptr + part, tl.sum(count, 0))

    packed = _pack(best, best_ids, size)
    tiles = tl.arange(0, TILES)
    best_ptr += part * num_top
    for n in range(num_top):
        top = tl.max(packed, 0)
        tl.store(best_ptr + n, top)
        token_id, _is_token = unpack_draw_jit(top)
        lane = (token_id - begin) % LANES
        ids = begin + tiles * LANES + lane
        x = tl.load(logits_ptr + ids, mask=ids < size, other=float("-inf")).to(tl.float32)
        others = _pack(x, ids, size)
        packed = tl.where(lanes == lane, tl.max(tl.where(others < top, others, NONE), 0), packed)


@triton.jit
def _merge_kernel(
    logits_ptr,
    stride,
    token_ids_ptr,
    best_ptr,
    high_ptr,
    mass_ptr,
    count_ptr,
    values_ptr,
    ids_ptr,
    ranks_ptr,
    num_parts,
    num_top,
    PARTS: tl.constexpr,
):
    """A row of what `top_logprobs` returns, of what `_part_kernel` found in its parts."""
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    is_part = parts < num_parts
    parts += row * num_parts
    high = tl.load(high_ptr + parts, mask=is_part, other=LOWEST)
    mass = tl.load(mass_ptr + parts, mask=is_part, other=0.0)
    highest = tl.max(high, 0)
    total = highest + tl.log(tl.sum(mass * tl.exp(high - highest), 0))
    tl.store(ranks_ptr + row, 1 + tl.sum(tl.load(count_ptr + parts, mask=is_part, other=0), 0))

    values_ptr += row * (1 + num_top)
    ids_ptr += row * (1 + num_top)
    token_id = tl.maximum(tl.load(token_ids_ptr + row), 0)
    tl.store(values_ptr, tl.load(logits_ptr + row * stride + token_id).to(tl.float32) - total)
    tl.store(ids_ptr, token_id)
    taken = tl.zeros((PARTS,), tl.int32)  # of the best tokens of each part
    best_ptr += parts * num_top
    for n in range(num_top):
        packed = tl.load(best_ptr + taken, mask=is_part & (taken < num_top), other=NONE)
        top = tl.max(packed, 0)
        taken += (packed == top).to(tl.int32)
        logit = flip_jit((top >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        token_id, _is_token = unpack_draw_jit(top)
        tl.store(values_ptr + 1 + n, logit - total)
        tl.store(ids_ptr + 1 + n, token_id)


def top_logprobs_torch(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `top_logprobs` computes, said plainly."""
    logits = logits.float()
    ids = token_ids.clamp(min=0)[:, None]
    ranks = 1 + (logits > logits.gather(1, ids)).sum(dim=1)
    if num_top > 0:
        order = flip(logits.view(torch.int32)).long()
        packed = pack_draw(order, torch.arange(logits.size(1), device=logits.device))
        ids = torch.cat((ids, packed.topk(num_top).indices), dim=1)
    return logits.gather(1, ids) - logits.logsumexp(dim=1, keepdim=True), ids, ranks


def top_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, log_softmax of the logits in float32, of given tokens and of each row's most likely ones.

    Args:
        logits: [B, V] of any float type, the elements of a row side by side; numbers or -inf, not all of a row -inf.
        token_ids: int64 [B], the given tokens; -1: none, and the results are those of token 0.
        num_top: how many of the most likely tokens are asked for, from 0 to V.

    Returns:
        Log-probabilities, float32 [B, 1 + num_top], and their tokens, int64 [B, 1 + num_top]: the given token, then
        the most likely ones in descending order, of equally likely ones the lower id first. And the ranks of the given
        tokens, int64 [B]: 1 plus how many tokens are more likely.
    """
    if not use_triton(logits) or num_top > MOST_TOP:
        return top_logprobs_torch(logits, token_ids, num_top)
    batch_size, vocab_size = logits.shape
    num_parts = triton.cdiv(vocab_size, LANES * TILES)

    def empty(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((batch_size, *size), dtype=dtype, device=logits.device)

    best = empty(num_parts, num_top, dtype=torch.int64)
    high, mass = (empty(num_parts, dtype=torch.float32) for _ in range(2))
    count = empty(num_parts, dtype=torch.int32)
    given = logits, logits.stride(0), token_ids.contiguous()
    parts = best, high, mass, count
    results = empty(1 + num_top, dtype=torch.float32), empty(1 + num_top, dtype=torch.int64), empty(dtype=torch.int64)
    _part_kernel[(batch_size, num_parts)](
        *given, *parts, vocab_size, num_top, LANES=LANES, TILES=TILES, num_warps=NUM_WARPS
    )
    _merge_kernel[(batch_size,)](
        *given, *parts, *results, num_parts, num_top, PARTS=triton.next_power_of_2(num_parts), num_warps=1
    )
    return results
