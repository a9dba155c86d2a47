"""Attention by the flash-attn package (arXiv 2307.08691), which need not be installed where nobody asks for it."""

from torch import Tensor

from nanovllm.utils.context import Context


def paged_attention_flash(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    context: Context,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """`paged_attention_torch` of a step's queries [N, Hq, D], by the package's kernels: one for decodes alone."""
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    # Its windows are the keys to the left and to the right of a query's own, -1: all; a cap of 0 is none.
    window_size = (window - 1, 0) if window else (-1, -1)
    softcap = soft_cap or 0.0
    if context.num_decodes == len(q):
        o = flash_attn_with_kvcache(
            q[:, None],
            k_cache,
            v_cache,
            cache_seqlens=context.context_lens,
            block_table=context.block_tables,
            softmax_scale=scale,
            window_size=window_size,
            softcap=softcap,
        )
        return o[:, 0]
    return flash_attn_varlen_func(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q=context.cu_seqlens_q,
        cu_seqlens_k=context.cu_seqlens_k,
        max_seqlen_q=context.max_seqlen_q,
        max_seqlen_k=context.block_tables.size(1) * k_cache.size(1),
        softmax_scale=scale,
        causal=True,
        window_size=window_size,
        softcap=softcap,
        block_table=context.block_tables,
    )
