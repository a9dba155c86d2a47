# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Reading, advancing and writing the rows of the device's decode batch, in one kernel each instead of many."""

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import tl, triton, use_triton
from nanovllm.kernels.sampling import unpack_draw_jit, unpack_token_ids

ADVANCE_BLOCK = 256  # entries of a block table that a warp copies at once
STORE_BLOCK = 128  # rows that a warp stores at once


class DecodeInputs(NamedTuple):
    """What a step needs of B rows that decode one token."""

    tokens: Tensor  # int64 [B], the last ones
    positions: Tensor  # int32 [B], theirs
    slots: Tensor  # int32 [B], for their KV; -1: none
    context_lens: Tensor  # int32 [B], with them; 0 for padding
    block_tables: Tensor  # int32 [B, max_blocks]


def advance_rows_torch(
    rows: Tensor, last_tokens: Tensor, context_lens: Tensor, block_tables: Tensor, block_size: int
) -> DecodeInputs:
    """See `advance_rows`."""
    is_padding = rows == len(last_tokens) - 1
    positions, tables = context_lens[rows], block_tables[rows]
    blocks = tables.gather(1, (positions // block_size).long()[:, None])[:, 0]
    slots = torch.where(is_padding, -1, blocks * block_size + positions % block_size)
    lens = torch.where(is_padding, 0, positions + 1)
    context_lens[rows] = lens
    return DecodeInputs(last_tokens[rows], positions, slots, lens, tables)


@triton.jit
def _advance_kernel(
    rows_ptr,
    last_tokens_ptr,
    context_lens_ptr,
    block_tables_ptr,
    tokens_ptr,
    positions_ptr,
    slots_ptr,
    lens_ptr,
    tables_ptr,
    padding_row,
    max_blocks,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: copies its block table, BLOCK entries at a time, and what else `advance_rows` gives."""
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i)
    table_ptr = block_tables_ptr + row * max_blocks
    for begin in range(0, max_blocks, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        blocks = tl.load(table_ptr + offs, mask=offs < max_blocks, other=0)
        tl.store(tables_ptr + i.to(tl.int64) * max_blocks + offs, blocks, mask=offs < max_blocks)
    position = tl.load(context_lens_ptr + row)
    slot = tl.load(table_ptr + position // BLOCK_SIZE) * BLOCK_SIZE + position % BLOCK_SIZE
    is_padding = row == padding_row
    tl.store(tokens_ptr + i, tl.load(last_tokens_ptr + row))
    tl.store(positions_ptr + i, position)
    tl.store(slots_ptr + i, tl.where(is_padding, -1, slot))
    tl.store(lens_ptr + i, tl.where(is_padding, 0, position + 1))
    if not is_padding:
        tl.store(context_lens_ptr + row, position + 1)


def advance_rows(
    rows: Tensor, last_tokens: Tensor, context_lens: Tensor, block_tables: Tensor, block_size: int
) -> DecodeInputs:
    """What a step needs of the rows that decode one token, whose context lengths grow by it.

    Args:
        rows: int64 [B], each once, but for the padding row, which is the last one and stays empty.
        last_tokens: int64 [R]; context_lens: int32 [R], in place; block_tables: int32 [R, max_blocks].
        block_size: tokens of a block.
    """
    if not use_triton(rows):
        return advance_rows_torch(rows, last_tokens, context_lens, block_tables, block_size)
    batch_size, max_blocks = len(rows), block_tables.size(1)
    positions, slots, lens = torch.empty(3, batch_size, dtype=torch.int32, device=rows.device)
    tokens, tables = torch.empty_like(rows), block_tables.new_empty(batch_size, max_blocks)
    _advance_kernel[(batch_size,)](
        rows,
        last_tokens,
        context_lens,
        block_tables,
        tokens,
        positions,
        slots,
        lens,
        tables,
        padding_row=len(last_tokens) - 1,
        max_blocks=max_blocks,
        BLOCK_SIZE=block_size,
        BLOCK=ADVANCE_BLOCK,
        num_warps=1,
    )
    return DecodeInputs(tokens, positions, slots, lens, tables)


def store_tokens_torch(packed: Tensor, rows: Tensor, last_tokens: Tensor, ring: Tensor, count: Tensor) -> None:
    """See `store_tokens`."""
    token_ids = unpack_token_ids(packed)
    last_tokens[rows] = token_ids.clamp(min=0)
    ring[int(count) % len(ring), rows] = token_ids
    count += 1


@triton.jit
def _store_kernel(
    packed_ptr, rows_ptr, last_tokens_ptr, ring_ptr, count_ptr, batch_size, ring_size, num_rows, BLOCK: tl.constexpr
):
    """One program for all rows, BLOCK of them at a time; see `store_tokens`."""
    count = tl.load(count_ptr)
    ring_ptr += count % ring_size * num_rows
    for begin in range(0, batch_size, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        mask = offs < batch_size
        rows = tl.load(rows_ptr + offs, mask=mask)
        token_ids, is_token = unpack_draw_jit(tl.load(packed_ptr + offs, mask=mask))
        token_ids = tl.where(is_token, token_ids, -1)
        tl.store(last_tokens_ptr + rows, tl.maximum(token_ids, 0), mask=mask)
        tl.store(ring_ptr + rows, token_ids, mask=mask)
    tl.store(count_ptr, count + 1)


def store_tokens(packed: Tensor, rows: Tensor, last_tokens: Tensor, ring: Tensor, count: Tensor) -> None:
    """Writes sampled tokens to their rows, and to the host's memory, without a copy that the next step would wait for.

    Args:
        packed: int64 [B], as `draw` returns them; rows: int64 [B].
        last_tokens: int64 [R], in place; 0 where there is no token.
        ring: int64 [S, R] in (pinned) host memory; entry count % S is written, at the rows; -1 for no token.
        count: int64 [1] on the device, the steps so far; grows by one.
    """
    if not use_triton(rows):
        return store_tokens_torch(packed, rows, last_tokens, ring, count)
    ring_size, num_rows = ring.shape
    # One warp: the count must not be written before all have read it.
    _store_kernel[(1,)](
        packed,
        rows,
        last_tokens,
        ring,
        count,
        batch_size=len(rows),
        ring_size=ring_size,
        num_rows=num_rows,
        BLOCK=STORE_BLOCK,
        num_warps=1,
    )
