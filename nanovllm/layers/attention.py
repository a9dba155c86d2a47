"""Paged attention over the KV cache: three backends behind one call.

Every backend first has all of the step's KV stored and then reads keys and values from the cache alone, so that
sequences of one step can share a prefix that the step itself computes. This file knows nothing of who owns the cache,
nor of whether a token belongs to a prompt or an answer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanovllm.kernels.paged_attention import paged_decode, paged_prefill
from nanovllm.kernels.paged_attention_flash import paged_attention_flash
from nanovllm.kernels.paged_attention_torch import decode_without_host, paged_attention_torch, paged_decode_torch
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
            score_options = self.scale, self.window, self.soft_cap, self.k_scale, self.v_scale
            return rope_decode(*rotation, tables, lens, semaphores, *score_options).flatten(1)
        q = rope_store_kvcache(*rotation, self.k_scale, self.v_scale)
        return self.attend(self, q, context).flatten(1)


def attend_torch(layer: Attention, q: Tensor, context: Context) -> Tensor:
    """Plain torch: gathered pages and a softmax; the oracle of the others."""
    caches = layer.k_cache, layer.v_cache
    tables, lens, starts = context.block_tables, context.context_lens, context.cu_seqlens_q
    score_options = layer.scale, layer.window, layer.soft_cap
    n = context.num_decodes
    if q.is_cuda and n == len(q):
        return decode_without_host(q, *caches, tables, lens, *score_options)
    if n:
        o = paged_decode_torch(q[:n], *caches, tables[:n], lens[:n], context.decode_groups, *score_options)
        if n == len(q):
            return o
    rest = paged_attention_torch(q, *caches, tables[n:], lens[n:], starts[n:], *score_options)
    if n:
        rest[:n] = o
    return rest


def attend_triton(layer: Attention, q: Tensor, context: Context) -> Tensor:
    """Our own kernels: one for the decodes, which come first, one for parts of prompts."""
    caches = layer.k_cache, layer.v_cache
    tables, lens, starts = context.block_tables, context.context_lens, context.cu_seqlens_q
    score_options = layer.scale, layer.window, layer.soft_cap, layer.k_scale, layer.v_scale
    n = context.num_decodes
    if n == len(q):
        return paged_decode(q, *caches, tables, lens, layer.semaphores, *score_options)
    o = paged_prefill(q, *caches, tables[n:], lens[n:], starts[n:], *score_options)
    if n:
        o[:n] = paged_decode(q[:n], *caches, tables[:n], lens[:n], layer.semaphores, *score_options)
    return o


def attend_flash_attn(layer: Attention, q: Tensor, context: Context) -> Tensor:
    """The flash-attn package."""
    score_options = layer.scale, layer.window, layer.soft_cap
    return paged_attention_flash(q, layer.k_cache, layer.v_cache, context, *score_options)


BACKENDS: dict[str, Callable[[Attention, Tensor, Context], Tensor]] = {
    "torch": attend_torch,
    "triton": attend_triton,
    "flash_attn": attend_flash_attn,
}
