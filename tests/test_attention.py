"""The attention layer hands every backend the step as that backend wants it: the results are those of torch."""

import sys
import types

import pytest
import torch

from nanovllm.kernels.paged_attention import paged_attention_torch
from nanovllm.layers.attention import Attention
from nanovllm.utils.context import Context

HEADS, KV_HEADS, DIM, BLOCK_SIZE = 4, 2, 8, 16
# Decodes and parts of prompts: tokens computed and context reached of each sequence; padding reaches none.
STEPS = {
    "decodes": ([(1, 30), (1, 1), (1, 0)], []),
    "prompts": ([], [(20, 20), (5, 37), (1, 4)]),
    "mixed": ([(1, 30), (1, 0)], [(20, 20), (5, 37), (1, 4), (0, 0)]),
}


def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, block_table):
    """What flash_attn_varlen_func promises, of pages."""
    lens_q, lens_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert causal and lens_q.max() <= max_seqlen_q and lens_k.max() <= max_seqlen_k
    assert cu_seqlens_q[0] == cu_seqlens_k[0] == 0 and cu_seqlens_q[-1] == len(q)
    return paged_attention_torch(q, k, v, block_table, lens_k, cu_seqlens_q, softmax_scale)


def with_kvcache(q, k, v, *, cache_seqlens, block_table, softmax_scale):
    """What flash_attn_with_kvcache promises, of pages; q is [B, 1, heads, dim]."""
    starts = torch.arange(len(q) + 1)
    return paged_attention_torch(q[:, 0], k, v, block_table, cache_seqlens, starts, softmax_scale)[:, None]


def attend(backend, decodes, prompts):
    """The layer's output for random tokens, [N, HEADS * DIM]."""
    torch.manual_seed(0)
    parts = decodes + prompts
    q_lens, lens = torch.tensor(parts, dtype=torch.int32).T.contiguous()
    tables = torch.randperm(len(parts) * 3, dtype=torch.int32).view(-1, 3)
    slots = [
        int(tables[s, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE if context else -1
        for s, (n, context) in enumerate(parts)
        for position in range(context - n, context)
    ]
    context = Context(
        slot_mapping=torch.tensor(slots),
        context_lens=lens,
        block_tables=tables,
        num_decodes=len(decodes),
        cu_seqlens_q=torch.nn.functional.pad(q_lens.cumsum(0), (1, 0)).int(),
        cu_seqlens_k=torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int(),
        max_seqlen_q=int(q_lens.max()),
        logits_indices=None,
    )
    layer = Attention(DIM, backend, torch.randn(64, DIM))
    layer.k_cache, layer.v_cache = torch.randn(2, len(parts) * 3, BLOCK_SIZE, KV_HEADS, DIM)
    layer.semaphores = torch.zeros(len(parts) * KV_HEADS, dtype=torch.int32)
    qkv = torch.randn(len(slots), (HEADS + 2 * KV_HEADS) * DIM)
    return layer(qkv, torch.arange(len(slots)), context, None, None)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("backend", ["triton", "flash_attn"])
def test_backend(monkeypatch, backend, step):
    fake = types.SimpleNamespace(flash_attn_varlen_func=varlen, flash_attn_with_kvcache=with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    expected = attend("torch", *STEPS[step])
    assert expected.shape[1] == HEADS * DIM and expected.abs().sum() > 0
    torch.testing.assert_close(attend(backend, *STEPS[step]), expected)
