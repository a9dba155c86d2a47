"""Sums over ranks that GPUs make in each other's memory. Here the ranks share a device."""

from contextlib import nullcontext

import pytest
import torch
from interpreter import run_in_interpreter

from nanovllm.kernels import HAS_TRITON, INTERPRETED, tl
from nanovllm.kernels.all_reduce import POLLS, Peers, receive_sum
from nanovllm.kernels.linear import linear, linear_torch
from nanovllm.kernels.norm_act import rms_norm, rms_norm_torch

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# Triton's interpreter multiplies the bits of bfloat16 matrices as if they were integers.
DTYPES = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]
OFFSET = 64  # of the place for parts or packets, behind the flags


def kernel_test(test):
    """Runs a test in the interpreter's child process, and on a GPU."""
    return test if INTERPRETED else pytest.mark.gpu(test)


def make_ranks(num_bytes: int, form: str, step: int = 0, index: int = 1, num_ranks: int = 2) -> list[Peers]:
    """All ranks' view of a sum, the index-th of a step; each has a place of num_bytes."""
    torch.manual_seed(0)
    buffers = [torch.zeros(OFFSET + num_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(num_ranks)]
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], device=DEVICE)
    steps = torch.tensor([step], dtype=torch.int32, device=DEVICE)
    given_up = torch.zeros(1, dtype=torch.int32, pin_memory=DEVICE == "cuda")
    return [Peers(buffers, form, addresses, rank, OFFSET, steps, index, given_up) for rank in range(num_ranks)]


def flags(peers: Peers) -> torch.Tensor:
    return peers.buffers[peers.rank][:8].view(torch.int32)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def side_by_side(function, ranks: list[Peers]) -> list[torch.Tensor | None]:
    """What a function gives on each rank, in streams of their own where there are streams."""
    synchronize()
    results = []
    for peers in ranks:
        with torch.cuda.stream(torch.cuda.Stream()) if DEVICE == "cuda" else nullcontext():
            results.append(function(peers))
    synchronize()
    return results


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (9, 200), (3, 4096), (299, 64)])
@pytest.mark.parametrize("step", [0, 2**31 - 1], ids=["first", "overflow"])
@pytest.mark.parametrize("normed", [True, False])
def test_a_sum_of_parts(dtype, rows, size, step, normed):
    ranks = make_ranks(rows * size * dtype.itemsize, "parts", step)
    number = (torch.tensor([step], dtype=torch.int32) + 1).item()
    x, weight = torch.randn(rows, size, device=DEVICE).to(dtype), torch.randn(size, device=DEVICE).to(dtype)
    parts = [peers.view(peers.rank, 0, rows, size, dtype).copy_(torch.randn(rows, size)) for peers in ranks]
    for peers in ranks:
        flags(peers).fill_(step)
        if DEVICE == "cpu":  # nothing runs beside: the other rank has come already
            flags(peers)[1 - peers.rank] = number
    sums = [x.clone(), x.clone()]
    want_x = x.clone()
    want = rms_norm_torch(want_x, weight if normed else None, 1e-6, torch.stack(parts))
    got = side_by_side(lambda peers: rms_norm(sums[peers.rank], weight if normed else None, 1e-6, peers), ranks)
    torch.testing.assert_close(sums[0], want_x)
    torch.testing.assert_close(got[0], want, rtol=2e-2, atol=1e-3)
    assert torch.equal(sums[0], sums[1]) and torch.equal(got[0], got[1])
    for peers in ranks:
        assert (flags(peers) == number).all()


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1024), (1, 4100), (7, 300), (8, 1030)])
@pytest.mark.parametrize("step", [0, 2**31 - 1], ids=["first", "overflow"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_sum_of_packets(dtype, rows, size, step, num_ranks):
    ranks = make_ranks(num_ranks * rows * size * 8, "packets", step, num_ranks=num_ranks)
    x = torch.randn(num_ranks, rows, 96, device=DEVICE).to(dtype)
    weight = (torch.randn(num_ranks, size, 96, device=DEVICE) / 96**0.5).to(dtype)
    bias = torch.randn(size, device=DEVICE).to(dtype)
    residual = torch.randn(rows, size, device=DEVICE).to(dtype)
    want = residual.double() + bias.double()
    want += sum(linear_torch(part.double(), part_weight.double()) for part, part_weight in zip(x, weight, strict=True))

    for peers in ranks:
        linear(x[peers.rank], weight[peers.rank], None if peers.rank else bias, peers=peers)
    got = side_by_side(lambda peers: rms_norm(residual.clone(), None, 0.0, peers), ranks)
    assert all(torch.equal(got[0], other) for other in got[1:])
    torch.testing.assert_close(got[0], want.to(dtype))


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(2, 8), (7, 200), (16, 4096), (301, 64)])
@pytest.mark.parametrize("normed", [True, False])
def test_a_sum_of_shares(dtype, rows, size, normed):
    ranks = make_ranks(2 * (rows + 2) * size * dtype.itemsize, "shares")
    x = torch.randn(2, rows, 96, device=DEVICE).to(dtype)
    weight = (torch.randn(2, size, 96, device=DEVICE) / 96**0.5).to(dtype)
    bias, norm = torch.randn(2, size, device=DEVICE).to(dtype)
    residual = torch.randn(rows, size, device=DEVICE).to(dtype)
    parts = torch.stack([linear_torch(x[0], weight[0], bias), linear_torch(x[1], weight[1])])
    want_x = residual.clone()
    want = rms_norm_torch(want_x, norm if normed else None, 1e-6, parts)

    if DEVICE == "cuda":
        # Kernels are not loaded while the GPU is busy, as it is with a rank that waits: this loads them all.
        for peers in ranks:
            peers.given_up.fill_(1)
            rms_norm(residual.clone(), norm if normed else None, 1e-6, peers)
        synchronize()
        for peers in ranks:
            peers.given_up.fill_(0)
            flags(peers).zero_()
    for peers in ranks:
        linear(x[peers.rank], weight[peers.rank], None if peers.rank else bias, peers=peers)
        if DEVICE == "cpu":  # nothing runs beside: the other rank has come already, both times
            flags(peers)[1 - peers.rank] = 2
    sums = [residual.clone(), residual.clone()]
    got = side_by_side(lambda peers: rms_norm(sums[peers.rank], norm if normed else None, 1e-6, peers), ranks)
    assert torch.equal(got[0], got[1])
    torch.testing.assert_close(got[0], want, rtol=2e-2, atol=1e-3)
    middle = (rows + 1) // 2
    torch.testing.assert_close(torch.cat([sums[0][:middle], sums[1][middle:]]), want_x, rtol=2e-2, atol=1e-3)
    assert torch.equal(sums[0][middle:], residual[middle:]) and torch.equal(sums[1][:middle], residual[:middle])
    for peers in ranks:
        assert (flags(peers) == 2).all()


@kernel_test
def test_packets_of_an_earlier_sum_do_not_count(monkeypatch):
    """Nor does an engine that gives up wait for a rank that never comes."""
    if DEVICE == "cpu":  # polls of the interpreter take long
        monkeypatch.setitem(receive_sum.fn.__globals__, "POLLS", tl.constexpr(POLLS.value // 1024))
    ranks = make_ranks(2 * 5 * 8, "packets")
    x, weight = torch.ones(1, 3, device=DEVICE), torch.ones(5, 3, device=DEVICE)
    for peers in ranks:
        linear(x, weight, peers=peers)
    later = ranks[0]._replace(index=2)
    if DEVICE == "cuda":
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            rms_norm(torch.zeros(1, 5, device=DEVICE), None, 0.0, later)
        assert not stream.query()
    later.given_up.fill_(1)
    for form in ("packets", "parts", "shares"):
        rms_norm(torch.zeros(2, 5, device=DEVICE), None, 0.0, later._replace(form=form))
    synchronize()
    assert flags(ranks[1])[0] == 3 and flags(ranks[0])[1] == 0


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="the parent process runs it, with triton")
def test_in_the_interpreter():
    run_in_interpreter(__file__)
