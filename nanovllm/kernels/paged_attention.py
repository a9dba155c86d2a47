# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Causal attention of new queries over a paged KV cache.

This step's keys and values are in the cache already, so attention reads one place only: a layer's K and V, each
[num_blocks, block_size, Hkv, D], through block tables that list the blocks of every sequence.
`paged_attention_torch`, in the file of its name, is the definition and the CPU path; `paged_prefill` (any number of
queries a sequence) and `paged_decode` (exactly one) are its fast forms. Pages hold a power of two of tokens, 16 or
more; D is at most 256.
"""

import functools

import torch
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton, use_triton
from nanovllm.kernels.attend_pages import attend_pages
from nanovllm.kernels.decode_shares import find_work, merge_parts, owner_of, tiles_of
from nanovllm.kernels.e4m3 import E4M3
from nanovllm.kernels.paged_attention_torch import paged_attention_torch
from nanovllm.kernels.tuning import (
    ATTENTION_WARPS,
    FP8_DECODE_REGISTERS,
    HOPPER_PREFILL_TOKENS,
    attention_tiles,
    decode_programs,
    gpu_of,
    prefill_rows,
)

LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["batch", "num_big"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    partial_ptr,
    lse_ptr,
    semaphores_ptr,
    tables_ptr,
    table_stride,
    lens_ptr,
    scale,
    v_scale,
    batch,
    num_big,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Arguments of `paged_decode`, and where units in several parts are put together from, see `merge_parts`.

    A row's queries and results stand head by head, KV_HEADS * GROUP of them, of DIM elements each. semaphores_ptr:
    int32 [batch * KV_HEADS], the parts of a unit that are done; who finds all others done zeroes it again. (It is long
    by its arguments, and its loop is one thought: from a program's tiles to results.)
    """
    tile, stop, row, row_start, big, small = find_work(lens_ptr, batch, num_big, KV_HEADS, BLOCK_N, WINDOW, ROWS_PAD)
    pdl_wait(PDL)
    heads = tl.arange(0, max(16, triton.next_power_of_2(GROUP)))[:, None]
    dims = tl.arange(0, max(16, triton.next_power_of_2(DIM)))[None, :]
    offs = heads * DIM + dims
    mask = (heads < GROUP) & (dims < DIM)
    while tile < stop:
        length = tl.load(lens_ptr + row)
        first_tile, unit_tiles = tiles_of(length, BLOCK_N, WINDOW)
        head = (tile - row_start) // unit_tiles
        unit_start = row_start + head * unit_tiles
        unit_end = unit_start + unit_tiles
        unit = row * KV_HEADS + head
        begin = (first_tile + tile - unit_start) * BLOCK_N
        tile = tl.minimum(unit_end, stop)
        end = tl.minimum((first_tile + tile - unit_start) * BLOCK_N, length)
        oldest = tl.maximum(length - WINDOW, 0)
        before = unit.to(tl.int64) * (GROUP * DIM)
        q = tl.load(q_ptr + before + offs, mask=mask, other=0.0)
        o, lse = attend_pages(
            q,
            k_ptr + head * DIM,
            v_ptr + head * DIM,
            tables_ptr + row.to(tl.int64) * table_stride,
            borders=(begin, end),
            oldest=oldest,
            first_key=oldest,
            last_key=end - 1,
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
        first = owner_of(unit_start, num_big, big, small)
        last = owner_of(unit_end - 1, num_big, big, small)
        if first == last:
            tl.store(o_ptr + before + offs, o, mask=mask)
        else:
            # Along the line, each part has a new program or a new unit (or both): their sum numbers the parts.
            part = unit + tl.program_id(0)
            tl.store(partial_ptr + part * (GROUP * DIM) + offs, o, mask=mask)
            tl.store(lse_ptr + part * GROUP + heads, lse[:, None], mask=heads < GROUP)
            tl.debug_barrier()
            if tl.atomic_add(semaphores_ptr + unit, 1, sem="acq_rel") == last - first:
                merge_parts(partial_ptr, lse_ptr, unit + first, unit + last, o_ptr + before, GROUP * DIM, DIM)
                tl.store(semaphores_ptr + unit, 0)
        if tile == row_start + unit_tiles * KV_HEADS:
            row += 1
            row_start = tile


@triton.jit(do_not_specialize=["num_seqs"], do_not_specialize_on_alignment=["tables_ptr", "lens_ptr", "starts_ptr"])
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    tables_ptr,
    table_stride,
    lens_ptr,
    scale,
    v_scale,
    starts_ptr,
    num_seqs,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SEQS_PAD: tl.constexpr,
):
    """Arguments of `paged_prefill`; a program has one KV head and BLOCK_M rows of one sequence.

    The rows of a sequence are its (token, query head of the group) pairs. Numbering the tiles of sequence s from
    (rows before it) // BLOCK_M + s leaves room for every ragged end, so a program can find its own s. The last tiles
    of a sequence see the most keys: they go first. (It is long by its arguments.)
    """
    program = tl.num_programs(1) - 1 - tl.program_id(1)
    seqs = tl.arange(0, SEQS_PAD)
    starts = tl.load(starts_ptr + seqs, mask=seqs < num_seqs, other=0)
    begun = (starts * GROUP // BLOCK_M + seqs <= program) & (seqs < num_seqs)
    seq = tl.sum(begun.to(tl.int32), 0) - 1
    start = tl.load(starts_ptr + seq)
    q_len = tl.load(starts_ptr + seq + 1) - start
    first_row = (program - start * GROUP // BLOCK_M - seq) * BLOCK_M
    if first_row >= q_len * GROUP:
        return
    head = tl.program_id(0)
    rows = first_row + tl.arange(0, BLOCK_M)[:, None]
    tokens = rows // GROUP
    dims = tl.arange(0, max(16, triton.next_power_of_2(DIM)))[None, :]
    offs = ((start + tokens).to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + rows % GROUP) * DIM + dims
    mask = (tokens < q_len) & (dims < DIM)
    q = tl.load(q_ptr + offs, mask=mask, other=0.0)
    context = tl.load(lens_ptr + seq)
    past = context - q_len
    num_seen = past + first_row // GROUP + 1  # by the first row, without a window
    tail = tl.maximum(num_seen, 0) // BLOCK_N * BLOCK_N  # all rows stand behind the keys before
    end = tl.minimum(past + (first_row + BLOCK_M - 1) // GROUP + 1, context)
    oldest = tl.maximum(num_seen - WINDOW, 0)
    if WINDOW:
        middle = tl.cdiv(tl.maximum(end - WINDOW, 0), BLOCK_N) * BLOCK_N  # all rows' windows have begun
        middle = tl.minimum(middle, tl.maximum(end, 0))
        borders = (oldest // BLOCK_N * BLOCK_N, middle, tl.maximum(middle, tail), end)
    else:
        borders = (0, tail, end)
    o, _lse = attend_pages(
        q,
        k_ptr + head * DIM,
        v_ptr + head * DIM,
        tables_ptr + seq.to(tl.int64) * table_stride,
        borders=borders,
        oldest=oldest,
        first_key=past + tokens + 1 - WINDOW,
        last_key=past + tokens,
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
    tl.store(o_ptr + offs, o, mask=mask)


@functools.cache
def compiled_for(
    num_heads: int,
    cache_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None,
    soft_cap: float | None,
    is_wide: bool = False,
    is_fp8: bool = False,
) -> dict[str, int | float]:
    """The arguments that both kernels are compiled for: what the layer is, and tiles that suit the GPU."""
    _, block_size, num_kv_heads, dim = cache_shape
    tiles = attention_tiles(dim, block_size, dtype, gpu_of(device), is_wide, is_fp8)
    limits = {"maxnreg": FP8_DECODE_REGISTERS} if is_fp8 and is_wide else {}
    return limits | {
        "WINDOW": window or 0,
        "SOFT_CAP": (soft_cap or 0.0) * LOG2_E,
        "KV_HEADS": num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "DIM": dim,
        "BLOCK_SIZE": block_size,
        "BLOCK_N": tiles.block_n,
        "STAGES": tiles.stages,
        "num_warps": ATTENTION_WARPS,
    }


def kernel_scales(k_cache: Tensor, scale: float, k_scale: float, v_scale: float) -> tuple[float, float | None]:
    """The scale of scores, in base 2, and that of values, None if the cache is not FP8."""
    if k_cache.dtype != E4M3:
        return scale * LOG2_E, None
    return scale * LOG2_E * k_scale, v_scale


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    semaphores: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Attention of one query a sequence, balanced over the whole GPU (after LeanAttention, Sanovar et al., 2024).

    The number of programs depends on B and the device alone, and each finds its share of the work from the context
    lengths on the device, so one CUDA graph serves any lengths. A (row, KV head) that several programs share is put
    together by the last of them to finish. One compiled kernel serves up to 256 rows.

    Args, as `paged_attention_torch` takes them, but:
        q: [B, Hq, D], contiguous, one row a sequence; a padding row has context 0 and gives zeros.
        context_lens: read early, see `pdl_wait`.
        semaphores: int32, B * Hkv or more, zero before and after.

    Returns:
        [B, Hq, D], in q's dtype.
    """
    if not use_triton(q):
        starts = torch.arange(len(q) + 1)
        return paged_attention_torch(
            q, k_cache, v_cache, block_tables, context_lens, starts, scale, window, soft_cap, k_scale, v_scale
        )
    o = torch.empty_like(q)
    batch_size, num_heads, dim = q.shape
    num_kv_heads = k_cache.size(2)
    group = num_heads // num_kv_heads
    units = batch_size * num_kv_heads
    num_big, num_small = decode_programs(units, gpu_of(q.device))
    num_parts = units + num_big + num_small
    partial = torch.empty((num_parts, group, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((num_parts, group), dtype=torch.float32, device=q.device)
    _decode_kernel[(num_big + num_small,)](
        q,
        k_cache,
        v_cache,
        o,
        partial,
        lse,
        semaphores,
        block_tables,
        block_tables.stride(0),
        context_lens,
        *kernel_scales(k_cache, scale, k_scale, v_scale),
        batch_size,
        num_big,
        ROWS_PAD=max(256, triton.next_power_of_2(batch_size)),
        **compiled_for(
            num_heads, k_cache.shape, q.dtype, q.device, window, soft_cap, num_small > 0, k_cache.dtype == E4M3
        ),
        **pdl_options(q.device),
    )
    return o


def takes_hopper_prefill(q: Tensor, k_cache: Tensor, window: int | None, soft_cap: float | None) -> bool:
    """Whether `prefill_hopper` is the faster way: for much of the usual attention, in tiles that lie within a page."""
    usual_scores = not window and not soft_cap
    usual_dtype = q.dtype in (torch.bfloat16, torch.float16) and k_cache.dtype == q.dtype
    whole_tiles = q.size(2) in (64, 128) and k_cache.size(1) % 128 == 0
    is_much = len(q) >= HOPPER_PREFILL_TOKENS
    return is_much and usual_scores and usual_dtype and whole_tiles and gpu_of(q.device).is_hopper


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Attention of any number of queries a sequence (FlashAttention-2, Dao, 2023), keys from the cache only.

    As `paged_attention_torch`, with q [N, Hq, D] contiguous. The query heads that share a KV head are rows of one
    tile, so that K and V are read once for all. One compiled kernel serves up to 512 sequences of any lengths. Hopper
    has one of its own, see `takes_hopper_prefill`.
    """
    if not use_triton(q):
        return paged_attention_torch(
            q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, window, soft_cap, k_scale, v_scale
        )
    if takes_hopper_prefill(q, k_cache, window, soft_cap):
        from nanovllm.kernels.prefill_hopper import prefill_hopper

        return prefill_hopper(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale * LOG2_E)
    o = torch.empty_like(q)
    num_tokens, num_heads, dim = q.shape
    num_kv_heads, num_seqs = k_cache.size(2), len(context_lens)
    is_fp8 = k_cache.dtype == E4M3
    block_m = prefill_rows(q.dtype, dim, is_fp8)
    num_rows = num_tokens * (num_heads // num_kv_heads)
    _prefill_kernel[num_kv_heads, triton.cdiv(num_rows, block_m) + num_seqs](
        q,
        k_cache,
        v_cache,
        o,
        block_tables,
        block_tables.stride(0),
        context_lens,
        *kernel_scales(k_cache, scale, k_scale, v_scale),
        cu_seqlens_q,
        num_seqs,
        BLOCK_M=block_m,
        SEQS_PAD=max(512, triton.next_power_of_2(num_seqs)),
        **compiled_for(num_heads, k_cache.shape, q.dtype, q.device, window, soft_cap, is_fp8=is_fp8),
    )
    return o
