# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Rows whose drafts a step checks: laid out as tokens of their own, and what of the draws comes to stay."""

import torch
from torch import Tensor

from nanovllm.kernels import tl, triton, use_triton
from nanovllm.kernels.decode_rows import ADVANCE_BLOCK, STORE_BLOCK, DecodeInputs
from nanovllm.kernels.sampling import unpack_draw_jit, unpack_token_ids

# What a row reports of a step to the host: numbers, then its new tokens.
NUM_TOKENS = 0  # one more than drafts were accepted
NUM_CHECKED = 1  # drafts
NUM_PROPOSED = 2  # drafts for the next step
REPORT_HEAD = 3  # numbers before the tokens


def lay_out_drafts_torch(
    rows: Tensor,
    last_tokens: Tensor,
    drafts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    block_size: int,
    num_drafts: int,
    max_len: int,
) -> DecodeInputs:
    """See `lay_out_drafts`."""
    is_padding = (rows == len(last_tokens) - 1)[:, None]
    offsets = torch.arange(1 + num_drafts, dtype=torch.int32, device=rows.device)
    positions = context_lens[rows][:, None] + offsets
    is_outside = is_padding | (positions >= max_len)
    positions = positions.clamp(max=max_len - 1)
    tables = block_tables[rows]
    blocks = tables.gather(1, (positions // block_size).long())
    slots = torch.where(is_outside, -1, blocks * block_size + positions % block_size)
    lens = torch.where(is_padding, 0, positions + 1)
    tokens = torch.cat([last_tokens[rows][:, None], drafts[rows, :num_drafts].long()], dim=1)
    context_lens[rows] += (~is_padding[:, 0]).int()
    tables = tables.repeat_interleave(1 + num_drafts, dim=0)
    return DecodeInputs(tokens.flatten(), positions.flatten(), slots.flatten(), lens.flatten(), tables)


@triton.jit
def _lay_out_kernel(
    rows_ptr,
    last_tokens_ptr,
    drafts_ptr,
    context_lens_ptr,
    block_tables_ptr,
    tokens_ptr,
    positions_ptr,
    slots_ptr,
    lens_ptr,
    tables_ptr,
    padding_row,
    max_blocks,
    max_drafts,
    max_len,
    BLOCK_SIZE: tl.constexpr,
    NUM_DRAFTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its block table once for each token, BLOCK entries at a time, and what else `lay_out_drafts` gives."""
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i)
    table_ptr = block_tables_ptr + row * max_blocks
    first = i.to(tl.int64) * (1 + NUM_DRAFTS)
    for begin in range(0, max_blocks, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        blocks = tl.load(table_ptr + offs, mask=offs < max_blocks, other=0)
        for j in range(1 + NUM_DRAFTS):
            tl.store(tables_ptr + (first + j) * max_blocks + offs, blocks, mask=offs < max_blocks)
    is_padding = row == padding_row
    context_len = tl.load(context_lens_ptr + row)
    lanes = tl.arange(0, triton.next_power_of_2(1 + NUM_DRAFTS))
    mask = lanes <= NUM_DRAFTS
    positions = context_len + lanes
    is_outside = is_padding | (positions >= max_len)
    positions = tl.minimum(positions, max_len - 1)
    blocks = tl.load(table_ptr + positions // BLOCK_SIZE, mask=mask, other=0)
    last_token = tl.load(last_tokens_ptr + row)
    drafts = tl.load(drafts_ptr + row * max_drafts + lanes - 1, mask=mask & (lanes > 0), other=0).to(tl.int64)
    tl.store(tokens_ptr + first + lanes, tl.where(lanes == 0, last_token, drafts), mask=mask)
    tl.store(positions_ptr + first + lanes, positions, mask=mask)
    slots = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
    tl.store(slots_ptr + first + lanes, tl.where(is_outside, -1, slots), mask=mask)
    tl.store(lens_ptr + first + lanes, tl.where(is_padding, 0, positions + 1), mask=mask)
    # All warps must have read it before one writes it: there is but one.
    if not is_padding:
        tl.store(context_lens_ptr + row, context_len + 1)


def lay_out_drafts(
    rows: Tensor,
    last_tokens: Tensor,
    drafts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    block_size: int,
    num_drafts: int,
    max_len: int,
) -> DecodeInputs:
    """What a step needs of B rows whose last token and `num_drafts` drafts are computed, row by row.

    Each of the N = B * (1 + num_drafts) tokens stands for a row that decodes it. Context lengths grow by the last
    token alone; `store_verified` adds the accepted drafts.

    Args:
        rows: int64 [B], each once, but for the padding row, which is the last one and stays empty.
        last_tokens: int64 [R]; context_lens: int32 [R], in place; block_tables: int32 [R, max_blocks].
        drafts: int32 [R, num_drafts or more], arbitrary tokens where a row has fewer.
        block_size: tokens of a block.
        num_drafts: of each row.
        max_len: positions from it on are not stored, and computed as the one before it.
    """
    if not use_triton(rows):
        return lay_out_drafts_torch(
            rows, last_tokens, drafts, context_lens, block_tables, block_size, num_drafts, max_len
        )
    batch_size, max_blocks = len(rows), block_tables.size(1)
    num_tokens = batch_size * (1 + num_drafts)
    positions, slots, lens = torch.empty(3, num_tokens, dtype=torch.int32, device=rows.device)
    tokens, tables = rows.new_empty(num_tokens), block_tables.new_empty(num_tokens, max_blocks)
    _lay_out_kernel[(batch_size,)](
        rows,
        last_tokens,
        drafts,
        context_lens,
        block_tables,
        tokens,
        positions,
        slots,
        lens,
        tables,
        padding_row=len(last_tokens) - 1,
        max_blocks=max_blocks,
        max_drafts=drafts.size(1),
        max_len=max_len,
        BLOCK_SIZE=block_size,
        NUM_DRAFTS=num_drafts,
        BLOCK=ADVANCE_BLOCK,
        num_warps=1,
    )
    return DecodeInputs(tokens, positions, slots, lens, tables)


def store_verified_torch(
    packed: Tensor,
    rows: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    history: Tensor,
    last_tokens: Tensor,
    context_lens: Tensor,
    ring: Tensor,
    count: Tensor,
    max_len: int,
) -> None:
    """See `store_verified`."""
    draws = unpack_token_ids(packed).view(len(rows), -1)
    most = draws.size(1) - 1
    checked = num_drafts[rows].clamp(max=most).long()
    is_draft = torch.arange(most, device=rows.device) < checked[:, None]
    accepted = ((draws[:, :most] == drafts[rows, :most]) & is_draft).long().cumprod(1).sum(1)
    positions = context_lens[rows].long()[:, None] + torch.arange(1 + most, device=rows.device)
    stays = torch.arange(1 + most, device=rows.device) <= accepted[:, None]
    is_stored = stays & (positions < max_len)
    history[rows[:, None].expand_as(draws)[is_stored], positions[is_stored]] = draws[is_stored].clamp(min=0).int()
    last_tokens[rows] = draws.gather(1, accepted[:, None])[:, 0].clamp(min=0)
    context_lens[rows] += torch.where(rows == len(last_tokens) - 1, 0, accepted).int()
    entry = ring[int(count) % len(ring)]
    entry[rows, NUM_TOKENS] = 1 + accepted
    entry[rows, NUM_CHECKED] = checked
    entry[rows, REPORT_HEAD : REPORT_HEAD + 1 + most] = draws
    count += 1


@triton.jit
def _store_verified_kernel(
    packed_ptr,
    rows_ptr,
    drafts_ptr,
    num_drafts_ptr,
    history_ptr,
    last_tokens_ptr,
    context_lens_ptr,
    ring_ptr,
    count_ptr,
    batch_size,
    ring_size,
    num_rows,
    report_size,
    max_drafts,
    history_size,
    max_len,
    MOST: tl.constexpr,
    REPORT_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for all rows, BLOCK of them at a time; see `store_verified`."""
    count = tl.load(count_ptr)
    ring_ptr += count % ring_size * num_rows * report_size
    for begin in range(0, batch_size, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        mask = offs < batch_size
        rows = tl.load(rows_ptr + offs, mask=mask, other=0)
        checked = tl.minimum(tl.load(num_drafts_ptr + rows, mask=mask, other=0), MOST)
        context_lens = tl.load(context_lens_ptr + rows, mask=mask, other=0)
        report_ptr = ring_ptr + rows * report_size
        accepted = tl.zeros((BLOCK,), tl.int32)
        last_tokens = tl.zeros((BLOCK,), tl.int64)
        for j in range(1 + MOST):
            draws, is_token = unpack_draw_jit(tl.load(packed_ptr + offs * (1 + MOST) + j, mask=mask, other=0))
            draws = tl.where(is_token, draws, -1)
            tl.store(report_ptr + REPORT_HEAD + j, draws, mask=mask)
            stays = mask & (accepted == j)
            last_tokens = tl.where(stays, tl.maximum(draws, 0), last_tokens)
            place_ptr = history_ptr + rows * history_size + context_lens + j
            tl.store(place_ptr, tl.maximum(draws, 0).to(tl.int32), mask=stays & (context_lens + j < max_len))
            is_draft = stays & (j < checked)
            drafts = tl.load(drafts_ptr + rows * max_drafts + j, mask=is_draft, other=-2)
            accepted += (is_draft & (draws == drafts)).to(tl.int32)
        tl.store(last_tokens_ptr + rows, last_tokens, mask=mask)
        tl.store(context_lens_ptr + rows, context_lens + accepted, mask=mask & (rows != num_rows - 1))
        tl.store(report_ptr, 1 + accepted.to(tl.int64), mask=mask)
        tl.store(report_ptr + 1, checked.to(tl.int64), mask=mask)
    tl.store(count_ptr, count + 1)


def store_verified(
    packed: Tensor,
    rows: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    history: Tensor,
    last_tokens: Tensor,
    context_lens: Tensor,
    ring: Tensor,
    count: Tensor,
    max_len: int,
) -> None:
    """Keeps of each row's draws those up to the first that is not its draft, and reports them to the host.

    As `store_tokens`, which it stands for if a row may have drafts.

    Args:
        packed: int64 [B * (1 + D)], as `draw` returns them: 1 + D of each row, of which D may have been drafted.
        rows: int64 [B]; the padding row, which is the last one, stays empty.
        drafts: int32 [R, D or more]; num_drafts: int32 [R], how many of them there are.
        history: int32 [R, max_len or more], a row's tokens by position; the kept ones are added.
        last_tokens: int64 [R], in place; 0 where there is no token.
        context_lens: int32 [R], with the last token, that is the new one's position; grows by the accepted drafts.
        ring: int64 [S, R, REPORT_HEAD + 1 + D or more] in (pinned) host memory; of entry count % S, the rows' reports
            are written but for NUM_PROPOSED; a token is -1 where there is none.
        count: int64 [1] on the device, the steps so far; grows by one.
        max_len: tokens at positions from it on are reported, but not added to the history.
    """
    if not use_triton(rows):
        return store_verified_torch(
            packed, rows, drafts, num_drafts, history, last_tokens, context_lens, ring, count, max_len
        )
    ring_size, num_rows, report_size = ring.shape
    # One warp: the count must not be written before all have read it.
    _store_verified_kernel[(1,)](
        packed,
        rows,
        drafts,
        num_drafts,
        history,
        last_tokens,
        context_lens,
        ring,
        count,
        batch_size=len(rows),
        ring_size=ring_size,
        num_rows=num_rows,
        report_size=report_size,
        max_drafts=drafts.size(1),
        history_size=history.size(1),
        max_len=max_len,
        MOST=len(packed) // len(rows) - 1,
        REPORT_HEAD=REPORT_HEAD,
        BLOCK=STORE_BLOCK,
        num_warps=1,
    )
