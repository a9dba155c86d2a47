"""Hopper's own prefill equals the torch function. No interpreter runs it; test_other_gpus.py compiles it."""

import pytest
import torch
from interpreter import DEVICE
from kernel_data import assert_rows_close, paged_inputs

from nanovllm.kernels import paged_attention
from nanovllm.kernels.paged_attention import paged_prefill, takes_hopper_prefill
from nanovllm.kernels.paged_attention_torch import paged_attention_torch

IS_HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cuda" and not IS_HOPPER, reason="needs Hopper")]

# Tokens of each sequence in this step, and with those before: ends within a tile, at its border and at a page's, one
# and several tiles, whole prompts and what stands behind a prefix.
STEPS = [
    ([1], [1]),
    ([128], [128]),
    ([127, 129, 64], [127, 129, 64]),
    ([1, 0, 5, 300], [700, 9, 256, 300]),
    ([257, 1, 40, 0], [257, 513, 1064, 0]),
    ([1500], [3000]),
]


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(paged_attention, "HOPPER_PREFILL_TOKENS", 0)


def check(inputs, dtype):
    q, k_cache, v_cache, *others = inputs
    assert takes_hopper_prefill(q, k_cache, None, None)
    expected = paged_attention_torch(q.float(), k_cache.float(), v_cache.float(), *others, 0.1)
    assert_rows_close(paged_prefill(*inputs, 0.1), expected, dtype)


# One that compiles for each: data type, dimensions, heads of a group, heads, block size.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"), [(4, 2, 64, 128), (9, 3, 64, 256), (5, 1, 128, 256), (2, 2, 128, 128)]
)
@pytest.mark.parametrize(("q_lens", "contexts"), STEPS, ids=str)
def test_prefill(q_lens, contexts, heads, kv_heads, dim, block_size, dtype):
    """Slots that hold no token are NaN."""
    check(paged_inputs(q_lens, contexts, heads, kv_heads, dim, block_size, dtype), dtype)


def test_many_sequences():
    q_lens = [1 + 7 * i % 40 for i in range(600)]
    check(paged_inputs(q_lens, q_lens, 4, 2, 64, 128, torch.bfloat16), torch.bfloat16)


def test_what_it_does_not_take(monkeypatch):
    inputs = paged_inputs([3], [3], 4, 2, 64, 256, torch.bfloat16)
    q, k_cache = inputs[:2]
    assert takes_hopper_prefill(q, k_cache, None, None)
    assert not takes_hopper_prefill(q, k_cache, 100, None)
    assert not takes_hopper_prefill(q, k_cache, None, 30.0)
    assert not takes_hopper_prefill(q.float(), k_cache.float(), None, None)
    assert not takes_hopper_prefill(q, k_cache.to(torch.float8_e4m3fn), None, None)
    assert not takes_hopper_prefill(q, k_cache[:, :64], None, None)
    assert not takes_hopper_prefill(q[:, :, :32], k_cache[..., :32], None, None)
    monkeypatch.setattr(paged_attention, "HOPPER_PREFILL_TOKENS", 4)
    assert not takes_hopper_prefill(q, k_cache, None, None)
