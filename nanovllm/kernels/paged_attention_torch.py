"""What kernels/paged_attention.py computes, said plainly: gathered pages and a softmax."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.e4m3 import E4M3

QUERIES_AT_ONCE = 256  # of a prompt: what the mask hides is then mostly not computed; 128 were slower


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, soft_cap: float | None
) -> Tensor:
    """softmax(scores) v, where scores = q k^T * scale; a soft cap makes them cap * tanh(scores / cap).

    Soft caps after Gemma 2 (arXiv 2408.00118).

    Args:
        q: [..., Hq, M, D].
        k: [..., Hkv, N, D], with each head for Hq / Hkv of the query heads.
        v: the same.
        seen: bool, broadcast to [..., Hq, M, N], the keys that each query sees; None: all.
        scale: of q k^T.
        soft_cap: what no score exceeds.

    Returns:
        [..., Hq, M, D], in q's dtype.
    """
    if soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
    group = q.size(-3) // k.size(-3)
    k, v = (x.float().repeat_interleave(group, dim=-3) for x in (k, v))
    scores = q.float() @ k.transpose(-1, -2) * scale
    scores = soft_cap * torch.tanh(scores / soft_cap)
    if seen is not None:
        # The lowest number has no weight beside others, and keeps a row that sees nothing from NaN.
        scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)
    return (scores.softmax(-1) @ v).to(q.dtype)


def dequantised(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """What pages of a cache hold: x itself, or FP8 times its scale, in `dtype`."""
    return (x.float() * scale).to(dtype) if x.dtype == E4M3 else x


def paged_attention_torch(
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
    """Attention by gathering each sequence's pages and masking what its queries do not see.

    Query i of a sequence's q_len stands at position p = context_len - q_len + i and sees the keys up to its own, with
    a window only those at p - window < position <= p; with no context it gives zeros.

    Args:
        q: [N, Hq, D], the queries of S sequences one after another.
        k_cache: [num_blocks, block_size, Hkv, D], in q's dtype or FP8 (float8_e4m3fn).
        v_cache: the same.
        block_tables: int32 [S, max_blocks], arbitrary past a sequence's context; before its first query's window any
            blocks, whatever they hold.
        context_lens: int32 [S], the tokens in the cache, this step's included.
        cu_seqlens_q: int32 [S + 1], where each sequence's queries begin.
        scale: of q k^T, before the softmax.
        window: the keys that a query sees at most, its own included (Mistral 7B, arXiv 2310.06825).
        soft_cap: see `softmax_attention`.
        k_scale: a key is what the cache has of it times this, if that is FP8; else it has no meaning.
        v_scale: the same of values.

    Returns:
        [N, Hq, D], in q's dtype.
    """
    o = torch.zeros_like(q)
    block_size = k_cache.size(1)
    starts = cu_seqlens_q.tolist()
    for begin, end, context, table in zip(starts[:-1], starts[1:], context_lens.tolist(), block_tables, strict=True):
        if begin == end or context == 0:
            continue
        past = context - (end - begin)
        oldest = max(past + 1 - window, 0) if window else 0
        first_page = oldest // block_size
        blocks = table[first_page : -(-context // block_size)]
        is_read = slice(oldest - first_page * block_size, context - first_page * block_size)
        k, v = (
            dequantised(cache[blocks], factor, q.dtype).flatten(0, 1)[is_read].transpose(0, 1)
            for cache, factor in ((k_cache, k_scale), (v_cache, v_scale))
        )
        positions = torch.arange(past, context, device=q.device)[:, None]
        keys = torch.arange(oldest, context, device=q.device)
        seen = keys <= positions
        if window:
            seen &= keys > positions - window
        # As a batch of one: of three dimensions torch makes all scores, in three times as long.
        queries = q[begin:end].transpose(0, 1)[None]
        for first in range(0, end - begin, QUERIES_AT_ONCE):  # without the keys behind the last of them
            last = min(first + QUERIES_AT_ONCE, end - begin)
            num_keys = past + last - oldest
            keys_and_values = k[None, :, :num_keys], v[None, :, :num_keys]
            mask = seen[first:last, :num_keys]
            part = softmax_attention(queries[:, :, first:last], *keys_and_values, mask, scale, soft_cap)
            o[begin + first : begin + last] = part[0].transpose(0, 1)
    return o


class DecodeGroup(NamedTuple):
    """Sequences that decode and are computed together, S of them with up to N keys.

    Attributes:
        rows: int64 [S], which of the step's they are.
        slots: int64 [S, N], where their keys and values are stored.
        seen: bool [S, 1, 1, N], which of the slots are theirs; None: all.
    """

    rows: Tensor
    slots: Tensor
    seen: Tensor | None


def group_decodes(
    block_tables: Tensor, context_lens: Tensor, block_size: int, window: int | None = None
) -> list[DecodeGroup]:
    """Groups of sequences whose keys are up to the same power of two, so that at most half of what is read is padding.

    The same for all of a step's layers with the same window. Sequences without keys are in no group.
    """
    members_by_size: dict[int, list[int]] = {}
    num_keys = [min(length, window) if window else length for length in context_lens.tolist()]
    for row, number in enumerate(num_keys):
        if number:
            members_by_size.setdefault(number.bit_length(), []).append(row)
    groups = []
    for members in members_by_size.values():
        rows = torch.tensor(members, device=context_lens.device)
        lens, tables = context_lens[rows].long(), block_tables[rows]
        first = (lens - window).clamp(min=0) if window else torch.zeros_like(lens)
        numbers = {num_keys[row] for row in members}
        positions = first[:, None] + torch.arange(max(numbers), device=rows.device)
        seen = None
        if len(numbers) > 1:
            seen = positions < lens[:, None]
            # What is not seen may be NaN, of a sequence that has failed, and no mask would silence that.
            positions = torch.where(seen, positions, first[:, None])
            seen = seen[:, None, None]
        slots = tables.gather(1, positions // block_size) * block_size + positions % block_size
        groups.append(DecodeGroup(rows, slots, seen))
    return groups


def paged_decode_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    groups_by_window: dict[int | None, list[DecodeGroup]],
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """`paged_attention_torch` of one query a sequence, q [S, Hq, D], without a step for each of them.

    The query heads that share a KV head are rows that share its keys. `groups_by_window` is the step's, at first
    empty: what the first layer with a window has worked out, the others find there.
    """
    if window not in groups_by_window:
        groups_by_window[window] = group_decodes(block_tables, context_lens, k_cache.size(1), window)
    o = torch.zeros_like(q)
    num_kv_heads, dim = k_cache.shape[2:]
    for rows, slots, seen in groups_by_window[window]:
        k, v = (cache.view(-1, num_kv_heads, dim)[slots].transpose(1, 2) for cache in (k_cache, v_cache))
        queries = q if len(rows) == len(q) else q[rows]
        queries = queries.reshape(len(rows), num_kv_heads, -1, dim)
        of_group = softmax_attention(queries, k, v, seen, scale, soft_cap).reshape(len(rows), -1, dim)
        if len(rows) == len(q):
            return of_group
        o[rows] = of_group
    return o


def decode_without_host(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """`paged_attention_torch` of one query a sequence, q [B, heads, head_dim], in tensors of fixed shapes.

    Decodes on a GPU may be in a graph, where the host cannot loop over lengths: each row gathers as many pages as a
    window can touch, without one all, and a mask says what it sees of them.
    """
    block_size, max_pages = k_cache.size(1), block_tables.size(1)
    oldest = (context_lens - window).clamp(min=0) if window else torch.zeros_like(context_lens)
    num_pages = min(-(-(window - 1) // block_size) + 1, max_pages) if window else max_pages
    pages = oldest[:, None] // block_size + torch.arange(num_pages, device=q.device)
    blocks = block_tables.gather(1, pages.clamp(max=max_pages - 1))
    positions = (pages[:, :, None] * block_size + torch.arange(block_size, device=q.device)).flatten(1)
    seen = ((positions >= oldest[:, None]) & (positions < context_lens[:, None]))[:, None, None]
    # Other keys and values may be NaN, of a sequence that has failed: no mask would silence that.
    k, v = (
        cache[blocks].flatten(1, 2).transpose(1, 2).masked_fill(~seen.transpose(2, 3), 0)
        for cache in (k_cache, v_cache)
    )
    return softmax_attention(q[:, :, None], k, v, seen, scale, soft_cap)[:, :, 0]
