"""Paged attention over the KV cache: three backends behind one call.

Every backend first has all of the step's KV stored and then reads keys and values from the cache alone, so that
sequences of one step can share a prefix that the step itself computes.
"""

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
        self.backend = backend
        self.rotary_table = rotary_table
        self.k_cache = self.v_cache = self.semaphores = torch.empty(0)

    def forward(self, qkv: Tensor, positions: Tensor, context: Context, q_norm: RMSNorm | None,
            k_norm: RMSNorm | None) -> Tensor:  # fmt: skip
        """qkv [N, (heads + 2 * kv_heads) * head_dim] -> [N, heads * head_dim]; norms act on each head."""
        norms = (norm.weight if norm else None for norm in (q_norm, k_norm))
        q = rope_store_kvcache(qkv, self.rotary_table, positions, context.slot_mapping, self.k_cache, self.v_cache,
            *norms, q_norm.eps if q_norm else 0.0)  # fmt: skip
        return getattr(self, f"_attend_{self.backend}")(q, context).flatten(1)

    def _attend_torch(self, q: Tensor, context: Context) -> Tensor:
        caches, tables, lens = (self.k_cache, self.v_cache), context.block_tables, context.context_lens
        if not q.is_cuda or context.num_decodes < len(q):
            return paged_attention_torch(q, *caches, tables, lens, context.cu_seqlens_q, self.scale)
        # Decodes on a GPU may be in a graph, where the host cannot loop over lengths: all pages, and a mask. What lies
        # behind a sequence's end may be NaN, of a sequence that has failed: no mask would silence that.
        k, v = (cache[tables].flatten(1, 2).transpose(1, 2) for cache in caches)
        visible = (torch.arange(k.size(2), device=q.device) < lens[:, None])[:, None, None]
        k, v = (x.masked_fill(~visible.transpose(2, 3), 0) for x in (k, v))
        return F.scaled_dot_product_attention(q[:, :, None], k, v, visible, scale=self.scale, enable_gqa=True)[:, :, 0]

    def _attend_triton(self, q: Tensor, context: Context) -> Tensor:
        n = context.num_decodes
        caches, tables, lens = (self.k_cache, self.v_cache), context.block_tables, context.context_lens
        if n == len(q):
            return paged_decode(q, *caches, tables, lens, self.semaphores, self.scale)
        o = paged_prefill(q, *caches, tables[n:], lens[n:], context.cu_seqlens_q[n:], self.scale)
        if n:
            o[:n] = paged_decode(q[:n], *caches, tables[:n], lens[:n], self.semaphores, self.scale)
        return o

    def _attend_flash_attn(self, q: Tensor, context: Context) -> Tensor:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        caches, tables = (self.k_cache, self.v_cache), context.block_tables
        if context.num_decodes == len(q):
            return flash_attn_with_kvcache(q[:, None], *caches, cache_seqlens=context.context_lens, block_table=tables,
                softmax_scale=self.scale)[:, 0]  # fmt: skip
        return flash_attn_varlen_func(q, *caches, cu_seqlens_q=context.cu_seqlens_q, cu_seqlens_k=context.cu_seqlens_k,
            max_seqlen_q=context.max_seqlen_q, max_seqlen_k=tables.size(1) * self.k_cache.size(1),
            softmax_scale=self.scale, causal=True, block_table=tables)  # fmt: skip
