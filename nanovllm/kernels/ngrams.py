# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Drafts from the text itself: what followed its last tokens when they occurred before (prompt look-up decoding)."""

import torch
from torch import Tensor

from nanovllm.kernels import tl, triton, use_triton
from nanovllm.kernels.verify_rows import NUM_PROPOSED

LOOKUP_BLOCK = 1024  # positions that a program compares at once
LOOKUP_WARPS = 4


def propose_ngrams_torch(
    rows: Tensor,
    history: Tensor,
    context_lens: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    ring: Tensor,
    count: Tensor,
    shortest: int,
    longest: int,
    max_len: int,
) -> None:
    """See `propose_ngrams`."""
    lens = (context_lens[rows].long() + 1).clamp(max=max_len)[:, None]
    size, most = int(lens.max()), drafts.size(1)
    texts = history[rows, :size]
    ends = torch.arange(size, device=rows.device)
    agrees, agreement = ends < lens - 1, torch.zeros_like(texts)
    for i in range(longest):
        token = texts.gather(1, (lens - 1 - i).clamp(min=0))
        agrees = agrees & (ends >= i) & (texts.roll(i, dims=1) == token)
        agreement += agrees
    scores = torch.where(agreement >= shortest, agreement * size + ends, -1)
    best = scores.amax(1, keepdim=True)
    end = best.clamp(min=0) % size
    period = (lens - 1 - end).clamp(min=1)
    sources = end + 1 + torch.arange(most, device=rows.device) % period
    drafts[rows] = texts.gather(1, sources.clamp(max=size - 1))
    numbers = torch.where(best < 0, 0, (max_len - 1 - lens).clamp(0, most))[:, 0]
    num_drafts[rows] = numbers.int()
    ring[(int(count) - 1) % len(ring), rows, NUM_PROPOSED] = numbers


@triton.jit
def _propose_kernel(
    rows_ptr,
    history_ptr,
    context_lens_ptr,
    drafts_ptr,
    num_drafts_ptr,
    ring_ptr,
    count_ptr,
    history_size,
    max_len,
    ring_size,
    num_rows,
    report_size,
    NUM_PROPOSED: tl.constexpr,
    MOST: tl.constexpr,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: compares BLOCK earlier positions at a time with the end of its text; see `propose_ngrams`."""
    row = tl.load(rows_ptr + tl.program_id(0))
    text_ptr = history_ptr + row * history_size
    length = tl.minimum(tl.load(context_lens_ptr + row) + 1, max_len)
    last = length - 1
    best = tl.full((BLOCK,), -1, tl.int64)
    for begin in range(0, last, BLOCK):
        ends = begin + tl.arange(0, BLOCK)
        agrees = ends < last
        agreement = tl.zeros((BLOCK,), tl.int32)
        for i in tl.static_range(LONGEST):
            agrees = agrees & (ends >= i)
            tokens = tl.load(text_ptr + ends - i, mask=agrees, other=-1)
            agrees = agrees & (tokens == tl.load(text_ptr + tl.maximum(last - i, 0)))
            agreement += agrees.to(tl.int32)
        # The longest agreement and, of equally long ones, the latest.
        scores = (agreement.to(tl.int64) << 32) | ends
        best = tl.maximum(best, tl.where(agreement >= SHORTEST, scores, -1))
    score = tl.max(best, 0)
    number = tl.where(score < 0, 0, tl.minimum(tl.maximum(max_len - 1 - length, 0), MOST))
    tl.store(num_drafts_ptr + row, number)
    entry = (tl.load(count_ptr) - 1) % ring_size
    tl.store(ring_ptr + (entry * num_rows + row) * report_size + NUM_PROPOSED, number.to(tl.int64))
    if number > 0:
        end = (score & 0x7FFFFFFF).to(tl.int32)
        lanes = tl.arange(0, triton.next_power_of_2(MOST))
        drafts = tl.load(text_ptr + end + 1 + lanes % (last - end))
        tl.store(drafts_ptr + row * MOST + lanes, drafts, mask=lanes < MOST)


def propose_ngrams(
    rows: Tensor,
    history: Tensor,
    context_lens: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    ring: Tensor,
    count: Tensor,
    shortest: int,
    longest: int,
    max_len: int,
) -> None:
    """Proposes for each row what followed the longest of its text's ends that occurs earlier, the latest time it did.

    As in LZ77 a copy may run into what it copies: where less than D tokens followed, the text repeats itself. So a
    text in a loop gets as many drafts as there may be. (Prompt look-up decoding, A. Saxena, 2023.)

    Args:
        rows: int64 [B].
        history: int32 [R, max_len or more], the tokens by position; context_lens: int32 [R], one less than there are.
        drafts: int32 [R, D], in place, arbitrary from the number of drafts on; num_drafts: int32 [R], in place.
        ring: int64 [S, R, W] in (pinned) host memory; NUM_PROPOSED of entry (count - 1) % S is written at the rows.
        count: int64 [1] on the device, the steps so far, this one included.
        shortest, longest: tokens of an end that count, and that are compared.
        max_len: tokens that a text may have; no draft is proposed that could make it longer.
    """
    if not use_triton(rows):
        return propose_ngrams_torch(
            rows, history, context_lens, drafts, num_drafts, ring, count, shortest, longest, max_len
        )
    ring_size, num_rows, report_size = ring.shape
    _propose_kernel[(len(rows),)](
        rows,
        history,
        context_lens,
        drafts,
        num_drafts,
        ring,
        count,
        history_size=history.size(1),
        max_len=max_len,
        ring_size=ring_size,
        num_rows=num_rows,
        report_size=report_size,
        NUM_PROPOSED=NUM_PROPOSED,
        MOST=drafts.size(1),
        SHORTEST=shortest,
        LONGEST=longest,
        BLOCK=LOOKUP_BLOCK,
        num_warps=LOOKUP_WARPS,
    )
