"""Paged attention over the KV cache: three backends behind one call.

Every backend first has all of the step's KV stored and then reads keys and values from the cache alone, so that
sequences of one step can share a prefix that the step itself computes. This file knows nothing of who owns the cache,
nor of whether a token belongs to a prompt or an answer.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.kernels.paged_attention import paged_attention_torch, paged_decode, paged_prefill
from nanovllm.kernels.store_kvcache import rope_store_kvcache
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.utils.context import Context


class Attention(nn.Module):
    """Rotary embedding, KV store and causal attention of this rank's heads.

    `k_cache` and `v_cache` [num_blocks, block_size, num_kv_heads, head_dim] and `semaphores`, the zeros that
    paged_decode counts in, are set by whoever owns the cache's memory.
    """

    def __init__(self, head_dim: int, backend: str, rotary_table: Tensor) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.attend = BACKENDS[backend]
        self.rotary_table = rotary_table
        self.k_cache = self.v_cache = self.semaphores = torch.empty(0)

    def forward(
        self, qkv: Tensor, positions: Tensor, context: Context, q_norm: RMSNorm | None, k_norm: RMSNorm | None
    ) -> Tensor:
        """qkv [N, (heads + 2 * kv_heads) * head_dim] -> [N, heads * head_dim]; norms act on each head."""
        q = rope_store_kvcache(
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
        return self.attend(self, q, context).flatten(1)


def attend_torch(layer: Attention, q: Tensor, context: Context) -> Tensor:
    """Plain torch: gathered pages and a softmax; the oracle of the others."""
    tables, lens = context.block_tables, context.context_lens
    if not q.is_cuda or context.num_decodes < len(q):
        return paged_attention_torch(q, layer.k_cache, layer.v_cache, tables, lens, context.cu_seqlens_q, layer.scale)
    # Decodes on a GPU may be in a graph, where the host cannot loop over lengths: all pages, and a mask. What lies
    # behind a sequence's end may be NaN, of a sequence that has failed: no mask would silence that.
    k, v = (cache[tables].flatten(1, 2).transpose(1, 2) for cache in (layer.k_cache, layer.v_cache))
    visible = (torch.arange(k.size(2), device=q.device) < lens[:, None])[:, None, None]
    k, v = (x.masked_fill(~visible.transpose(2, 3), 0) for x in (k, v))
    o = F.scaled_dot_product_attention(q[:, :, None], k, v, visible, scale=layer.scale, enable_gqa=True)
    return o[:, :, 0]


def attend_triton(layer: Attention, q: Tensor, context: Context) -> Tensor:
    """Our own kernels: one for the decodes, which come first, one for parts of prompts."""
    caches = layer.k_cache, layer.v_cache
    tables, lens, starts = context.block_tables, context.context_lens, context.cu_seqlens_q
    n = context.num_decodes
    if n == len(q):
        return paged_decode(q, *caches, tables, lens, layer.semaphores, layer.scale)
    o = paged_prefill(q, *caches, tables[n:], lens[n:], starts[n:], layer.scale)
    if n:
        o[:n] = paged_decode(q[:n], *caches, tables[:n], lens[:n], layer.semaphores, layer.scale)
    return o


def attend_flash_attn(layer: Attention, q: Tensor, context: Context) -> Tensor:
    """The flash-attn package."""
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    if context.num_decodes == len(q):
        o = flash_attn_with_kvcache(
            q[:, None],
            layer.k_cache,
            layer.v_cache,
            cache_seqlens=context.context_lens,
            block_table=context.block_tables,
            softmax_scale=layer.scale,
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
        block_table=context.block_tables,
    )


BACKENDS: dict[str, Callable[[Attention, Tensor, Context], Tensor]] = {
    "torch": attend_torch,
    "triton": attend_triton,
    "flash_attn": attend_flash_attn,
}
