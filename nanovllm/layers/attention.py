"""Paged attention over the KV cache: three backends behind one call.

Every backend first has all of the step's KV stored and then reads keys and values from the cache alone, so that
sequences of one step can share a prefix that the step itself computes. This file knows nothing of who owns the cache,
nor of whether a token belongs to a prompt or an answer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanovllm.kernels.paged_attention import paged_decode, paged_prefill
from nanovllm.kernels.paged_attention_torch import (
    group_decodes,
    paged_attention_torch,
    paged_decode_torch,
    softmax_attention,
)
from nanovllm.kernels.rope_decode import rope_decode, takes_rope_decode
from nanovllm.kernels.store_kvcache import rope_store_kvcache
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.utils.context import Context


class Attention(nn.Module):
    """Rotary embedding, KV store and causal attention of this rank's heads.

    `scale` is of q k^T; a `window` and a `soft_cap` are as `paged_attention_torch` defines them.
    `k_cache` and `v_cache` [num_blocks, block_size, num_kv_heads, head_dim] and `semaphores`, the zeros that
    paged_decode counts in, are set by whoever owns the cache's memory. `k_scale` and `v_scale`, of a cache in FP8, are
    a checkpoint's, or 1.
    """

    def __init__(
        self,
        head_dim: int,
        backend: str,
        rotary_table: Tensor,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        self.scale = head_dim**-0.5 if scale is None else scale
        self.window = window
        self.soft_cap = soft_cap
        self.attend = BACKENDS[backend]
        self.rotary_table = rotary_table
        self.k_cache = self.v_cache = self.semaphores = torch.empty(0)
        self.k_scale = self.v_scale = 1.0

    def forward(
        self, qkv: Tensor, positions: Tensor, context: Context, q_norm: RMSNorm | None, k_norm: RMSNorm | None
    ) -> Tensor:
        """qkv [N, (heads + 2 * kv_heads) * head_dim] -> [N, heads * head_dim]; norms act on each head."""
        rotation = (
            qkv,
            self.rotary_table,
            positions,
            context.slot_mapping,
            self.k_cache,
            self.v_cache,
            q_norm.weight if q_norm else None,
            k_norm.weight if k_norm else None,
            q_norm.eps if q_norm else 0.0,
        )
        # A kernel that stores and attends at once cannot wait for other tokens' keys, as drafts must.
        all_apart = context.num_decodes == len(qkv) and context.queries_per_row == 1
        if self.attend is attend_triton and all_apart and takes_rope_decode(qkv, self.k_cache.size(2)):
            tables, lens, semaphores = context.block_tables, context.context_lens, self.semaphores
            scores = self.scale, self.window, self.soft_cap, self.k_scale, self.v_scale
            return rope_decode(*rotation, tables, lens, semaphores, *scores).flatten(1)
        q = rope_store_kvcache(*rotation, self.k_scale, self.v_scale)
        return self.attend(self, q, context).flatten(1)


def attend_torch(layer: Attention, q: Tensor, context: Context) -> Tensor:
    """Plain torch: gathered pages and a softmax; the oracle of the others."""
    caches = layer.k_cache, layer.v_cache
    tables, lens, starts = context.block_tables, context.context_lens, context.cu_seqlens_q
    scores = layer.scale, layer.window, layer.soft_cap
    n = context.num_decodes
    if q.is_cuda and n == len(q):
        return decode_without_host(q, *caches, tables, lens, *scores)
    if n:
        groups = context.decode_groups.get(layer.window)
        if groups is None:
            groups = group_decodes(tables[:n], lens[:n], layer.k_cache.size(1), layer.window)
            context.decode_groups[layer.window] = groups
        o = paged_decode_torch(q[:n], *caches, groups, layer.scale, layer.soft_cap)
        if n == len(q):
            return o
    rest = paged_attention_torch(q, *caches, tables[n:], lens[n:], starts[n:], *scores)
    if n:
        rest[:n] = o
    return rest


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


def attend_triton(layer: Attention, q: Tensor, context: Context) -> Tensor:
    """Our own kernels: one for the decodes, which come first, one for parts of prompts."""
    caches = layer.k_cache, layer.v_cache
    tables, lens, starts = context.block_tables, context.context_lens, context.cu_seqlens_q
    scores = layer.scale, layer.window, layer.soft_cap, layer.k_scale, layer.v_scale
    n = context.num_decodes
    if n == len(q):
        return paged_decode(q, *caches, tables, lens, layer.semaphores, *scores)
    o = paged_prefill(q, *caches, tables[n:], lens[n:], starts[n:], *scores)
    if n:
        o[:n] = paged_decode(q[:n], *caches, tables[:n], lens[:n], layer.semaphores, *scores)
    return o


def attend_flash_attn(layer: Attention, q: Tensor, context: Context) -> Tensor:
    """The flash-attn package."""
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    # Its windows are the keys to the left and to the right of a query's own, -1: all; a cap of 0 is none.
    window_size = (layer.window - 1, 0) if layer.window else (-1, -1)
    softcap = layer.soft_cap or 0.0
    if context.num_decodes == len(q):
        o = flash_attn_with_kvcache(
            q[:, None],
            layer.k_cache,
            layer.v_cache,
            cache_seqlens=context.context_lens,
            block_table=context.block_tables,
            softmax_scale=layer.scale,
            window_size=window_size,
            softcap=softcap,
        )
        return o[:, 0]
    return flash_attn_varlen_func(
        q,
        layer.k_cache,
        layer.v_cache,
        cu_seqlens_q=context.cu_seqlens_q,
        cu_seqlens_k=context.cu_seqlens_k,
        max_seqlen_q=context.max_seqlen_q,
        max_seqlen_k=context.block_tables.size(1) * layer.k_cache.size(1),
        softmax_scale=layer.scale,
        causal=True,
        window_size=window_size,
        softcap=softcap,
        block_table=context.block_tables,
    )


BACKENDS: dict[str, Callable[[Attention, Tensor, Context], Tensor]] = {
    "torch": attend_torch,
    "triton": attend_triton,
    "flash_attn": attend_flash_attn,
}
