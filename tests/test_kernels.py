"""Every Triton kernel equals the torch function beside it, and the torch functions equal their definitions.

The kernel tests run on the GPU where there is one. `test_in_the_interpreter` runs the same tests without one, in a
child pytest with TRITON_INTERPRET=1, which must be set before triton is imported and not reach the other test files.
"""

import ast
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, kernel_test, plain_test, run_in_interpreter
from kernel_data import DOT_DTYPES, DTYPES, assert_rows_close, ints, paged_inputs, randn

import nanovllm
from nanovllm.kernels import HAS_TRITON
from nanovllm.kernels.activation import GATES, gelu_tanh_and_mul_torch, silu_and_mul_torch
from nanovllm.kernels.paged_attention import paged_decode, paged_prefill
from nanovllm.kernels.paged_attention_torch import paged_attention_torch
from nanovllm.kernels.rms_norm import rms_norm, rms_norm_torch
from nanovllm.kernels.sampling import draw, filter_thresholds, unpack_token_ids
from nanovllm.kernels.sampling_torch import draw as draw_torch
from nanovllm.kernels.sampling_torch import filter_thresholds as filter_thresholds_torch
from nanovllm.kernels.store_kvcache import rope_store_kvcache, rope_store_kvcache_torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN, so that an element no kernel wrote shows."""

    def poison(allocate):
        def allocate_nan(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return allocate_nan

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@plain_test
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_in_the_interpreter():
    run_in_interpreter(__file__)


@plain_test
def test_no_function_keeps_a_tensor_that_it_made():
    """It may be made first in the capture of a graph, where nothing is computed, and would have no value."""
    kept = []
    for path in Path(nanovllm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("cache" in ast.unparse(d) for d in node.decorator_list):
                kept.append((node.name, ast.unparse(node.returns)))
    assert ("gpu_of", "Gpu") in kept
    assert not [name for name, returned in kept if returned in ("Tensor", "torch.Tensor")]


@plain_test
def test_package_works_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from nanovllm.kernels import HAS_TRITON, paged_attention, rms_norm, sampling, store_kvcache
assert not HAS_TRITON
print(rms_norm.rms_norm(torch.full((1, 4), 3.0), torch.full((4,), 2.0), 0.0).tolist())
"""
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.stdout.strip() == "[[2.0, 2.0, 2.0, 2.0]]", child.stderr[-3000:]


# Normalisation and activation


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 128), (7, 96), (5, 1000), (3, 2560)])
def test_rms_norm(rows, size, dtype):
    x = randn(rows, size + 24, dtype=dtype)[:, :size]
    weight = randn(size, dtype=dtype)
    assert_rows_close(rms_norm(x, weight, 1e-6), rms_norm_torch(x.float(), weight.float(), 1e-6), dtype)


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 128), (7, 96), (3, 2560)])
def test_rms_norm_added_to_a_residual(rows, size, dtype):
    """The weight may be of float32."""
    x, base = randn(rows, size, dtype=dtype), randn(rows, size + 24, dtype=dtype)
    weight, before = 1 + randn(size) / 1000, base.clone()
    y = rms_norm(x, weight, 1e-6, residual=base[:, :size])
    assert y.data_ptr() == base.data_ptr() and torch.equal(base[:, size:], before[:, size:])
    normalised = rms_norm_torch(x.float(), weight, 1e-6).to(dtype)
    assert_rows_close(y, before[:, :size].float() + normalised.float(), dtype)


@kernel_test
@pytest.mark.parametrize("function", [rms_norm, rms_norm_torch])
def test_what_is_added_is_rounded_first(function):
    """1.0039 is 1 in bfloat16, with which 256 is 257 and so 256; added up at once it would be 258."""
    x, residual = torch.ones(1, 4, device=DEVICE).bfloat16(), torch.full((1, 4), 256.0, device=DEVICE).bfloat16()
    assert function(x, torch.full((4,), 1.0039, device=DEVICE), 0.0, residual).tolist() == [[256.0] * 4]


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (4, 1024), (3, 1500)])
@pytest.mark.parametrize("gate", GATES)
def test_gates(gate, rows, size, dtype):
    x = randn(rows, 2 * size + 8, dtype=dtype)[:, : 2 * size]
    x[0, :2] = ints([100.0, -100.0], dtype)
    expected = {"silu": silu_and_mul_torch, "gelu_tanh": gelu_tanh_and_mul_torch}[gate](x.float())
    assert_rows_close(GATES[gate](x), expected, dtype)


@kernel_test
def test_no_rows():
    weight = randn(64)
    assert rms_norm(randn(0, 64), weight, 1e-6).shape == (0, 64)
    assert rms_norm(randn(0, 64), weight, 1e-6, randn(0, 64)).shape == (0, 64)
    assert all(gate_and_mul(randn(0, 64)).shape == (0, 32) for gate_and_mul in GATES.values())


# Rotary embedding and the KV store


def rope_table(max_position, dim):
    angles = torch.arange(max_position)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary_dim", "normed", "index_dtype"),
    [
        (2, 1, 16, 16, False, torch.int32),
        (7, 1, 80, 80, True, torch.int64),
        (4, 2, 128, 128, True, torch.int32),
        (3, 3, 96, 96, False, torch.int64),
        (2, 1, 16, 2, True, torch.int32),
        (7, 1, 80, 32, True, torch.int64),
        (4, 2, 128, 64, False, torch.int32),
        (3, 3, 96, 72, False, torch.int64),
        (2, 1, 20, 10, True, torch.int32),
    ],
)
def test_rope_store_kvcache(heads, kv_heads, dim, rotary_dim, normed, index_dtype, dtype):
    qkv = randn(5, (heads + 2 * kv_heads) * dim + 8, dtype=dtype)[:, :-8]
    norms = [randn(dim, dtype=dtype), randn(dim, dtype=dtype)] if normed else []
    caches = torch.full((2, 3, 16, kv_heads, dim), math.nan, device=DEVICE, dtype=dtype)
    expected_caches = caches.clone().float()
    positions, slots = ints([0, 99, 5, 17, 3], index_dtype), ints([47, -1, 0, 16, -1], index_dtype)
    table = rope_table(100, rotary_dim).to(DEVICE)
    q = rope_store_kvcache(qkv, table, positions, slots, *caches, *norms, eps=1e-5)
    expected_q = rope_store_kvcache_torch(
        qkv.float(), table, positions, slots, *expected_caches, *(norm.float() for norm in norms), eps=1e-5
    )
    assert_rows_close(q, expected_q, dtype)
    written = caches.view(2, 48, kv_heads, dim)[:, [47, 0, 16]]
    assert_rows_close(written, expected_caches.view(2, 48, kv_heads, dim)[:, [47, 0, 16]], dtype)
    assert torch.equal(caches.isnan(), expected_caches.isnan())
    assert caches.isnan().sum() == caches.numel() - written.numel()
    if not normed:  # what does not rotate goes through bit by bit
        q_in, k_in, _ = qkv.unflatten(1, (-1, dim)).split((heads, kv_heads, kv_heads), dim=1)
        assert torch.equal(q[..., rotary_dim:], q_in[..., rotary_dim:])
        assert torch.equal(written[0, ..., rotary_dim:], k_in[[0, 2, 3]][..., rotary_dim:])


@plain_test
@pytest.mark.parametrize("dim", [8, 12])
def test_rope_is_a_rotation_in_the_complex_plane(dim):
    """Of the first 8 dimensions of a head."""
    qkv, positions = torch.randn(4, 3 * dim), torch.tensor([0, 1, 7, 30])
    k_cache, v_cache = torch.zeros(2, 1, 4, 1, dim)
    q = rope_store_kvcache(qkv, rope_table(31, 8), positions, torch.arange(4), k_cache, v_cache)
    turns = torch.polar(torch.ones(4, 4), positions[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8))
    for rotated, x in ((q, qkv[:, :dim]), (k_cache, qkv[:, dim : 2 * dim])):
        z = torch.complex(x[:, :4], x[:, 4:8]) * turns
        torch.testing.assert_close(rotated.view(4, dim), torch.cat((z.real, z.imag, x[:, 8:]), dim=-1))
    assert torch.equal(v_cache.view(4, dim), qkv[:, 2 * dim :])


# Paged attention


def reference(q, k_cache, v_cache, *others):
    """The torch function in float32."""
    return paged_attention_torch(q.float(), k_cache.float(), v_cache.float(), *others)


@plain_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_attention_torch_is_attention(dtype):
    q_lens, contexts, heads, kv_heads, dim = [3, 0, 1, 20], [3, 5, 40, 37], 4, 2, 8
    inputs = [x.cpu() for x in paged_inputs(q_lens, contexts, heads, kv_heads, dim, 16, dtype)]
    q, k_cache, v_cache, tables, _, starts = inputs
    expected = torch.zeros_like(q)
    for s, (q_len, context) in enumerate(zip(q_lens, contexts, strict=True)):
        for i in range(q_len):
            for head in range(heads):
                slots = [(tables[s, n // 16], n % 16, head // 2) for n in range(context - q_len + i + 1)]
                keys = torch.stack([k_cache[slot] for slot in slots]).double()
                values = torch.stack([v_cache[slot] for slot in slots]).double()
                weights = torch.softmax(keys @ q[starts[s] + i, head].double() * 0.3, dim=0)
                expected[starts[s] + i, head] = weights @ values
    assert_rows_close(paged_attention_torch(*inputs, 0.3), expected, dtype)


@plain_test
def test_attention_on_the_cpu_takes_the_torch_function():
    inputs = [x.cpu() for x in paged_inputs([1, 1, 1], [7, 0, 30], 4, 2, 8, 16, torch.float32)]
    expected = paged_attention_torch(*inputs, 0.3)
    *cache, contexts, starts = inputs
    assert not expected[1].any()
    assert torch.equal(paged_decode(*cache, contexts, torch.zeros(6, dtype=torch.int32), 0.3), expected)
    assert torch.equal(paged_prefill(*cache, contexts, starts, 0.3), expected)


SHAPES = [(2, 2, 64, 16), (4, 2, 80, 64), (4, 1, 96, 256), (7, 1, 32, 16), (6, 3, 128, 64), (2, 1, 256, 256)]


@kernel_test
@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), SHAPES)
def test_paged_prefill(heads, kv_heads, dim, block_size, dtype):
    # Whole prompts, a chunk behind a context, decode rows, a sequence with nothing to do, a border at every tile size.
    q_lens, contexts = [70, 33, 1, 0, 1, 64, 5], [70, 100, 1, 9, 130, 128, 261]
    inputs = paged_inputs(q_lens, contexts, heads, kv_heads, dim, block_size, dtype)
    assert_rows_close(paged_prefill(*inputs, 0.1), reference(*inputs, 0.1), dtype)


@kernel_test
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_paged_prefill_of_few_queries(dtype):
    inputs = paged_inputs([1, 2, 4, 0], [1, 50, 70, 0], 4, 2, 64, 16, dtype)
    assert_rows_close(paged_prefill(*inputs, 0.1), reference(*inputs, 0.1), dtype)


@kernel_test
@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), SHAPES)
def test_paged_decode(heads, kv_heads, dim, block_size, dtype):
    contexts = [1, 0, 15, 16, 17, 63, 64, 65, 255, 257, 0]
    *inputs, starts = paged_inputs([1] * len(contexts), contexts, heads, kv_heads, dim, block_size, dtype)
    semaphores = torch.zeros(len(contexts) * kv_heads, dtype=torch.int32, device=DEVICE)
    o = paged_decode(*inputs, semaphores, 0.1)
    assert_rows_close(o, reference(*inputs, starts, 0.1), dtype)
    assert not o[contexts.index(0)].any()
    assert not semaphores.any()


@kernel_test
@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("contexts", [[700], [1], [0], [513, 0, 2], [128, 640]])
def test_paged_decode_of_few_rows_is_split(contexts, dtype):
    *inputs, starts = paged_inputs([1] * len(contexts), contexts, 3, 1, 64, 16, dtype)
    semaphores = torch.zeros(len(contexts), dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # the second call finds the semaphores as the first left them
        assert_rows_close(paged_decode(*inputs, semaphores, 0.1), reference(*inputs, starts, 0.1), dtype)
        assert not semaphores.any()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_paged_decode_in_a_cuda_graph_follows_the_context(window):
    contexts = [900, 3, 0, 260]
    q, k_cache, v_cache, tables, lens, starts = paged_inputs([1] * 4, contexts, 8, 4, 128, 256, torch.bfloat16)
    semaphores = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    paged_decode(q, k_cache, v_cache, tables, lens, semaphores, 0.1, window)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = paged_decode(q, k_cache, v_cache, tables, lens, semaphores, 0.1, window)
    for contexts in ([900, 3, 0, 260], [1, 2, 0, 256], [513, 0, 0, 0]):
        lens.copy_(ints(contexts))
        o.fill_(math.nan)
        graph.replay()
        assert_rows_close(o, reference(q, k_cache, v_cache, tables, lens, starts, 0.1, window), torch.bfloat16)
        assert not semaphores.any()


@pytest.mark.gpu
def test_a_cache_of_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    torch.cuda.empty_cache()
    k_cache, v_cache = torch.zeros((2, 8300, 256, 8, 128), device=DEVICE, dtype=torch.bfloat16)
    tables, lens, starts = ints([[8299, 1, 8298]]), ints([600]), ints([0, 600])
    slots = (tables[0].long()[:, None] * 256 + torch.arange(256, device=DEVICE)).flatten()[:600]
    qkv = randn(600, 32 * 128, dtype=torch.bfloat16)
    table = rope_table(600, 128).to(DEVICE)
    q = rope_store_kvcache(qkv, table, torch.arange(600, device=DEVICE), slots, k_cache, v_cache)
    assert torch.equal(v_cache.view(-1, 8, 128)[slots].flatten(1), qkv[:, 24 * 128 :])
    expected = paged_attention_torch(q, k_cache, v_cache, tables, lens, starts, 0.1)
    prefilled = paged_prefill(q, k_cache, v_cache, tables, lens, starts, 0.1)
    assert_rows_close(prefilled, expected, torch.bfloat16)
    semaphores = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    decoded = paged_decode(q[-1:], k_cache, v_cache, tables, lens, semaphores, 0.1)
    assert_rows_close(decoded, expected[-1:], torch.bfloat16)


# Sampling

FILTERS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0),
    (0.0, 5, 0.5, 0.1),
    (1.0, 20, 1.0, 0.0),
    (0.7, 20, 0.9, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 0.3, 0.0),
    (2.0, 0, 0.95, 0.02),
    (1.0, 0, 1.0, 0.1),
    (1.3, 50, 0.8, 0.05),
    (1.0, 10**6, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, -1, 0.0, 0.0),
    (1.0, 0, 1.0, 1.0),
    (0.5, 12000, 0.99, 0.0),
]


def filters(rows):
    """As `filter_thresholds` takes them, the last row's first."""
    temperature, top_k, top_p, min_p = zip(*rows[::-1], strict=True)
    order, real = ints(range(len(rows)), torch.int64).flip(0), torch.float32
    return order, ints(temperature, real), ints(top_k, torch.int64), ints(top_p, real), ints(min_p, real)


def kept(logits, low):
    """The logits, -inf where they are below their row's threshold."""
    assert low.dtype == torch.float32
    return logits.masked_fill(logits.float() < low[:, None], -math.inf)


@plain_test
@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), FILTERS)
def test_filter_thresholds_torch_is_its_definition(temperature, top_k, top_p, min_p):
    logits = (torch.randn(40) * 2).round(decimals=1)  # with ties
    logits[3] = -math.inf
    weight = {i: math.exp((x - 9) / (temperature or 1)) for i, x in enumerate(logits.tolist())}
    left = [i for i in weight if weight[i] >= min_p * max(weight.values()) * (1 - 1e-6)]
    if 0 < top_k < len(left):
        border = sorted((weight[i] for i in left), reverse=True)[top_k - 1]
        left = [i for i in left if weight[i] >= border]
    if top_p < 1:
        mass, total = 0.0, sum(weight[i] for i in left)
        for border in sorted((weight[i] for i in left), reverse=True):
            mass += border
            if mass >= top_p * total:
                break
        left = [i for i in left if weight[i] >= border]
    expected = torch.full((40,), -math.inf)
    expected[left] = logits[left]
    low = filter_thresholds_torch(logits[None], *(x.cpu() for x in filters([(temperature, top_k, top_p, min_p)])))
    assert torch.equal(kept(logits[None], low)[0], expected if temperature else logits)


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "spread"), [(100, 5), (20001, 1)])
def test_filter_thresholds(size, spread, dtype):
    logits = randn(len(FILTERS), size, dtype=dtype) * spread
    low = filter_thresholds(logits, *filters(FILTERS))
    actual, expected = kept(logits, low), kept(logits, filter_thresholds_torch(logits, *filters(FILTERS)))
    # Sums differ in their last bits, which may move the border of a top-p by a token in thousands.
    assert ((actual != expected).sum(-1) <= (expected > -math.inf).sum(-1) // 1000).all()
    assert low[:2].tolist() == [-math.inf] * 2  # not filtered
    assert (kept(logits, low) == logits).all(-1).sum() == 3  # nor does a top-k of 10**6 remove any


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
def test_filter_thresholds_of_odd_rows(dtype):
    logits = torch.zeros(6, 17000, device=DEVICE)
    logits[1, 100:] = -math.inf
    logits[2] = -100.0
    logits[2, 8999] = 100.0
    logits[3, ::2] = -0.0
    logits[4] = torch.linspace(-60000, 60000, 17000, device=DEVICE)
    logits[5] = 2.5
    logits[5, :: 8 * 1024] = ints([5.0, 4.0, 3.0], torch.float32)  # one lane's, which notes two
    logits = logits.to(dtype)
    options = [
        (1.0, 3, 0.5, 0.0),
        (1.0, 3, 1.0, 0.0),
        (1.0, 0, 0.5, 0.0),
        (1e-3, 0, 1.0, 0.5),
        (50.0, 9000, 0.99, 0.0),
    ]
    for row in options:
        expected = kept(logits, filter_thresholds_torch(logits, *filters([row] * 6)))
        assert torch.equal(kept(logits, filter_thresholds(logits, *filters([row] * 6))), expected)


@kernel_test
@pytest.mark.parametrize("is_filtered", [False, True])
@pytest.mark.parametrize("vocab_size", [50, 4096, 9000] if INTERPRETED else [50, 4096, 20000, 33000])
@pytest.mark.parametrize(("dtype", "index_dtype"), [(torch.float32, torch.int64), (torch.bfloat16, torch.int32)])
def test_draw(vocab_size, dtype, index_dtype, is_filtered):
    logits = randn(5, vocab_size, dtype=dtype)
    rows = ints([1, 3, 0, 2, 5], torch.int64)
    temperature = ints([0.6, 0.0, 0.0, 1.0, 9.0, 3.0], torch.float32)
    seeds = ints([-5, 1, 0, 2**40 + 7, 9, 2**62], torch.int64)
    positions = ints([0, 2, 100, 4095, 130000], index_dtype)
    low = None
    if is_filtered:
        low = logits.float().topk(5).values.amin(-1)
        low[0] = -math.inf
    packed = draw(logits, rows, temperature, seeds, positions, 1000, low)
    expected = draw_torch(logits, rows, temperature, seeds, positions, 1000, low)
    token_ids = unpack_token_ids(packed)
    assert token_ids.tolist() == unpack_token_ids(expected).tolist()
    scores = [(x >> 32).int().view(torch.float32) for x in (packed, expected)]  # true of positive ones, as here
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-4)
    if is_filtered:
        assert torch.equal(packed, draw(kept(logits, low), rows, temperature, seeds, positions, 1000))
        assert token_ids.tolist() != unpack_token_ids(draw(logits, rows, temperature, seeds, positions, 1000)).tolist()


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
def test_draw_without_a_finite_maximum(dtype):
    """Rows of NaN, of infinity, of nothing above -inf, and rows with one such value in any part of the vocabulary."""
    size = 17000 if INTERPRETED else 33000  # parts of the vocabulary have 16,384 tokens
    logits = randn(9, size, dtype=dtype)
    logits[0] = math.nan
    logits[1, -1] = math.nan
    logits[2, 0] = math.inf
    logits[3] = -math.inf
    logits[4, 1:] = -math.inf
    logits[5, size - 1000] = math.nan
    rows = ints(range(9), torch.int64)
    seeds = ints(range(9), torch.int64)
    low = ints([-math.inf, 1.0, -math.inf] * 3, torch.float32)
    low[4] = -math.inf  # else nothing would be left of it
    for temperature in (0.0, 1.0, 3e38):
        temperatures = torch.full((9,), temperature, device=DEVICE)
        packed = draw(logits, rows, temperatures, seeds, rows, 0, low)
        token_ids = unpack_token_ids(packed).tolist()
        assert token_ids == unpack_token_ids(draw_torch(logits, rows, temperatures, seeds, rows, 0, low)).tolist()
        assert token_ids[:6] == [-1, -1, -1, -1, 0, -1] and min(token_ids[6:]) >= 0


@kernel_test
def test_equal_scores_go_to_the_lowest_id():
    zeros = ints([0], torch.int64)
    logits = ints([[-3.0, -1.0, -1.0, -2.0]], torch.float32)
    assert unpack_token_ids(draw(logits, zeros, zeros.float(), zeros, zeros)).tolist() == [1]


@kernel_test
def test_sampling_of_no_rows():
    logits, zeros = randn(0, 64), ints([], torch.int64)
    assert filter_thresholds(logits, zeros, zeros.float(), zeros, zeros.float(), zeros.float()).shape == (0,)
    assert draw(logits, zeros, zeros.float(), zeros, zeros).shape == (0,)
