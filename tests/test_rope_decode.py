"""The kernel for decodes of few rows against the torch function beside it."""

import math

import pytest
import torch
from interpreter import DEVICE, kernel_test, plain_test, run_in_interpreter
from kernel_data import DOT_DTYPES, assert_rows_close, ints, paged_inputs, randn

from nanovllm.kernels import HAS_TRITON, INTERPRETED
from nanovllm.kernels.rope_decode import rope_decode, rope_decode_torch

E4M3 = torch.float8_e4m3fn


@pytest.mark.slow
@plain_test
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_in_the_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_step(contexts, heads, kv_heads, dim, rotary_dim, block_size, dtype, normed, is_fp8=False):
    """Arguments of a step whose rows have these contexts, the newest token included; its slots hold NaN yet."""
    _q, *caches, tables, lens, _starts = paged_inputs(
        [1] * len(contexts), contexts, heads, kv_heads, dim, block_size, dtype
    )
    positions = (lens - 1).clamp(min=0)
    blocks = tables.gather(1, (positions // block_size).long()[:, None])[:, 0]
    slots = torch.where(lens > 0, blocks * block_size + positions % block_size, -1)
    caches = [cache.to(E4M3) if is_fp8 else cache for cache in caches]
    for cache in caches:
        cache.view(-1, kv_heads, dim)[slots[lens > 0].long()] = torch.full((), math.nan).to(cache.dtype)
    angles = torch.rand(1000, rotary_dim // 2, device=DEVICE) * 7
    norms = [randn(dim, dtype=dtype), randn(dim, dtype=dtype)] if normed else [None, None]
    qkv = randn(len(contexts), (heads + 2 * kv_heads) * dim + 8, dtype=dtype)[:, :-8]
    return [qkv, torch.cat([angles.cos(), angles.sin()], 1), positions, slots, *caches, *norms, 1e-5, tables, lens]


def check(step, *others):
    """Runs the kernel twice, for the semaphores, and the torch function in float32."""
    qkv, caches = step[0], step[4:6]
    kv_heads, dim = caches[0].shape[2:]
    is_fp8 = caches[0].dtype == E4M3
    theirs = [x.clone() if is_fp8 else x.float() for x in caches]
    norms = [None if norm is None else norm.float() for norm in step[6:8]]
    expected = rope_decode_torch(qkv.float(), *step[1:4], *theirs, *norms, *step[8:], *others)
    semaphores = ints([0] * (len(qkv) * kv_heads))
    for _ in range(2):
        assert_rows_close(rope_decode(*step, semaphores, *others), expected, qkv.dtype)
        assert not semaphores.any()
    slots = step[3][step[3] >= 0].long()
    for ours, cache in zip(caches, theirs, strict=True):
        written, expected = (x.view(-1, kv_heads, dim)[slots] for x in (ours, cache))
        if is_fp8:
            assert torch.equal(written.float(), expected.float())
        else:
            assert_rows_close(written, expected, qkv.dtype)


@kernel_test
@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary_dim", "block_size", "normed"),
    [
        (2, 1, 128, 128, 256, True),
        (7, 1, 80, 32, 64, False),
        (3, 1, 64, 64, 16, True),
        (2, 1, 256, 256, 256, False),
        (4, 2, 32, 16, 32, True),
    ],
)
@pytest.mark.parametrize("context", [1, 64, 65, 700])
def test_rope_decode(heads, kv_heads, dim, rotary_dim, block_size, normed, context, dtype):
    check(make_step([context], heads, kv_heads, dim, rotary_dim, block_size, dtype, normed), 0.1)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds to FP8 wrongly")
@pytest.mark.parametrize("context", [1, 65, 700])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_fp8_caches(dtype, context):
    """Keys that are turned by nothing are stored as they are, so that both functions round the same numbers."""
    step = make_step([context], 4, 1, 128, 128, 256, dtype, normed=False, is_fp8=True)
    step[1] = torch.tensor([1.0, 0.0], device=DEVICE).repeat_interleave(64).expand(1000, -1).contiguous()
    check(step, 0.1, None, None, 0.5, 0.25)


@kernel_test
@pytest.mark.parametrize("contexts", [[0, 130], [513, 0], [128, 640]])
def test_several_rows(contexts):
    check(make_step(contexts, 3, 1, 64, 64, 16, torch.float32, True), 0.1)


@kernel_test
@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(1, None), (100, None), (None, 5.0), (300, 5.0)])
def test_windows_and_soft_caps(window, soft_cap, dtype):
    check(make_step([600], 4, 1, 64, 64, 16, dtype, True), 0.5, window, soft_cap)
