"""Random inputs of kernels, and how close their results must be."""

import math

import torch
from interpreter import DEVICE

from nanovllm.kernels import INTERPRETED
from nanovllm.kernels.round_rows import round_rows_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's interpreter multiplies the bits of bfloat16 matrices as if they were integers (and it is slow).
DOT_DTYPES = DTYPES[:1] if INTERPRETED else DTYPES
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def ints(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def assert_rows_close(actual, expected, dtype):
    """The error of each row (last dimension) is small against the row."""
    assert actual.shape == expected.shape and actual.dtype == dtype
    error = (actual.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-6)
    assert error.max().item() <= TOLERANCE[dtype]  # false for NaN


def paged_inputs(q_lens, contexts, heads, kv_heads, dim, block_size, dtype, window=None):
    """Queries, and a cache whose unused rows are NaN, behind tables whose unused entries point nowhere.

    Unused is also what stands before the window of a sequence's first query; whole pages of it are one of only NaN.
    """
    needed = [-(-context // block_size) for context in contexts]
    k_cache, v_cache = torch.full(
        (2, sum(needed) + 2, block_size, kv_heads, dim), math.nan, device=DEVICE, dtype=dtype
    )
    dead, *free = torch.randperm(sum(needed) + 2).tolist()
    tables = torch.full((len(contexts), max(needed) + 1), 2**30, dtype=torch.int32)
    for s, (q_len, context) in enumerate(zip(q_lens, contexts, strict=True)):
        oldest = max(context - q_len + 1 - window, 0) if window else 0
        tables[s, : oldest // block_size] = dead
        for i in range(oldest // block_size, needed[s]):
            tables[s, i] = block = free.pop()
            used = slice(max(oldest - i * block_size, 0), min(block_size, context - i * block_size))
            for cache in (k_cache, v_cache):
                cache[block, used] = randn(used.stop - used.start, kv_heads, dim, dtype=dtype)
    starts = ints([0, *q_lens]).cumsum(0, dtype=torch.int32)
    return randn(sum(q_lens), heads, dim, dtype=dtype), k_cache, v_cache, tables.to(DEVICE), ints(contexts), starts


def rounded(x: torch.Tensor, group: int, kind: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """Rows [M, K] as they are multiplied in 8 bits, each group of their elements rounded with its scale."""
    group = min(group, x.size(1))
    codes, scales = round_rows_torch(x, kind, group)
    return (codes.float() * scales.t().repeat_interleave(group, 1)[:, : x.size(1)]).to(x.dtype)
