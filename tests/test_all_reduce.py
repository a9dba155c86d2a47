"""Sums over ranks that GPUs make in each other's memory. Here the ranks share a device."""

import time
from contextlib import nullcontext

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, kernel_test, run_in_interpreter

from nanovllm.kernels import HAS_TRITON, tl
from nanovllm.kernels.linear import linear_torch
from nanovllm.parallel.all_reduce import POLLS, Peers, max_over_ranks, max_over_ranks_torch, receive, send_part
from nanovllm.parallel.all_reduce import add_sum as rms_norm
from nanovllm.parallel.all_reduce import add_sum_torch as rms_norm_torch
from nanovllm.parallel.all_reduce import send_linear as linear

# Triton's interpreter multiplies the bits of bfloat16 matrices as if they were integers.
DTYPES = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]
OFFSET = 64  # of the place for parts or packets, behind the flags


def make_ranks(num_bytes: int, form: str, num_ranks: int = 2) -> list[Peers]:
    """All ranks' view of a sum; each has a place of num_bytes."""
    torch.manual_seed(0)
    buffers = [torch.zeros(OFFSET + num_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(num_ranks)]
    for buffer in buffers if form != "shares" else ():
        buffer[OFFSET:] = 255
    addresses = tuple(buffer.data_ptr() for buffer in buffers)
    given_up = torch.zeros(1, dtype=torch.int32, pin_memory=DEVICE == "cuda")
    return [Peers(buffers, form, addresses, rank, OFFSET, given_up) for rank in range(num_ranks)]


def flags(peers: Peers) -> torch.Tensor:
    return peers.buffers[peers.rank][:8].view(torch.int32)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def load_kernels(function, ranks: list[Peers]) -> None:
    """Loads what a function needs: while the GPU is busy, as it is with a rank that waits, no kernel is loaded."""
    if DEVICE == "cuda":
        for peers in ranks:
            peers.given_up.fill_(1)
            function(peers)
        synchronize()
        ranks[0].given_up.fill_(0)


def side_by_side(function, ranks: list[Peers]) -> list[torch.Tensor | None]:
    """What a function gives on each rank, in streams of their own where there are streams."""
    synchronize()
    results = []
    for peers in ranks:
        with torch.cuda.stream(torch.cuda.Stream()) if DEVICE == "cuda" else nullcontext():
            results.append(function(peers))
    synchronize()
    return results


def assert_empty(ranks: list[Peers], places: list[torch.Tensor]) -> None:
    """What was received is gone; side by side, that is everything, else all that earlier ranks had sent."""
    for peers, place in zip(ranks, places, strict=True):
        assert (place[: None if DEVICE == "cuda" else peers.rank + 1].view(torch.uint8) == 255).all()


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (9, 200), (2, 4096), (12 if INTERPRETED else 33, 64)])
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("normed", [True, False])
def test_a_sum_of_parts(dtype, rows, size, num_ranks, normed):
    ranks = make_ranks(num_ranks * rows * size * dtype.itemsize, "parts", num_ranks)
    x, weight = torch.randn(rows, size, device=DEVICE).to(dtype), torch.randn(size, device=DEVICE).to(dtype)
    parts = torch.randn(num_ranks, rows, size, device=DEVICE).to(dtype)
    parts[-1, -1, -1] = torch.nan  # which must not be taken for the one that stands for nothing
    places = [peers.view(peers.rank, 0, num_ranks * rows, size, dtype).view(parts.shape) for peers in ranks]

    def norm(peers: Peers) -> torch.Tensor:
        y = rms_norm(sums[peers.rank], weight if normed else None, 1e-6, peers)
        return torch.stack([sums[peers.rank], y])

    sums = [x.clone() for _ in ranks]
    load_kernels(norm, ranks)
    sums = [x.clone() for _ in ranks]
    for peers, place in zip(ranks, places, strict=True):
        place.view(torch.uint8).fill_(255)
        place[peers.rank] = parts[peers.rank]
        if DEVICE == "cpu":  # nothing runs beside: the later ranks have come already
            place[peers.rank :] = parts[peers.rank :]
    got = side_by_side(norm, ranks)
    want = torch.stack([x, rms_norm_torch(x, weight if normed else None, 1e-6, parts)])
    torch.testing.assert_close(got[0][0], want[0], equal_nan=True)
    torch.testing.assert_close(got[0][1], want[1], rtol=2e-2, atol=1e-3, equal_nan=True)
    for other in got[1:]:
        torch.testing.assert_close(other, got[0], rtol=0, atol=0, equal_nan=True)
    assert_empty(ranks, places)


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "size"),
    [(1, 128), (1, 150), (7, 100), (8, 136)]
    if INTERPRETED
    else [(1, 1024), (1, 4100), (7, 300), (8, 520), (9, 520), (64, 300)],
)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_sum_of_packets(dtype, rows, size, num_ranks):
    ranks = make_ranks(num_ranks * rows * size * dtype.itemsize, "packets", num_ranks)
    x = torch.randn(num_ranks, rows, 96, device=DEVICE).to(dtype)
    weight = (torch.randn(num_ranks, size, 96, device=DEVICE) / 96**0.5).to(dtype)
    bias = torch.randn(size, device=DEVICE).to(dtype)
    residual = torch.randn(rows, size, device=DEVICE).to(dtype)
    parts = [linear_torch(part.double(), part_weight.double()) for part, part_weight in zip(x, weight, strict=True)]
    parts[0] += bias.double()
    want = residual.double() + sum(parts)
    for peers in ranks:
        linear(x[peers.rank], weight[peers.rank], None if peers.rank else bias, peers=peers)
    got = side_by_side(lambda peers: rms_norm(residual.clone(), None, 0.0, peers), ranks)
    assert all(torch.equal(got[0], other) for other in got[1:])
    if dtype == torch.float32:
        torch.testing.assert_close(got[0], want.to(dtype))
    else:  # what is sent is rounded, and so is the sum
        bound = torch.finfo(dtype).eps / 2 * (sum(part.abs() for part in parts) + want.abs())
        assert ((got[0].double() - want).abs() <= 1.1 * bound + 1e-5).all()
    for peers in ranks:
        assert (peers.buffers[peers.rank][OFFSET:] == 255).all()


@kernel_test
@pytest.mark.parametrize("form", ["packets"] if INTERPRETED else ["packets", "parts"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sums_of_other_sizes_in_the_same_places(num_ranks, form):
    """Two places take turns, each laid out by the rows of its sum; on a GPU the ranks wait for nothing but values."""
    size, dtype = 72, DTYPES[1]
    torch.manual_seed(0)
    all_rows = torch.randint(1, 9, (6 if INTERPRETED else 100,)).tolist()
    parts = [torch.randn(num_ranks, rows, size, device=DEVICE).to(dtype) for rows in all_rows]
    place_bytes = num_ranks * 8 * size * dtype.itemsize
    ranks = make_ranks(2 * place_bytes, form, num_ranks)

    def peers_of(peers: Peers, number: int) -> Peers:
        return peers._replace(offset=peers.offset + number % 2 * place_bytes)

    def add(peers: Peers, number: int) -> torch.Tensor:
        x = torch.zeros(all_rows[number], size, dtype=dtype, device=DEVICE)
        return rms_norm(x, None, 0.0, peers_of(peers, number))

    def add_all(peers: Peers) -> torch.Tensor:
        sums = []
        for number, values in enumerate(parts):
            send_part(values[peers.rank], peers_of(peers, number))
            sums.append(add(peers, number))
        return torch.cat(sums)

    if DEVICE == "cuda":
        load_kernels(add_all, ranks)
        for peers in ranks:
            peers.buffers[peers.rank][OFFSET:] = 255
        got = side_by_side(add_all, ranks)
    else:  # nothing runs beside
        sums = []
        for number, values in enumerate(parts):
            for peers in ranks:
                send_part(values[peers.rank], peers_of(peers, number))
            sums.append([add(peers, number) for peers in ranks])
        got = [torch.cat(of_rank) for of_rank in zip(*sums, strict=True)]
    want = torch.cat([values.float().sum(0).to(dtype) for values in parts])
    for sums in got:
        torch.testing.assert_close(sums, want, rtol=1e-2, atol=1e-2)
    for peers in ranks:
        assert (peers.buffers[peers.rank][OFFSET:] == 255).all()


@kernel_test
@pytest.mark.parametrize("rows", [9, 64, 70])
def test_a_product_that_is_a_part(rows):
    """It lies in its own rank's place, for the next kernel to send it."""
    dtype, size = DTYPES[1], 264
    ranks = make_ranks(2 * rows * size * dtype.itemsize, "parts")
    x = torch.randn(rows, 96, device=DEVICE).to(dtype)
    weight, bias = torch.randn(size, 96, device=DEVICE).to(dtype), torch.randn(size, device=DEVICE).to(dtype)
    linear(x, weight, bias, ranks[1])
    synchronize()
    part = ranks[1].view(1, rows, rows, size, dtype)
    torch.testing.assert_close(part, linear_torch(x, weight, bias), rtol=2e-2, atol=2e-2)
    assert (ranks[1].view(1, 0, rows, size, dtype).view(torch.uint8) == 255).all()


@kernel_test
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("rows", [1, 128, 300])
def test_a_maximum(rows, num_ranks):
    ranks = make_ranks(num_ranks * rows * 8, "packets", num_ranks)
    values = torch.randint(-(2**63), 2**63 - 1, (num_ranks, rows), device=DEVICE)
    places = [peers.buffers[peers.rank][OFFSET:].view(torch.int64).view(num_ranks, rows) for peers in ranks]
    load_kernels(lambda peers: max_over_ranks(values[0].clone(), peers), ranks)
    for peers, place in zip(ranks, places, strict=True):
        place.fill_(-1)
        if DEVICE == "cpu":  # nothing runs beside: the later ranks have come already
            place[peers.rank :] = values[peers.rank :]
    got = side_by_side(lambda peers: max_over_ranks(values[peers.rank].clone(), peers), ranks)
    for best in got:
        assert torch.equal(best, max_over_ranks_torch(values))
    assert_empty(ranks, places)


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(2, 8), (7, 200), (16, 4096), (45 if INTERPRETED else 301, 64)])
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

    load_kernels(lambda peers: rms_norm(residual.clone(), norm if normed else None, 1e-6, peers), ranks)
    for peers in ranks:
        flags(peers).zero_()
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
@pytest.mark.parametrize("form", ["packets", "parts", "shares"])
@pytest.mark.parametrize(("rows", "size"), [(2, 8), (7, 200), (8, 1030)])
def test_parts_that_are_there_already(form, rows, size):
    """They are left where the kernel that adds them looks, as a product's are."""
    dtype = DTYPES[1]
    ranks = make_ranks(4 * (rows + 2) * size * dtype.itemsize, form)
    parts = torch.randn(2, rows, size, device=DEVICE).to(dtype)
    for peers in ranks:
        send_part(parts[peers.rank], peers)
    synchronize()
    middle = (rows + 1) // 2 if form == "shares" else rows
    for peers in ranks:
        for sender in ranks:
            if form == "shares":
                mine = parts[sender.rank][peers.rank * middle : (peers.rank + 1) * middle]
                place = peers.view(peers.rank, sender.rank * middle, len(mine), size, dtype)
            else:
                mine = parts[sender.rank] if form == "packets" or sender is peers else None
                place = peers.view(peers.rank, sender.rank * rows, rows, size, dtype)
            if mine is None:  # the kernel that adds sends it
                assert (place.view(torch.uint8) == 255).all()
            else:
                assert torch.equal(place, mine)


@kernel_test
def test_waiting_for_a_rank_that_never_comes(monkeypatch):
    """It lasts until the engine gives up; what has not come is no number."""
    if DEVICE == "cpu":  # polls of the interpreter take long
        monkeypatch.setitem(receive.fn.__globals__, "POLLS", tl.constexpr(POLLS.value // 1024))
    for form in ("packets", "parts", "shares"):
        peers = make_ranks(1024, form)[0]

        def norm(peers: Peers = peers) -> torch.Tensor:
            return rms_norm(torch.zeros(2, 5, device=DEVICE), None, 0.0, peers)

        if DEVICE == "cuda":
            load_kernels(norm, [peers])
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                norm()
            time.sleep(0.1)
            assert not stream.query()
        peers.given_up.fill_(1)
        y = norm()
        synchronize()
        if form == "shares":
            assert flags(peers)[0] >= 2 and flags(peers)[1] == 0
        else:
            assert y.isnan().all()


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="the parent process runs it, with triton")
def test_in_the_interpreter():
    run_in_interpreter(__file__)
