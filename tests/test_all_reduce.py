"""The sum over ranks that GPUs make by reading each other's memory. Here two ranks share a device."""

from contextlib import nullcontext

import pytest
import torch
from interpreter import run_in_interpreter

from nanovllm.kernels import HAS_TRITON, INTERPRETED
from nanovllm.kernels.all_reduce import BLOCK, FLAG_BYTES, MAX_BLOCKS, POLLS, add_sum, add_sum_torch

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def kernel_test(test):
    """Runs a test in the interpreter's child process, and on a GPU."""
    return test if INTERPRETED else pytest.mark.gpu(test)


class Rank:
    """A rank's buffer and counters, and a stream, where there are streams, to run beside the other."""

    def __init__(self, rank: int, numel: int, dtype: torch.dtype) -> None:
        self.rank = rank
        self.bytes = torch.zeros(2 * FLAG_BYTES + numel * dtype.itemsize, dtype=torch.uint8, device=DEVICE)
        self.flags = self.bytes[: 2 * FLAG_BYTES].view(torch.int32).view(2, MAX_BLOCKS)
        self.part = self.bytes[2 * FLAG_BYTES :].view(dtype)
        self.counts = torch.zeros(MAX_BLOCKS, dtype=torch.int32, device=DEVICE)
        self.given_up = torch.zeros(1, dtype=torch.int32, pin_memory=DEVICE == "cuda")
        self.stream = torch.cuda.stream(torch.cuda.Stream()) if DEVICE == "cuda" else nullcontext()

    def add_sum(self, x: torch.Tensor, peers: torch.Tensor) -> torch.Tensor:
        with self.stream:
            return add_sum(x, peers, 2 * FLAG_BYTES, self.counts, self.given_up, self.rank)


def make_ranks(numel: int, dtype: torch.dtype) -> tuple[list[Rank], torch.Tensor]:
    ranks = [Rank(rank, numel, dtype) for rank in range(2)]
    return ranks, torch.tensor([rank.bytes.data_ptr() for rank in ranks], device=DEVICE)


@kernel_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, BLOCK + 3, 3 * BLOCK, MAX_BLOCKS * BLOCK + BLOCK + 5])
@pytest.mark.parametrize("count", [0, 2**31 - 1], ids=["first", "overflow"])
def test_add_sum(dtype, numel, count):
    ranks, peers = make_ranks(numel, dtype)
    x = torch.randn(numel, device=DEVICE).to(dtype)
    for rank in ranks:
        rank.part.copy_(torch.randn(numel))
        rank.counts.fill_(count)
        rank.flags.fill_(count)
        if DEVICE == "cpu":  # nothing runs beside: the other rank has come already
            rank.flags[1 - rank.rank] += 1
    want = add_sum_torch(x.clone(), [rank.part for rank in ranks])
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    results = [rank.add_sum(x.clone(), peers) for rank in ranks]
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    torch.testing.assert_close(results[0], want)
    assert torch.equal(results[0], results[1])
    num_blocks = min(-(-numel // BLOCK), MAX_BLOCKS)
    for rank in ranks:
        after = torch.tensor(count, dtype=torch.int32) + 1
        assert (rank.counts[:num_blocks].cpu() == after).all() and (rank.counts[num_blocks:].cpu() == count).all()
        assert (rank.flags[:, :num_blocks].cpu() == after).all()


@kernel_test
def test_an_engine_that_gives_up_does_not_wait(monkeypatch):
    """For a rank that never comes."""
    ranks, peers = make_ranks(5, torch.float32)
    if DEVICE == "cpu":  # polls of the interpreter take long
        monkeypatch.setitem(add_sum.__globals__, "POLLS", POLLS // 1024)
    ranks[0].given_up.fill_(1)
    ranks[0].add_sum(torch.zeros(5, device=DEVICE), peers)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert ranks[1].flags[0, 0] == 1 and ranks[0].flags[1, 0] == 0


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="the parent process runs it, with triton")
def test_in_the_interpreter():
    run_in_interpreter(__file__)
