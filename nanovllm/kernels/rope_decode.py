# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""A decode step of few rows from the fused QKV projection to attention's result, in one kernel.

With few rows attention is a chain of waits: for the queries, the block table, keys and values, for other programs'
parts. Here a program reads its keys and values while the projection is still computed: all but the newest are in the
cache from earlier steps. Behind the wait it makes queries and the newest key and value by itself, and stores these.
"""

import torch
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton, use_triton
from nanovllm.kernels.attend_pages import attend_pages
from nanovllm.kernels.decode_shares import merge_parts, tiles_of
from nanovllm.kernels.e4m3 import E4M3, E4M3_MAX
from nanovllm.kernels.paged_attention import compiled_for, kernel_scales
from nanovllm.kernels.paged_attention_torch import paged_attention_torch
from nanovllm.kernels.rotation import load_heads, load_turn, rotate
from nanovllm.kernels.store_kvcache import rope_store_kvcache_torch, stored
from nanovllm.kernels.tuning import (
    MIN_ROPE_DECODE_SPLITS,
    ROPE_DECODE_STAGES,
    ROPE_DECODE_WARPS,
    gpu_of,
    rope_decode_splits,
)


@triton.jit
def _capped(scores, SOFT_CAP: tl.constexpr):
    """Scores, or their tanh as `attend_pages` says."""
    if SOFT_CAP > 0:
        scores = SOFT_CAP * (1.0 - 2.0 / (tl.exp(scores * (2.0 / SOFT_CAP)) + 1.0))
    return scores


@triton.jit
def _attend_tile(q, k, v, seen, new_k, new_v, has_new, scale, v_scale, SOFT_CAP: tl.constexpr):
    """Attention of q [M, DIM padded] over a tile of keys, of which it sees [1, N], and the newest one if it is there.

    Returns o, float32 like q, and of each row the highest score and the sum of weights beside it, float32 [M]: -inf
    and 0 for a padding row, which sees nothing.
    """
    scores = _capped(tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale, SOFT_CAP)
    scores = tl.where(seen, scores, float("-inf"))
    new_score = _capped(tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * scale, SOFT_CAP)
    new_score = tl.where(has_new, new_score, float("-inf"))
    high = tl.maximum(tl.max(scores, 1), new_score)
    shift = tl.where(high == float("-inf"), 0.0, high)
    p, new_p = tl.exp2(scores - shift[:, None]), tl.exp2(new_score - shift)
    total = tl.sum(p, 1) + new_p
    o = tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision="ieee") + new_p[:, None] * new_v.to(tl.float32)
    if v_scale is not None:
        o *= v_scale
    return o / tl.where(total == 0.0, 1.0, total)[:, None], high, total


@triton.jit
def _rope_decode_kernel(
    qkv_ptr,
    qkv_stride,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    k_ptr,
    v_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    tables_ptr,
    table_stride,
    lens_ptr,
    scale,
    v_scale,
    k_inverse_scale,
    v_inverse_scale,
    o_ptr,
    partial_ptr,
    lse_ptr,
    semaphores_ptr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    MAX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Arguments of `rope_decode`; a program has a part of the keys of one row and KV head.

    partial_ptr: float32 [B * KV_HEADS * SPLITS, GROUP * DIM], lse_ptr: [..., GROUP], what the parts give. (It is long
    by its arguments, and as one thing after another has to be read early.)
    """
    NORMED: tl.constexpr = q_norm_ptr is not None
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    unit = row * KV_HEADS + head
    length = tl.load(lens_ptr + row)
    oldest = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    first_tile, num_tiles = tiles_of(length, BLOCK_N, WINDOW)
    share = tl.cdiv(num_tiles, SPLITS)
    num_parts = tl.cdiv(num_tiles, share)
    if split >= num_parts:
        return  # without the wait, as it writes nothing: there is room for programs of the next kernel
    begin = (first_tile + split * share) * BLOCK_N
    end = tl.minimum(begin + share * BLOCK_N, length)
    k_ptr += head * DIM
    v_ptr += head * DIM
    tables_ptr += row.to(tl.int64) * table_stride
    old_end = tl.minimum(end, length - 1)
    columns = begin + tl.arange(0, BLOCK_N)[None, :]
    keys = begin + tl.arange(0, BLOCK_N)[:, None]
    heads = tl.arange(0, max(16, triton.next_power_of_2(GROUP)))[:, None]
    dims = tl.arange(0, max(16, triton.next_power_of_2(DIM)))[None, :]
    is_old = (keys >= oldest) & (keys < old_end)
    blocks = tl.load(tables_ptr + keys // BLOCK_SIZE, mask=is_old, other=0).to(tl.int64)
    offs = (blocks * BLOCK_SIZE + keys % BLOCK_SIZE) * (KV_HEADS * DIM) + dims
    k = tl.load(k_ptr + offs, mask=is_old & (dims < DIM), other=0.0)
    v = tl.load(v_ptr + offs, mask=is_old & (dims < DIM), other=0.0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    cos_sin_ptr += tl.load(positions_ptr + row).to(tl.int64) * ROTARY_DIM
    q_turn = load_turn(cos_sin_ptr, q_norm_ptr, DIM, ROTARY_DIM)
    k_turn = load_turn(cos_sin_ptr, k_norm_ptr, DIM, ROTARY_DIM)
    pdl_wait(PDL)
    row_ptr = qkv_ptr + row.to(tl.int64) * qkv_stride
    k_in = row_ptr + (KV_HEADS * GROUP + head) * DIM
    new_v = tl.load(k_in + KV_HEADS * DIM + dims, mask=dims < DIM, other=0.0)
    k_pairs = load_heads(k_in, tl.arange(0, 1)[:, None], 1, DIM, ROTARY_DIM)
    tl.debug_barrier()  # or the compiler would move these loads behind what is made of the next
    q_pairs = load_heads(row_ptr + head * (GROUP * DIM), heads, GROUP, DIM, ROTARY_DIM)
    q = rotate(q_pairs, q_turn, eps, NORMED, DIM).to(qkv_ptr.dtype.element_ty)
    new_k = stored(rotate(k_pairs, k_turn, eps, NORMED, DIM), k_inverse_scale, MAX).to(k.dtype)
    new_v = stored(new_v, v_inverse_scale, MAX)
    has_new = end == length
    new_offs = slot * (KV_HEADS * DIM) + dims
    new_mask = dims < tl.where(has_new & (slot >= 0), DIM, 0)
    tl.store(k_ptr + new_offs, new_k, mask=new_mask)
    tl.store(v_ptr + new_offs, new_v, mask=new_mask)
    seen = (columns >= oldest) & (columns < old_end)
    o, high, total = _attend_tile(q, k, v, seen, new_k, new_v, has_new & (length > 0), scale, v_scale, SOFT_CAP)
    if begin + BLOCK_N < old_end:
        rest, rest_lse = attend_pages(
            q,
            k_ptr,
            v_ptr,
            tables_ptr,
            borders=(begin + BLOCK_N, old_end),
            oldest=oldest,
            first_key=oldest,
            last_key=old_end - 1,
            scale=scale,
            v_scale=v_scale,
            WINDOW=WINDOW,
            SOFT_CAP=SOFT_CAP,
            KV_HEADS=KV_HEADS,
            DIM=DIM,
            BLOCK_SIZE=BLOCK_SIZE,
            BLOCK_N=BLOCK_N,
            STAGES=STAGES,
        )
        lse = high + tl.log2(total)
        high = tl.maximum(lse, rest_lse)
        weight, rest_weight = tl.exp2(lse - high), tl.exp2(rest_lse - high)
        total = weight + rest_weight
        o = (o * weight[:, None] + rest * rest_weight[:, None]) / total[:, None]
    o_ptr += unit.to(tl.int64) * (GROUP * DIM)
    o_offs, o_mask = heads * DIM + dims, (heads < GROUP) & (dims < DIM)
    if num_parts == 1:
        tl.store(o_ptr + o_offs, o, mask=o_mask)
    else:
        part = unit * SPLITS + split
        tl.store(partial_ptr + part * (GROUP * DIM) + o_offs, o, mask=o_mask)
        tl.store(lse_ptr + part * GROUP + heads, (high + tl.log2(total))[:, None], mask=heads < GROUP)
        tl.debug_barrier()
        if tl.atomic_add(semaphores_ptr + unit, 1, sem="acq_rel") == num_parts - 1:
            first = unit * SPLITS
            merge_parts(partial_ptr, lse_ptr, first, first + num_parts - 1, o_ptr, GROUP * DIM, DIM)
            tl.store(semaphores_ptr + unit, 0)


def takes_rope_decode(qkv: Tensor, num_kv_heads: int) -> bool:
    """Whether `rope_decode` is the faster way for a step of one token each of these rows."""
    if not use_triton(qkv):
        return False
    return rope_decode_splits(len(qkv) * num_kv_heads, gpu_of(qkv.device)) >= MIN_ROPE_DECODE_SPLITS


def rope_decode_torch(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """What `rope_decode` computes: the rotation and the store, then attention."""
    caches = k_cache, v_cache
    q = rope_store_kvcache_torch(qkv, cos_sin, positions, slot_mapping, *caches, q_norm, k_norm, eps, k_scale, v_scale)
    starts = torch.arange(len(q) + 1)
    return paged_attention_torch(
        q, *caches, block_tables, context_lens, starts, scale, window, soft_cap, k_scale, v_scale
    )


def rope_decode(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    block_tables: Tensor,
    context_lens: Tensor,
    semaphores: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """`rope_store_kvcache` and `paged_decode` in one kernel, for few rows, see `takes_rope_decode`.

    Args as those two take them. Read early, see `pdl_wait`, are also `block_tables`, and of the caches what earlier
    tokens have stored.

    Returns:
        [B, Hq, D], in qkv's dtype.
    """
    if not use_triton(qkv):
        return rope_decode_torch(
            qkv,
            cos_sin,
            positions,
            slot_mapping,
            k_cache,
            v_cache,
            q_norm,
            k_norm,
            eps,
            block_tables,
            context_lens,
            scale,
            window,
            soft_cap,
            k_scale,
            v_scale,
        )
    num_kv_heads, dim = k_cache.shape[2:]
    batch_size, num_heads = len(qkv), qkv.size(1) // dim - 2 * num_kv_heads
    units, group, is_fp8 = batch_size * num_kv_heads, num_heads // num_kv_heads, k_cache.dtype == E4M3
    splits = rope_decode_splits(units, gpu_of(qkv.device))
    o = torch.empty((batch_size, num_heads, dim), dtype=qkv.dtype, device=qkv.device)
    partial = torch.empty((units * splits, group, dim), dtype=torch.float32, device=qkv.device)
    lse = torch.empty((units * splits, group), dtype=torch.float32, device=qkv.device)
    compiled = compiled_for(num_heads, k_cache.shape, qkv.dtype, qkv.device, window, soft_cap, is_fp8=is_fp8)
    compiled = compiled | {"STAGES": ROPE_DECODE_STAGES, "num_warps": ROPE_DECODE_WARPS}
    _rope_decode_kernel[splits, num_kv_heads, batch_size](
        qkv,
        qkv.stride(0),
        cos_sin,
        positions,
        slot_mapping,
        k_cache,
        v_cache,
        q_norm,
        k_norm,
        eps,
        block_tables,
        block_tables.stride(0),
        context_lens,
        *kernel_scales(k_cache, scale, k_scale, v_scale),
        1.0 / k_scale if is_fp8 else None,
        1.0 / v_scale if is_fp8 else None,
        o,
        partial,
        lse,
        semaphores,
        ROTARY_DIM=cos_sin.size(1),
        SPLITS=splits,
        MAX=E4M3_MAX,
        **compiled,
        **pdl_options(qkv.device),
    )
    return o
