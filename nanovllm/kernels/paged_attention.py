# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Causal attention of new queries over a paged KV cache.

This step's keys and values are in the cache already, so attention reads one place only: a layer's K and V, each
[num_blocks, block_size, Hkv, D], through block tables that list the blocks of every sequence.
`paged_attention_torch` is the definition and the CPU path; `paged_prefill` (any number of queries a sequence) and
`paged_decode` (exactly one) are its fast forms. Pages hold a power of two of tokens, 16 or more; D is at most 256.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import INTERPRETED, pdl_options, pdl_wait, tl, triton, use_triton

LOG2_E = 1.4426950408889634


def paged_attention_torch(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor,
        cu_seqlens_q: Tensor, scale: float) -> Tensor:  # fmt: skip
    """Attention by gathering each sequence's pages and masking what lies ahead.

    q: [N, Hq, D], the queries of S sequences one after another. k_cache, v_cache: [num_blocks, block_size, Hkv, D].
    block_tables: [S, max_blocks] int32, arbitrary past a sequence's context. context_lens: [S] int32, the tokens in
    the cache, this step's included. cu_seqlens_q: [S + 1] int32, where each sequence's queries begin. Query i of q_len
    stands at position context_len - q_len + i and sees the keys up to its own; with no context it gives zeros.
    Returns o [N, Hq, D].
    """
    o = torch.zeros_like(q)
    starts = cu_seqlens_q.tolist()
    for begin, end, context, table in zip(starts[:-1], starts[1:], context_lens.tolist(), block_tables, strict=True):
        if begin == end or context == 0:
            continue
        blocks = table[: -(-context // k_cache.size(1))]
        k, v = (cache[blocks].flatten(0, 1)[:context].transpose(0, 1) for cache in (k_cache, v_cache))
        seen = torch.ones(end - begin, context, dtype=torch.bool, device=q.device).tril(context - (end - begin))
        q_part = q[begin:end].transpose(0, 1)
        o[begin:end] = F.scaled_dot_product_attention(q_part, k, v, seen, scale=scale, enable_gqa=True).transpose(0, 1)
    return o


@triton.jit
def _attend(q, k_ptr, v_ptr, table_ptr, begin, unmasked, end, last_key, scale, HAS_UNMASKED: tl.constexpr,
        KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
        STAGES: tl.constexpr):  # fmt: skip
    """Attention of the rows of q [BLOCK_M, DIM_PAD] over one head's keys from begin to end, and its log-sum-exp.

    By online softmax (Milakov & Gimelshein, 2018), in base 2: `scale` includes log2(e). With HAS_UNMASKED all rows see
    the keys before `unmasked`; the others are seen up to last_key, [BLOCK_M, 1] or one for all rows.
    """
    ROW: tl.constexpr = KV_HEADS * DIM
    dims = tl.arange(0, q.shape[1])[None, :]
    acc = tl.zeros(q.shape, tl.float32)
    high = tl.full((q.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    for MASKED in tl.static_range(0 if HAS_UNMASKED else 1, 2):  # one loop without a mask, one with it
        stop = end if MASKED else unmasked
        for n in tl.range(unmasked if MASKED else begin, stop, BLOCK_N, num_stages=STAGES):
            positions = n + tl.arange(0, BLOCK_N)
            if BLOCK_SIZE >= BLOCK_N:  # the tile lies within one page
                page = tl.load(table_ptr + n // BLOCK_SIZE)
            else:
                page = tl.load(table_ptr + positions // BLOCK_SIZE, mask=positions < stop, other=0)[:, None]
            page = page.to(tl.int64) * (BLOCK_SIZE * ROW)
            offs = (positions % BLOCK_SIZE * ROW)[:, None] + dims
            mask = (positions < stop)[:, None] & (dims < DIM)
            k = tl.load(k_ptr + page + offs, mask=mask, other=0.0)
            v = tl.load(v_ptr + page + offs, mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if MASKED:
                visible = n + tl.arange(0, BLOCK_N)[None, :] <= last_key
                scores = tl.where(visible, scores, float("-inf"))
            new_high = tl.maximum(high, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - new_high[:, None])
            alpha = tl.exp2(high - new_high)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            total = total * alpha + tl.sum(p, 1)
            high = new_high
    return acc / tl.where(total == 0.0, 1.0, total)[:, None], high + tl.log2(total)


@triton.jit
def _merge(partial_ptr, lse_ptr, first, last, o_ptr, COLS: tl.constexpr, DIM: tl.constexpr):
    """Puts the attention of one (row, KV head) together from its parts first..last, the heads one after another."""
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
def _owner(tile, num_big, big, small):
    """The program whose share has the tile."""
    return tl.where(tile < num_big * big, tile // big, num_big + (tile - num_big * big) // small)


@triton.jit
def _find_work(lens_ptr, batch, num_big, KV_HEADS: tl.constexpr, BLOCK_N: tl.constexpr, ROWS_PAD: tl.constexpr):
    """This program's tiles, as (first, end, row of the first, first tile of that row), and the two sizes of shares.

    The tiles of all units (row, KV head) stand in one line. An empty row owns a tile per head too, so that somebody
    writes its zeros. The first num_big programs take the line in equal shares, or 7/8 of it if there are others, which
    start as places on the GPU fall free: small shares of the rest, for the memory is not equally fast for all SMs.
    """
    rows = tl.arange(0, ROWS_PAD)
    lens = tl.load(lens_ptr + rows, mask=rows < batch, other=0)
    ends = tl.cumsum(tl.where(rows < batch, tl.maximum(tl.cdiv(lens, BLOCK_N), 1) * KV_HEADS, 0), 0)
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


@triton.jit(do_not_specialize=["batch", "num_big"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, partial_ptr, lse_ptr, semaphores_ptr, tables_ptr, table_stride, lens_ptr, scale,
    batch, num_big, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, ROWS_PAD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    tile, stop, row, row_start, big, small = _find_work(lens_ptr, batch, num_big, KV_HEADS, BLOCK_N, ROWS_PAD)
    pdl_wait(PDL)
    heads = tl.arange(0, max(16, triton.next_power_of_2(GROUP)))[:, None]
    dims = tl.arange(0, max(16, triton.next_power_of_2(DIM)))[None, :]
    offs = heads * DIM + dims
    mask = (heads < GROUP) & (dims < DIM)
    while tile < stop:
        length = tl.load(lens_ptr + row)
        unit_tiles = tl.maximum(tl.cdiv(length, BLOCK_N), 1)
        head = (tile - row_start) // unit_tiles
        unit_start = row_start + head * unit_tiles
        unit_end = unit_start + unit_tiles
        unit = row * KV_HEADS + head
        begin = (tile - unit_start) * BLOCK_N
        tile = tl.minimum(unit_end, stop)
        end = tl.minimum((tile - unit_start) * BLOCK_N, length)
        before = unit.to(tl.int64) * (GROUP * DIM)
        q = tl.load(q_ptr + before + offs, mask=mask, other=0.0)
        o, lse = _attend(q, k_ptr + head * DIM, v_ptr + head * DIM, tables_ptr + row.to(tl.int64) * table_stride,
            begin, begin, end, end - 1, scale, False, KV_HEADS, DIM, BLOCK_SIZE, BLOCK_N, STAGES)  # fmt: skip
        first = _owner(unit_start, num_big, big, small)
        last = _owner(unit_end - 1, num_big, big, small)
        if first == last:
            tl.store(o_ptr + before + offs, o, mask=mask)
        else:
            # Along the line, each part has a new program or a new unit (or both): their sum numbers the parts.
            part = unit + tl.program_id(0)
            tl.store(partial_ptr + part * (GROUP * DIM) + offs, o, mask=mask)
            tl.store(lse_ptr + part * GROUP + heads, lse[:, None], mask=heads < GROUP)
            tl.debug_barrier()
            if tl.atomic_add(semaphores_ptr + unit, 1, sem="acq_rel") == last - first:
                _merge(partial_ptr, lse_ptr, unit + first, unit + last, o_ptr + before, GROUP * DIM, DIM)
                tl.store(semaphores_ptr + unit, 0)
        if tile == row_start + unit_tiles * KV_HEADS:
            row += 1
            row_start = tile


@triton.jit(do_not_specialize=["num_seqs"], do_not_specialize_on_alignment=["tables_ptr", "lens_ptr", "starts_ptr"])
def _prefill_kernel(q_ptr, k_ptr, v_ptr, o_ptr, tables_ptr, table_stride, lens_ptr, scale, starts_ptr, num_seqs,
        KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
        BLOCK_N: tl.constexpr, STAGES: tl.constexpr, BLOCK_M: tl.constexpr, SEQS_PAD: tl.constexpr):  # fmt: skip
    # The rows of a sequence are its (token, query head of the group) pairs. Numbering the tiles of sequence s from
    # (rows before it) // BLOCK_M + s leaves room for every ragged end, so a program can find its own s. The last tiles
    # of a sequence see the most keys: they go first.
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
    unmasked = tl.maximum(past + first_row // GROUP + 1, 0) // BLOCK_N * BLOCK_N  # all rows see the keys before
    end = tl.minimum(past + (first_row + BLOCK_M - 1) // GROUP + 1, context)
    o, _lse = _attend(q, k_ptr + head * DIM, v_ptr + head * DIM, tables_ptr + seq.to(tl.int64) * table_stride,
        0, unmasked, end, past + tokens, scale, True, KV_HEADS, DIM, BLOCK_SIZE, BLOCK_N, STAGES)  # fmt: skip
    tl.store(o_ptr + offs, o, mask=mask)


@functools.cache
def _num_programs(units: int, device: torch.device) -> tuple[int, int]:
    """How many programs take big and small shares of `units` (row, KV head) pairs; three fit on an SM of Hopper.

    By measurement on an H200. A unit in more than 16 parts costs more to merge than it gains, and small shares pay
    from one unit an SM on. With the benchmark's lengths 246 rows read at 4.24 TB/s, 119 at 4.20, 77 at 4.13.
    """
    num_sms = 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    if 16 * units <= num_sms:
        return num_sms, 0
    return (2 * num_sms, 0) if units <= num_sms else (3 * num_sms, 3 * num_sms)


@functools.cache
def _constants(heads: int, cache_shape: torch.Size, dtype: torch.dtype, device: torch.device,
        is_wide: bool = False) -> dict[str, int]:  # fmt: skip
    """What both kernels are compiled for.

    A tile of K is 16 KiB, or shared memory would not hold the pipeline, whose depth it limits too: an indirect load
    takes two stages a tile. Wide tiles and a short pipeline read an H200's memory up to 5% faster, given much work.
    """
    _, block_size, kv_heads, dim = cache_shape
    block_n = min(64, max(16, 16384 // (max(16, triton.next_power_of_2(dim)) * dtype.itemsize)))
    roomy = INTERPRETED or torch.cuda.get_device_properties(device).shared_memory_per_block_optin > 128 * 1024
    is_wide &= roomy and 2 * block_n <= block_size
    return dict(KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim, BLOCK_SIZE=block_size, num_warps=4,
        BLOCK_N=2 * block_n if is_wide else block_n, STAGES=5 if roomy and not is_wide else 3)  # fmt: skip


def paged_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor,
        semaphores: Tensor, scale: float) -> Tensor:  # fmt: skip
    """Attention of one query a sequence, balanced over the whole GPU (after LeanAttention, Sanovar et al., 2024).

    As `paged_attention_torch` with q [B, Hq, D] contiguous and one row a sequence; a padding row has context 0 and
    gives zeros. The number of programs depends on B and the device alone, and each finds its share of the work from
    the context lengths on the device, so one CUDA graph serves any lengths. A (row, KV head) that several programs
    share is put together by the last of them to finish. One compiled kernel serves up to 256 rows. semaphores: int32,
    B * Hkv or more, zero before and after. context_lens is read early, see `pdl_wait`. Returns o [B, Hq, D].
    """
    if not use_triton(q):
        return paged_attention_torch(q, k_cache, v_cache, block_tables, context_lens, torch.arange(len(q) + 1), scale)
    o = torch.empty_like(q)
    units = len(q) * k_cache.size(2)
    num_big, num_small = _num_programs(units, q.device)
    constants = _constants(q.size(1), k_cache.shape, q.dtype, q.device, is_wide=num_small > 0)
    group = constants["GROUP"]
    num_parts = units + num_big + num_small
    partial = torch.empty((num_parts, group, constants["DIM"]), dtype=torch.float32, device=q.device)
    lse = torch.empty((num_parts, group), dtype=torch.float32, device=q.device)
    _decode_kernel[(num_big + num_small,)](q, k_cache, v_cache, o, partial, lse, semaphores, block_tables,
        block_tables.stride(0), context_lens, scale * LOG2_E, len(q), num_big,
        ROWS_PAD=max(256, triton.next_power_of_2(len(q))), **constants, **pdl_options(q.device))  # fmt: skip
    return o


def paged_prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor,
        cu_seqlens_q: Tensor, scale: float) -> Tensor:  # fmt: skip
    """Attention of any number of queries a sequence (FlashAttention-2, Dao, 2023), keys from the cache only.

    As `paged_attention_torch`, q [N, Hq, D] contiguous. The query heads that share a KV head are rows of one tile, so
    that K and V are read once for all. One compiled kernel serves up to 512 sequences of any lengths.

    On an H200, D 128: 250 TFLOP/s for 28 prompts of 100 to 1,024 tokens (FlashAttention-2: 200), 430 for one of 8,192
    (280). Tiles of 128 x 128 on 8 warps reach 475 there, but 210 on the short ones.
    """
    if not use_triton(q):
        return paged_attention_torch(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale)
    o = torch.empty_like(q)
    constants = _constants(q.size(1), k_cache.shape, q.dtype, q.device)
    num_seqs, group = len(context_lens), constants["GROUP"]
    block_m = 16 if q.dtype == torch.float32 else 64
    _prefill_kernel[constants["KV_HEADS"], triton.cdiv(len(q) * group, block_m) + num_seqs](
        q, k_cache, v_cache, o, block_tables, block_tables.stride(0), context_lens, scale * LOG2_E, cu_seqlens_q,
        num_seqs, **constants, BLOCK_M=block_m, SEQS_PAD=max(512, triton.next_power_of_2(num_seqs)))  # fmt: skip
    return o
