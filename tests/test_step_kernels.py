"""The kernels around a decode step equal their torch functions: in the interpreter (a child process), on a GPU."""

import os

import pytest
import torch
from interpreter import run_in_interpreter

from nanovllm.kernels import HAS_TRITON
from nanovllm.kernels.decode_rows import advance_rows, advance_rows_torch, store_tokens, store_tokens_torch
from nanovllm.kernels.draw import draw, draw_torch, unpack_token_ids

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def kernel_test(test):
    """Runs a test in the interpreter's child process, and on a GPU."""
    return test if INTERPRETED else pytest.mark.gpu(test)


def score(packed):
    """The float32 scores in what `draw` returns; the tests' winners are positive."""
    return (packed >> 32).int().view(torch.float32)


@kernel_test
@pytest.mark.parametrize("vocab_size", [50, 4096, 20000, 33000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draw(vocab_size, dtype):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(5, vocab_size, generator=generator).to(dtype).to(DEVICE)
    temperatures = torch.tensor([0.0, 1.0, 0.6, 0.0, 3.0], device=DEVICE)
    seeds = torch.tensor([1, 2**40 + 7, -5, 0, 2**62], device=DEVICE)
    positions = torch.tensor([0, 1, 77, 4095, 131071], device=DEVICE)
    packed = draw(logits, temperatures, seeds, positions, start=1000)
    expected = draw_torch(logits, temperatures, seeds, positions, start=1000)
    assert unpack_token_ids(packed).tolist() == unpack_token_ids(expected).tolist()
    torch.testing.assert_close(score(packed), score(expected), rtol=1e-5, atol=1e-4)


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
@pytest.mark.parametrize("batch_size", [1, 7, 300])
def test_store_tokens(batch_size):
    rows = torch.randperm(300)[:batch_size]
    token_ids = torch.arange(1000, 1000 + batch_size)
    states = []
    for store, device in ((store_tokens, DEVICE), (store_tokens_torch, "cpu")):
        last_tokens = torch.full((301,), -1, device=device)
        ring = torch.full((4, 301), -2, pin_memory=device == "cuda")
        count = torch.tensor([6], device=device)
        store(token_ids.to(device), rows.to(device), last_tokens, ring, count)
        states.append((last_tokens.tolist(), ring.tolist(), count.tolist()))
    assert states[0] == states[1]
    assert states[0][1][2][int(rows[0])] == 1000 and states[0][2] == [7]


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="starts the child process")
def test_in_the_interpreter():
    assert "14 passed" in run_in_interpreter(__file__)


def test_equal_scores_go_to_the_lowest_id():
    zeros = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    logits = torch.tensor([[-3.0, -1.0, -1.0, -2.0]], device=DEVICE)
    assert unpack_token_ids(draw(logits, zeros.float(), zeros, zeros)).tolist() == [1]
