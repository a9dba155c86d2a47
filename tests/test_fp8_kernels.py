"""Kernels of an FP8 KV cache: what is stored, what attention reads. tests/test_kernels.py says how they are tested.

The interpreter rounds to FP8 wrongly and has no NaN in it: there, what is stored are numbers that FP8 holds.
"""

import math

import pytest
import torch
from interpreter import DEVICE, kernel_test, plain_test, run_in_interpreter
from kernel_data import DTYPES, assert_rows_close, ints, paged_inputs, randn

from nanovllm.kernels import HAS_TRITON, INTERPRETED
from nanovllm.kernels.paged_attention import paged_decode, paged_prefill
from nanovllm.kernels.paged_attention_torch import paged_attention_torch
from nanovllm.kernels.store_kvcache import rope_store_kvcache, rope_store_kvcache_torch

E4M3 = torch.float8_e4m3fn


@pytest.mark.slow
@plain_test
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_in_the_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- what is stored ------------------------------------------------------------------------------------------------


def store_both(qkv, table, kv_heads, dim, k_scale, v_scale, norms=()):
    """What the kernel stores of five rows, and what the torch function does: (q, keys, values) of each."""
    positions, slots = ints([0, 99, 5, 17, 3]), ints([47, -1, 0, 16, -1])
    results = []
    for store in (rope_store_kvcache, rope_store_kvcache_torch):
        caches = torch.full((2, 3, 16, kv_heads, dim), math.nan, device=DEVICE).to(E4M3)
        q = store(qkv, table, positions, slots, *caches, *norms, eps=1e-5, k_scale=k_scale, v_scale=v_scale)
        caches = caches.flatten(1, 2).float()
        stored = caches[:, [47, 0, 16]]
        assert caches.isnan().sum() == caches.numel() - stored.numel()
        results.append((q, *stored))
    return results


LAYERS = [(2, 1, 16, 16), (7, 1, 80, 32), (4, 2, 128, 128), (3, 3, 96, 72)]  # heads, KV heads, dim, rotary dim


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary_dim"), LAYERS)
def test_store_of_what_fp8_holds(heads, kv_heads, dim, rotary_dim, dtype):
    """Turned by quarters, keys and values are stored as they are."""
    turns = torch.randint(4, (100, rotary_dim // 2))
    table = torch.cat([ints([1, 0, -1, 0])[turns], ints([0, 1, 0, -1])[turns]], dim=1).float()
    numbers = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(E4M3).float()
    numbers = numbers[numbers.isfinite()]
    qkv = numbers[torch.randint(len(numbers), (5, (heads + 2 * kv_heads) * dim))]
    qkv[:, heads * dim :] /= 4
    ours, theirs = store_both(qkv.to(dtype), table, kv_heads, dim, 0.25, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(ours[2].flatten(1), 4 * qkv[[0, 2, 3], -kv_heads * dim :])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds to FP8 wrongly")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k_scale", "v_scale"), [(1.0, 1.0), (0.03, 2.5)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary_dim"), LAYERS)
def test_store(heads, kv_heads, dim, rotary_dim, normed, k_scale, v_scale, dtype):
    """Values are equal; of keys a few, that float32 rounds otherwise, differ by a step of FP8."""
    qkv = randn(5, (heads + 2 * kv_heads) * dim + 8, dtype=dtype)[:, :-8]
    norms = [randn(dim, dtype=dtype), randn(dim, dtype=dtype)] if normed else []
    ours, theirs = store_both(qkv, randn(100, rotary_dim), kv_heads, dim, k_scale, v_scale, norms)
    assert_rows_close(ours[0], theirs[0], dtype)
    error = (ours[1] - theirs[1]).abs()
    assert (error <= (theirs[1].abs() / 8).clamp(min=2.0**-9)).all() and (error > 0).float().mean() < 0.01
    assert torch.equal(ours[2], theirs[2])


def check_saturation(store):
    """Numbers beyond the largest are stored as that, infinite ones too; NaN says that something failed, and stays."""
    values = torch.tensor([447.0, 1e4, -1e4, 500.0, -448.0, math.inf, -math.inf, math.nan], device=DEVICE)
    qkv = torch.cat([values, values[:5], values[:3], values])[None]
    caches = torch.zeros(2, 1, 16, 1, 8, device=DEVICE).to(E4M3)
    unturned = torch.tensor([[1.0, 0.0]], device=DEVICE)
    store(qkv, unturned, ints([0]), ints([3]), *caches, k_scale=0.5, v_scale=2.0)
    k, v = caches[:, 0, 3, 0].float().tolist()
    assert k == [448, 448, -448, 448, -448, 448, 448, -448]
    assert v[:7] == [224, 448, -448, 256, -224, 448, -448]
    assert math.isnan(v[7]) or INTERPRETED


@kernel_test
def test_the_kernel_saturates():
    check_saturation(rope_store_kvcache)


@plain_test
def test_the_torch_function_saturates():
    check_saturation(rope_store_kvcache_torch)


# ---- what attention reads ------------------------------------------------------------------------------------------

SCORES = [(None, None), (1, None), (37, 0.5), (130, None), (None, 0.5)]  # window, soft cap
# Heads, KV heads, dimensions, block size.
SHAPES = [(2, 1, 80, 16), (7, 1, 16, 64), (4, 2, 128, 256), (3, 1, 256, 64), (8, 2, 64, 256), (2, 2, 32, 16)]
QUERY_DTYPES = DTYPES
if INTERPRETED:  # which is slow
    SCORES, SHAPES, QUERY_DTYPES = [(None, None), (37, 0.5)], SHAPES[:2], [torch.float32, torch.bfloat16]
Q_LENS, CONTEXTS = [20, 33, 1, 0, 1, 9], [20, 100, 1, 9, 130, 80]
DECODES = [1, 0, 15, 17, 65, 130, 0]
K_SCALE, V_SCALE = 0.6, 3.0


def fp8_inputs(q_lens, contexts, heads, kv_heads, dim, block_size, dtype, window=None):
    """`paged_inputs` with keys and values in FP8: times their scales, they are about 1."""
    q, k_cache, v_cache, *others = paged_inputs(
        q_lens, contexts, heads, kv_heads, dim, block_size, torch.float32, window
    )
    return q.to(dtype), (k_cache / K_SCALE).to(E4M3), (v_cache / V_SCALE).to(E4M3), *others


def reference(q, *others):
    """The torch function in float32."""
    return paged_attention_torch(q.float(), *others, K_SCALE, V_SCALE)


@plain_test
@pytest.mark.parametrize(("window", "soft_cap"), SCORES)
def test_the_torch_function_is_that_of_the_numbers_that_are_meant(window, soft_cap):
    q, k_cache, v_cache, *others = fp8_inputs(Q_LENS, CONTEXTS, 4, 2, 8, 16, torch.float32, window)
    q, k_cache, v_cache, *others = (x.cpu() for x in (q, k_cache, v_cache, *others))
    scores = 0.1, window, soft_cap
    expected = paged_attention_torch(q, k_cache.float() * K_SCALE, v_cache.float() * V_SCALE, *others, *scores)
    torch.testing.assert_close(reference(q, k_cache, v_cache, *others, *scores), expected)
    tables, lens, starts = others
    prefilled = paged_prefill(q, k_cache, v_cache, tables, lens, starts, *scores, K_SCALE, V_SCALE)
    torch.testing.assert_close(prefilled, expected)
    last = starts[1:].long() - 1
    decoded = paged_decode(q[last], k_cache, v_cache, tables, lens, torch.zeros(12), *scores, K_SCALE, V_SCALE)
    torch.testing.assert_close(decoded[[0, 1, 2, 4, 5]], expected[last[[0, 1, 2, 4, 5]]])


@kernel_test
@pytest.mark.parametrize("dtype", QUERY_DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), SHAPES)
@pytest.mark.parametrize(("window", "soft_cap"), SCORES)
def test_prefill(window, soft_cap, heads, kv_heads, dim, block_size, dtype):
    inputs = fp8_inputs(Q_LENS, CONTEXTS, heads, kv_heads, dim, block_size, dtype, window)
    scores = 0.1, window, soft_cap
    assert_rows_close(paged_prefill(*inputs, *scores, K_SCALE, V_SCALE), reference(*inputs, *scores), dtype)


@kernel_test
@pytest.mark.parametrize("dtype", QUERY_DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), SHAPES)
@pytest.mark.parametrize(("window", "soft_cap"), SCORES)
def test_decode(window, soft_cap, heads, kv_heads, dim, block_size, dtype):
    ones = [1] * len(DECODES)
    *inputs, starts = fp8_inputs(ones, DECODES, heads, kv_heads, dim, block_size, dtype, window)
    semaphores = torch.zeros(len(DECODES) * kv_heads, dtype=torch.int32, device=DEVICE)
    scores = 0.1, window, soft_cap
    o = paged_decode(*inputs, semaphores, *scores, K_SCALE, V_SCALE)
    assert_rows_close(o, reference(*inputs, starts, *scores), dtype)
    assert not o[DECODES.index(0)].any()
    assert not semaphores.any()


@kernel_test
@pytest.mark.parametrize("size", [1e-20, 1e6])
def test_queries_that_float16_would_not_hold(size):
    q, *others = fp8_inputs(Q_LENS, CONTEXTS, 2, 1, 64, 16, torch.bfloat16)
    inputs, scores = ((q.float() * size).to(torch.bfloat16), *others), (0.1 / size, None, None)
    assert_rows_close(paged_prefill(*inputs, *scores, K_SCALE, V_SCALE), reference(*inputs, *scores), q.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 12, 200])
def test_decode_of_long_contexts(rows, dtype):
    """With every kind of tile and share."""
    contexts = torch.randint(1, 5000, (rows,)).tolist()
    *inputs, starts = fp8_inputs([1] * rows, contexts, 16, 8, 128, 256, dtype)
    semaphores = torch.zeros(rows * 8, dtype=torch.int32, device=DEVICE)
    o = paged_decode(*inputs, semaphores, 0.1, None, None, K_SCALE, V_SCALE)
    assert_rows_close(o, reference(*inputs, starts, 0.1, None, None), dtype)
