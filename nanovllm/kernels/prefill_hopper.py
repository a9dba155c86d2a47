# ruff: noqa: ANN001, ANN202 (Gluon types the arguments of its kernels itself)
"""`paged_prefill` as Hopper wants it, after FlashAttention-3 (Shah et al., 2024).

Long prompts are bound by tensor cores, which rest while the softmax is computed, unless somebody else has work for
them. Here a program is three groups of warps. One brings tiles of keys and values from their pages to shared memory,
as far ahead as there is room. The other two have 64 rows each: while one computes its weights, the other multiplies;
and each lets the products of its next keys and its last values run beside its softmax.

Written in Gluon, Triton's language in which layouts, barriers and asynchronous products are explicit. No interpreter
runs it, so its tests need the GPU.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanovllm.kernels import triton

# Its name up to Triton 3.6, and later.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

ROWS = gl.constexpr(64)  # of a group of warps, as many as its instructions multiply
BLOCK_N = gl.constexpr(128)  # keys of a tile; with 64 the card gives 510 in place of 610 TFLOP/s
STAGES = gl.constexpr(2)  # tiles of keys, and of values, in shared memory at once
LAYOUT_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _bring_tiles(k_desc, v_desc, table_ptr, column, num_tiles, ring, BLOCK_SIZE: gl.constexpr):
    """Loads a sequence's tiles of one head, whose dimensions begin at `column`, into the ring, round and round.

    ring: tiles of K and of V [STAGES, BLOCK_N, DIM], and of each a barrier that says when it can be read, and one
    when both groups have done so.
    """
    k_tiles, v_tiles, k_ready, v_ready, k_free, v_free = ring
    for i in range(num_tiles):
        stage, is_odd_round = i % STAGES, i // STAGES & 1
        key = i * BLOCK_N
        slot = gl.load(table_ptr + key // BLOCK_SIZE) * BLOCK_SIZE + key % BLOCK_SIZE
        mbarrier.wait(k_free.index(stage), is_odd_round ^ 1)
        mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
        load_tile(k_desc, [slot, column], k_ready.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_free.index(stage), is_odd_round ^ 1)
        mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
        load_tile(v_desc, [slot, column], v_ready.index(stage), v_tiles.index(stage))


@gluon.jit
def _weigh(scores, key, high, total, last_keys, seen_by_all, scale):
    """Online softmax of a tile's scores, whose keys begin at `key`: see `attend_pages`.

    Returns the weights, the new highest score and sum of weights of each row, and by what earlier ones shrink. A row
    sees the keys up to its last one; the first `seen_by_all` keys need no mask.
    """
    layout: gl.constexpr = scores.type.layout
    if key + BLOCK_N > seen_by_all:
        keys = key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
        scores = gl.where(keys[None, :] <= last_keys[:, None], scores, float("-inf"))
    new_high = gl.maximum(high, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_high[:, None])
    shrink = gl.exp2(high - new_high)
    return weights, new_high, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _attend(
    q_ptr, o_ptr, rows, keys, scale, q_tile, ring, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr
):
    """Attention of ROWS rows of one sequence and KV head over the tiles that arrive in the ring.

    rows: the first one, how many the sequence has in this step, and where its tokens begin in q; and the head.
    keys: the number of tiles, and the keys that all rows see, those from earlier steps, and all of the sequence.
    """
    k_tiles, v_tiles, k_ready, v_ready, k_free, v_free = ring
    first_row, num_rows, start, head = rows
    num_tiles, seen_by_all, past, context = keys
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, k_width=2)
    o_row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    wide_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])  # 16 bytes a thread
    q_offs, q_mask = _offsets(wide_layout, first_row, num_rows, start, head, KV_HEADS, GROUP, DIM)
    q_tile.store(gl.load(q_ptr + q_offs, mask=q_mask, other=0.0))
    fence_async_shared()
    last_keys = past + (first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, score_layout))) // GROUP
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
    high = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, score_layout))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, score_layout))
    o = gl.zeros([ROWS, DIM], gl.float32, o_layout)
    mbarrier.wait(k_ready.index(0), 0)
    scores = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), zeros, use_acc=False)
    mbarrier.arrive(k_free.index(0))
    weights, high, total, _ = _weigh(scores, 0, high, total, last_keys, seen_by_all, scale)
    weights = gl.convert_layout(weights.to(dtype), weight_layout)
    mbarrier.wait(k_ready.index(1), 0, pred=num_tiles > 1)
    for i in range(1, num_tiles):
        stage, before = i % STAGES, (i - 1) % STAGES
        scores = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(before), (i - 1) // STAGES & 1)
        o = warpgroup_mma(weights, v_tiles.index(before), o, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(stage))
        new_weights, high, total, shrink = _weigh(scores, i * BLOCK_N, high, total, last_keys, seen_by_all, scale)
        new_weights = gl.convert_layout(new_weights.to(dtype), weight_layout)
        # Here, not where the next round begins: ptxas moves no instruction across this wait, else it would put the
        # one below ahead of the softmax.
        mbarrier.wait(k_ready.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i + 1 < num_tiles)
        o, weights = warpgroup_mma_wait(0, deps=[o, new_weights])
        mbarrier.arrive(v_free.index(before))
        o *= gl.convert_layout(shrink, o_row_layout)[:, None]
    last = (num_tiles - 1) % STAGES
    mbarrier.wait(v_ready.index(last), (num_tiles - 1) // STAGES & 1)
    num_valid = context - (num_tiles - 1) * BLOCK_N
    if num_valid < BLOCK_N:
        # Behind the sequence's end its page has what another one left there, which 0 does not silence if it is NaN.
        # Both groups write the same.
        values = v_tiles.index(last).load(wide_layout)
        is_valid = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, wide_layout)) < num_valid
        v_tiles.index(last).store(gl.where(is_valid[:, None], values, 0.0))
        fence_async_shared()
    o = warpgroup_mma(weights, v_tiles.index(last), o)
    o /= gl.convert_layout(total, o_row_layout)[:, None]
    o_offs, o_mask = _offsets(o_layout, first_row, num_rows, start, head, KV_HEADS, GROUP, DIM)
    gl.store(o_ptr + o_offs, o.to(dtype), mask=o_mask)


@gluon.jit
def _offsets(
    LAYOUT: gl.constexpr,
    first_row,
    num_rows,
    start,
    head,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
):
    """Where ROWS rows of a sequence stand in q and o, [ROWS, DIM], and which of them there are."""
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))
    heads = (start + rows // GROUP).to(gl.int64) * (KV_HEADS * GROUP) + head * GROUP + rows % GROUP
    return heads[:, None] * DIM + dims[None, :], (rows < num_rows)[:, None]


@gluon.jit(do_not_specialize=["num_seqs"], do_not_specialize_on_alignment=["tables_ptr", "lens_ptr", "starts_ptr"])
def _prefill_kernel(
    q_ptr,
    k_desc,
    v_desc,
    o_ptr,
    tables_ptr,
    table_stride,
    lens_ptr,
    scale,
    starts_ptr,
    num_seqs,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    SEQS_PAD: gl.constexpr,
):
    """Arguments of `paged_prefill`; programs share the rows as those of its other kernel do, 2 * ROWS each.

    One head after the other, so that programs that run at once read the same keys and values: 8 prompts of 30,000
    tokens take 1% less than with all heads of a tile at once.
    """
    BLOCK_M: gl.constexpr = 2 * ROWS
    program = gl.num_programs(0) - 1 - gl.program_id(0)
    head = gl.program_id(1)
    seqs = gl.arange(0, SEQS_PAD, layout=gl.BlockedLayout([1], [32], [4], [0]))
    starts = gl.load(starts_ptr + seqs, mask=seqs < num_seqs, other=0)
    begun = (starts * GROUP // BLOCK_M + seqs <= program) & (seqs < num_seqs)
    seq = gl.sum(begun.to(gl.int32), 0) - 1
    start = gl.load(starts_ptr + seq)
    q_len = gl.load(starts_ptr + seq + 1) - start
    first_row = (program - start * GROUP // BLOCK_M - seq) * BLOCK_M
    context = gl.load(lens_ptr + seq)
    past = context - q_len
    end = gl.minimum(past + (first_row + BLOCK_M - 1) // GROUP + 1, context)
    if (first_row < q_len * GROUP) & (end > 0):
        num_tiles = gl.cdiv(end, BLOCK_N)
        keys = (num_tiles, past + first_row // GROUP + 1, past, context)
        rows = (first_row, q_len * GROUP, start, head)
        more_rows = (first_row + ROWS, q_len * GROUP, start, head)
        dtype: gl.constexpr = q_ptr.dtype.element_ty
        q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], dtype)
        q_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, DIM], q_layout)
        k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], k_desc.layout)
        v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], v_desc.layout)
        k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(k_ready.index(stage), count=1)
            mbarrier.init(v_ready.index(stage), count=1)
            mbarrier.init(k_free.index(stage), count=2)
            mbarrier.init(v_free.index(stage), count=2)
        fence_async_shared()
        ring = (k_tiles, v_tiles, k_ready, v_ready, k_free, v_free)
        table_ptr = tables_ptr + seq.to(gl.int64) * table_stride
        gl.warp_specialize(
            [
                (_attend, (q_ptr, o_ptr, rows, keys, scale, q_tiles.index(0), ring, KV_HEADS, GROUP, DIM)),
                (_attend, (q_ptr, o_ptr, more_rows, keys, scale, q_tiles.index(1), ring, KV_HEADS, GROUP, DIM)),
                (_bring_tiles, (k_desc, v_desc, table_ptr, head * DIM, num_tiles, ring, BLOCK_SIZE)),
            ],
            worker_num_warps=[4, 1],
            worker_num_regs=[240, 24],
        )


def prefill_hopper(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
) -> Tensor:
    """`paged_prefill` of what `takes_hopper_prefill` says, and as it; only the `scale` is one in base 2."""
    o = torch.empty_like(q)
    num_tokens, num_heads, dim = q.shape
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    group, num_seqs = num_heads // num_kv_heads, len(context_lens)
    tile = [BLOCK_N.value, dim]
    layout = gl.NVMMASharedLayout.get_default_for(tile, LAYOUT_DTYPES[q.dtype])
    k_desc, v_desc = (
        TensorDescriptor.from_tensor(cache.view(num_blocks * block_size, num_kv_heads * dim), tile, layout)
        for cache in (k_cache, v_cache)
    )
    _prefill_kernel[triton.cdiv(num_tokens * group, 2 * ROWS.value) + num_seqs, num_kv_heads](
        q,
        k_desc,
        v_desc,
        o,
        block_tables,
        block_tables.stride(0),
        context_lens,
        scale,
        cu_seqlens_q,
        num_seqs,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        DIM=dim,
        BLOCK_SIZE=block_size,
        SEQS_PAD=max(512, triton.next_power_of_2(num_seqs)),
        num_warps=4,
    )
    return o
