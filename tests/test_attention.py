"""The attention layer hands every backend the step as that backend wants it: the results are those of torch.

And what layers do to scores, windows and soft caps, is the same in the torch functions, their definition and kernels.
Of plain attention tests/test_kernels.py has the tests, and says how kernels are tested.
"""

import math
import sys
import types

import pytest
import torch
from interpreter import DEVICE, kernel_test, plain_test, run_in_interpreter
from kernel_data import DOT_DTYPES, assert_rows_close, ints, paged_inputs

from nanovllm.kernels import HAS_TRITON, tl, triton
from nanovllm.kernels.decode_shares import find_work
from nanovllm.kernels.paged_attention import paged_decode, paged_prefill
from nanovllm.kernels.paged_attention_torch import decode_without_host, paged_attention_torch, paged_decode_torch
from nanovllm.layers.attention import Attention
from nanovllm.utils.context import Context


@pytest.mark.slow
@plain_test
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_in_the_interpreter():
    run_in_interpreter(__file__)


# The layer and its backends

HEADS, KV_HEADS, DIM, BLOCK_SIZE = 4, 2, 8, 16
# Decodes and parts of prompts: tokens computed and context reached of each sequence; padding reaches none.
STEPS = {
    "decodes": ([(1, 30), (1, 1), (1, 0)], []),
    "prompts": ([], [(20, 20), (5, 37), (1, 4)]),
    "mixed": ([(1, 30), (1, 0)], [(20, 20), (5, 37), (1, 4), (0, 0)]),
}


LAYERS = [{}, {"window": 6}, {"scale": 0.7, "window": 21, "soft_cap": 1.5}]


def window_of(window_size):
    """As flash_attn tells it: keys to the left and to the right of a query's own, -1 for all."""
    left, right = window_size
    assert (left, right) == (-1, -1) or (left >= 0 and right == 0)
    return left + 1 or None


def varlen(
    q,
    k,
    v,
    *,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale,
    causal,
    window_size,
    softcap,
    block_table,
):
    """What flash_attn_varlen_func promises, of pages."""
    lens_q, lens_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert causal and lens_q.max() <= max_seqlen_q and lens_k.max() <= max_seqlen_k
    assert cu_seqlens_q[0] == cu_seqlens_k[0] == 0 and cu_seqlens_q[-1] == len(q)
    scores = softmax_scale, window_of(window_size), softcap or None
    return paged_attention_torch(q, k, v, block_table, lens_k, cu_seqlens_q, *scores)


def with_kvcache(q, k, v, *, cache_seqlens, block_table, softmax_scale, window_size, softcap):
    """What flash_attn_with_kvcache promises, of pages; q is [B, 1, heads, dim]."""
    starts = torch.arange(len(q) + 1)
    scores = softmax_scale, window_of(window_size), softcap or None
    return paged_attention_torch(q[:, 0], k, v, block_table, cache_seqlens, starts, *scores)[:, None]


def attend(backend, decodes, prompts, layer_options):
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
        decode_groups={},
    )
    layer = Attention(DIM, backend, torch.randn(64, DIM), **layer_options)
    layer.k_cache, layer.v_cache = torch.randn(2, len(parts) * 3, BLOCK_SIZE, KV_HEADS, DIM)
    layer.semaphores = torch.zeros(len(parts) * KV_HEADS, dtype=torch.int32)
    qkv = torch.randn(len(slots), (HEADS + 2 * KV_HEADS) * DIM)
    return layer(qkv, torch.arange(len(slots)), context, None, None)


@plain_test
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("backend", ["triton", "flash_attn"])
def test_backend(monkeypatch, backend, step, layer):
    fake = types.SimpleNamespace(flash_attn_varlen_func=varlen, flash_attn_with_kvcache=with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    expected = attend("torch", *STEPS[step], layer)
    assert expected.shape[1] == HEADS * DIM and expected.abs().sum() > 0
    assert not layer or not expected.equal(attend("torch", *STEPS[step], {}))
    torch.testing.assert_close(attend(backend, *STEPS[step], layer), expected)


# Windows and soft caps

# Windows: none, the query alone, few keys, a page, some pages, much of a context, all of it. Scores are about 1.
SCORES = [(None, 0.5), (1, None), (5, 0.5), (16, None), (37, 0.5), (130, None), (1000, None)]  # window, soft cap
SHAPES = [(4, 2, 64, 16), (3, 1, 256, 64)]  # heads, KV heads, dim, block size: tiles of several pages, and the reverse
# Whole prompts, chunks behind a context, decode rows, a sequence with nothing to do.
Q_LENS, CONTEXTS = [40, 33, 1, 0, 1, 9], [40, 100, 1, 9, 130, 180]
DECODES = [1, 0, 15, 16, 17, 65, 200, 0]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def reference(q, k_cache, v_cache, *others):
    """The torch function in float32."""
    return paged_attention_torch(q.float(), k_cache.float(), v_cache.float(), *others)


@plain_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "soft_cap"), SCORES)
def test_the_torch_function_is_its_definition(window, soft_cap, dtype):
    q_lens, contexts, heads, kv_heads, dim = [3, 0, 1, 20, 1], [3, 5, 40, 57, 0], 4, 2, 8
    inputs = [x.cpu() for x in paged_inputs(q_lens, contexts, heads, kv_heads, dim, 16, dtype, window)]
    q, k_cache, v_cache, tables, _, starts = inputs
    expected = torch.zeros_like(q)
    for s, (q_len, context) in enumerate(zip(q_lens, contexts, strict=True)):
        for i in range(q_len if context else 0):
            position = context - q_len + i
            seen = [n for n in range(position + 1) if window is None or n > position - window]
            for head in range(heads):
                slots = [(tables[s, n // 16], n % 16, head // 2) for n in seen]
                query = q[starts[s] + i, head].double()
                scores = [(k_cache[slot].double() @ query).item() * 0.3 for slot in slots]
                if soft_cap is not None:
                    scores = [soft_cap * math.tanh(score / soft_cap) for score in scores]
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                values = torch.stack([v_cache[slot].double() for slot in slots])
                expected[starts[s] + i, head] = weights @ values
    assert_rows_close(paged_attention_torch(*inputs, 0.3, window, soft_cap), expected, dtype)


@plain_test
@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize("contexts", [DECODES, [7, 7, 0], [9]], ids=str)
@pytest.mark.parametrize(("window", "soft_cap"), SCORES)
def test_decodes_at_once(window, soft_cap, contexts, is_grouped):
    """In tensors of fixed shapes, and in some that fit; what nobody sees is NaN."""
    ones = [1] * len(contexts)
    inputs = [x.cpu() for x in paged_inputs(ones, contexts, 4, 2, 8, 16, torch.float32, window)]
    q, k_cache, v_cache, tables, lens, _starts = inputs
    expected = paged_attention_torch(*inputs, 0.3, window, soft_cap)
    tables.clamp_(max=len(k_cache) - 1)  # arbitrary where nothing is, but a block
    if is_grouped:
        o = paged_decode_torch(q, k_cache, v_cache, tables, lens, {}, 0.3, window, soft_cap)
    else:
        o = decode_without_host(q, k_cache, v_cache, tables, lens, 0.3, window, soft_cap)
    assert_rows_close(o, expected, torch.float32)
    assert not o[lens == 0].any()


@kernel_test
@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), SHAPES)
@pytest.mark.parametrize(("window", "soft_cap"), SCORES)
def test_prefill(window, soft_cap, heads, kv_heads, dim, block_size, dtype):
    inputs = paged_inputs(Q_LENS, CONTEXTS, heads, kv_heads, dim, block_size, dtype, window)
    scores = 0.1, window, soft_cap
    assert_rows_close(paged_prefill(*inputs, *scores), reference(*inputs, *scores), dtype)


@kernel_test
@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), SHAPES)
@pytest.mark.parametrize(("window", "soft_cap"), SCORES)
def test_decode(window, soft_cap, heads, kv_heads, dim, block_size, dtype):
    ones = [1] * len(DECODES)
    *inputs, starts = paged_inputs(ones, DECODES, heads, kv_heads, dim, block_size, dtype, window)
    semaphores = torch.zeros(len(DECODES) * kv_heads, dtype=torch.int32, device=DEVICE)
    scores = 0.1, window, soft_cap
    o = paged_decode(*inputs, semaphores, *scores)
    assert_rows_close(o, reference(*inputs, starts, *scores), dtype)
    assert not o[DECODES.index(0)].any()
    assert not semaphores.any()


@kernel_test
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_scores_far_beyond_a_soft_cap(dtype):
    """Where the exponential that tanh is made of is infinite, or 0; whole numbers, for products without errors."""
    q, k_cache, *others = paged_inputs([1, 9], [70, 40], 2, 1, 64, 16, dtype)
    inputs = [q.round(), k_cache.round(), *others]
    scores = 1e3, None, 5.0
    assert_rows_close(paged_prefill(*inputs, *scores), reference(*inputs, *scores), dtype)


@triton.jit
def _find_work_kernel(
    shares_ptr,
    lens_ptr,
    batch,
    num_big,
    KV_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS_PAD: tl.constexpr,
):
    tile, stop, row, row_start, _big, _small = find_work(lens_ptr, batch, num_big, KV_HEADS, BLOCK_N, WINDOW, ROWS_PAD)
    share = tl.program_id(0) * 4
    tl.store(shares_ptr + share, tile)
    tl.store(shares_ptr + share + 1, stop)
    tl.store(shares_ptr + share + 2, row)
    tl.store(shares_ptr + share + 3, row_start)


@kernel_test
@pytest.mark.parametrize("num_small", [0, 7])
@pytest.mark.parametrize("window", [1, 64, 65, 4096])
def test_programs_share_the_tiles_of_windows_alone(window, num_small):
    contexts, kv_heads = [30000, 0, 64, 65, 4097, 4096, 1], 2
    shares = torch.zeros(5 + num_small, 4, dtype=torch.int32, device=DEVICE)
    _find_work_kernel[(len(shares),)](shares, ints(contexts), len(contexts), 5, kv_heads, 64, window, ROWS_PAD=8)
    rows_of_tiles = [  # along the line
        row
        for row, context in enumerate(contexts)
        for _ in range(kv_heads * max(len({n // 64 for n in range(max(context - window, 0), context)}), 1))
    ]
    line = 0
    for tile, stop, row, row_start in shares.tolist():
        if tile < stop:
            assert (tile, row, row_start) == (line, rows_of_tiles[tile], rows_of_tiles.index(row))
            line = stop
    assert line == len(rows_of_tiles)
