# ruff: noqa: ANN001, ANN201 (Triton types the arguments of its kernels itself)
"""How the attention of a decode step is shared out, so that all programs have as much to read, and put together again.

A unit is one row and KV head; its keys stand in tiles. The tiles of all units stand in one line that is cut into
shares, one a program, wherever the cuts fall. After LeanAttention (Sanovar et al., 2024).

Device functions of `paged_decode`'s kernel. This file knows nothing of queries, pages or softmax over keys.
"""

from nanovllm.kernels import tl, triton


@triton.jit
def merge_parts(partial_ptr, lse_ptr, first, last, o_ptr, COLS: tl.constexpr, DIM: tl.constexpr) -> None:
    """Puts the attention of one (row, KV head) together from its parts first..last.

    partial_ptr: float32 [parts, COLS], a part's query heads one after another, DIM columns each. lse_ptr: float32
    [parts, COLS / DIM], their log-sum-exps in base 2. o_ptr: COLS elements.
    """
    COLS_PAD: tl.constexpr = triton.next_power_of_2(COLS)
    UNROLL: tl.constexpr = max(1, min(8, 4096 // COLS_PAD))
    cols = tl.arange(0, COLS_PAD)
    acc = tl.zeros((COLS_PAD,), tl.float32)
    total = tl.zeros((COLS_PAD,), tl.float32)
    high = tl.full((COLS_PAD,), float("-inf"), tl.float32)
    for begin in range(first, last + 1, UNROLL):
        for i in tl.static_range(UNROLL):
            part = begin + i
            mask = cols < tl.where(part <= last, COLS, 0)
            lse = tl.load(lse_ptr + part * (COLS // DIM) + cols // DIM, mask=mask, other=float("-inf"))
            o = tl.load(partial_ptr + part * COLS + cols, mask=mask, other=0.0)
            new_high = tl.maximum(high, lse)
            weight = tl.exp2(lse - new_high)
            alpha = tl.exp2(high - new_high)
            acc = acc * alpha + o * weight
            total = total * alpha + weight
            high = new_high
    tl.store(o_ptr + cols, acc / total, mask=cols < COLS)


@triton.jit
def owner_of(tile, num_big, big, small):
    """The program whose share has the tile."""
    return tl.where(tile < num_big * big, tile // big, num_big + (tile - num_big * big) // small)


@triton.jit
def tiles_of(length, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """Which tiles of BLOCK_N keys a row with a context of `length` reads, for each head: (first, how many).

    With a WINDOW (0: none) those that its last WINDOW keys stand in. An empty row has one too, so that somebody writes
    its zeros.
    """
    first = tl.maximum(length - WINDOW, 0) // BLOCK_N if WINDOW else 0
    return first, tl.maximum(tl.cdiv(length, BLOCK_N) - first, 1)


@triton.jit
def find_work(
    lens_ptr,
    batch,
    num_big,
    KV_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS_PAD: tl.constexpr,
):
    """This program's tiles, as (first, end, row of the first, first tile of that row), and the two sizes of shares.

    lens_ptr: int32 [batch], the rows' contexts; ROWS_PAD is a power of two, batch or more. A tile is BLOCK_N keys. The
    line has those tiles alone that are read, see `tiles_of`. The first num_big programs take it in equal shares, or
    7/8 of it if there are others, which start as places on the GPU fall free: small shares of the rest, for the memory
    is not equally fast for all SMs.
    """
    rows = tl.arange(0, ROWS_PAD)
    lens = tl.load(lens_ptr + rows, mask=rows < batch, other=0)
    _first, num_tiles = tiles_of(lens, BLOCK_N, WINDOW)
    ends = tl.cumsum(tl.where(rows < batch, num_tiles * KV_HEADS, 0), 0)
    line = tl.max(ends, 0)
    num_small = tl.num_programs(0) - num_big
    big = tl.cdiv(line * tl.where(num_small > 0, 7, 8), 8 * num_big)
    small = tl.maximum(tl.cdiv(line - num_big * big, tl.maximum(num_small, 1)), 1)
    program = tl.program_id(0)
    tile = tl.minimum(program, num_big) * big + tl.maximum(program - num_big, 0) * small
    stop = tl.minimum(tile + tl.where(program < num_big, big, small), line)
    row = tl.sum((ends <= tile).to(tl.int32), 0)
    row_start = tl.max(tl.where(rows < row, ends, 0), 0)
    return tile, stop, row, row_start, big, small
