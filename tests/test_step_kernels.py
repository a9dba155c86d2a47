"""The kernels around a decode step equal their torch functions: in the interpreter (a child process), on a GPU."""

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, kernel_test, run_in_interpreter

from nanovllm.kernels import HAS_TRITON
from nanovllm.kernels.decode_rows import advance_rows, advance_rows_torch, store_tokens, store_tokens_torch


@kernel_test
@pytest.mark.parametrize(("block_size", "max_blocks"), [(16, 300), (256, 3)])
def test_advance_rows(block_size, max_blocks):
    generator = torch.Generator().manual_seed(block_size)
    last_tokens = torch.randint(1000, (9,), generator=generator).to(DEVICE)
    context_lens = torch.tensor([0, 1, 15, 16, 255, 256, 700, 5, 0], dtype=torch.int32, device=DEVICE)
    block_tables = torch.randint(99, (9, max_blocks), generator=generator, dtype=torch.int32).to(DEVICE)
    rows = torch.tensor([6, 0, 4, 5, 2, 8, 8], device=DEVICE)  # 8 is the padding row
    lens = context_lens.clone()
    expected = advance_rows_torch(rows, last_tokens, lens, block_tables, block_size)
    result = advance_rows(rows, last_tokens, context_lens, block_tables, block_size)
    for name, a, b in zip(("tokens", "positions", "slots", "lens", "tables"), result, expected, strict=True):
        assert a.tolist() == b.tolist(), name
    assert context_lens.tolist() == lens.tolist() == [1, 1, 16, 16, 256, 257, 701, 5, 0]


@kernel_test
def test_advance_no_rows():
    rows = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    context_lens = torch.full((9,), 5, dtype=torch.int32, device=DEVICE)
    results = advance_rows(rows, context_lens.long(), context_lens, torch.zeros_like(context_lens)[:, None], 16)
    assert [list(x.shape) for x in results] == [[0], [0], [0], [0], [0, 1]]
    assert context_lens.tolist() == [5] * 9


@kernel_test
@pytest.mark.parametrize("batch_size", [1, 7, 300])
def test_store_tokens(batch_size):
    rows = torch.randperm(300)[:batch_size]
    packed = (torch.arange(batch_size) << 32) | (0x7FFFFFFF - torch.arange(1000, 1000 + batch_size))
    largest = 0x7F7FFFFF  # the order of the largest finite float32
    for i, order in enumerate([largest, -largest - 1, largest + 1, -largest - 2][: batch_size - 1], 1):
        packed[i] = (order << 32) | (0x7FFFFFFF - 1000 - i)
    states = []
    for store, device in ((store_tokens, DEVICE), (store_tokens_torch, "cpu")):
        last_tokens = torch.full((301,), -1, device=device)
        ring = torch.full((4, 301), -2, pin_memory=device == "cuda")
        count = torch.tensor([6], device=device)
        store(packed.to(device), rows.to(device), last_tokens, ring, count)
        states.append((last_tokens.tolist(), ring.tolist(), count.tolist()))
    assert states[0] == states[1]
    assert states[0][1][2][int(rows[0])] == 1000 and states[0][2] == [7]
    last_tokens, ring, _ = states[0]
    for stored, token_ids in ((last_tokens, [1001, 1002, 0, 0, 1005]), (ring[2], [1001, 1002, -1, -1, 1005])):
        assert [stored[row] for row in rows[1:6].tolist()] == token_ids[: batch_size - 1]


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="starts the child process")
def test_in_the_interpreter():
    assert "6 passed" in run_in_interpreter(__file__)
