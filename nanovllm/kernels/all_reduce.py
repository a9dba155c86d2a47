# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Sums over tensor-parallel ranks that read and write each other's GPU memory.

Each rank has a buffer that all of them map. For the kilobytes of a decode step this takes less time than a library's
collective, and a kernel that waits for another GPU can start early like the others, so that what follows it fetches
its weights meanwhile. There are two ways:

- Packets, for few rows. The kernel of the linear layer writes each float32 of its part to all ranks, beside the number
  of the sum in the same 64 bits (as NCCL's LL protocol does). Who reads that number has the value: no flag, no fence.
- Parts, for more rows. Each rank leaves its part in its own buffer, raises flags in those of the others, and having
  seen all flags reads all parts.

The sums of a step use two places in turn: whoever comes by for the next sum has read the last one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import pdl_options, tl, triton

MAX_ROWS = 256  # of parts: each has a flag
PART_BYTES = 2**21  # of a rank's part; NCCL is faster with larger ones
BLOCK = 1024
POLLS = 4096  # of a flag or a packet, between looks at whether the engine has given up: those go to host memory


class Peers(NamedTuple):
    """Where and how this rank takes part in one sum.

    A rank's buffer holds flags, int32 [ranks, MAX_ROWS], and at byte `offset` its part [rows, size] of PART_BYTES at
    most, or all ranks' packets, int64 [ranks, rows, size]; at first all is zero.
    """

    buffer: Tensor  # this rank's, uint8
    addresses: Tensor  # int64 [ranks] on the device, of the ranks' buffers
    rank: int
    offset: int
    step: Tensor  # int32 [1] on the device; plus `index`, the sum's number, larger than those before (it may wrap)
    index: int
    given_up: Tensor  # int32 [1] in pinned host memory; anything but 0 ends the waiting

    def part(self, rows: int, size: int, dtype: torch.dtype) -> Tensor:
        """The place for this rank's part, [rows, size]."""
        return self.buffer[self.offset :][: rows * size * dtype.itemsize].view(dtype).view(rows, size)


@triton.jit
def wait_for_parts(
    addresses_ptr, rank, number, given_up_ptr,
    RANKS: tl.constexpr, MAX_ROWS: tl.constexpr, POLLS: tl.constexpr,
) -> None:  # fmt: skip
    """Say that this rank's part is there, and wait for the others'. Every program has flags of its own."""
    program = tl.program_id(0)
    for peer in tl.static_range(RANKS):
        flags = tl.load(addresses_ptr + peer).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(flags + rank * MAX_ROWS + program, number, sem="release", scope="sys")
    flags = tl.load(addresses_ptr + rank).to(tl.pointer_type(tl.int32))
    for peer in tl.static_range(RANKS):
        behind = 1
        polls = 0
        while behind > 0:
            behind = number - tl.atomic_add(flags + peer * MAX_ROWS + program, 0, sem="acquire", scope="sys")
            polls += 1
            if polls % POLLS == 0:
                behind = tl.where(tl.load(given_up_ptr, volatile=True) != 0, 0, behind)


@triton.jit
def send_packets(y, offs, mask, numel, addresses_ptr, rank, offset, number, RANKS: tl.constexpr) -> None:
    """Write float32 values y to all ranks, each beside the number of the sum."""
    packets = (y.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (number.to(tl.int64) & 0xFFFFFFFF)
    for peer in tl.static_range(RANKS):
        place = (tl.load(addresses_ptr + peer) + offset).to(tl.pointer_type(tl.int64))
        tl.store(place + rank * numel + offs, packets, mask=mask)


@triton.jit(do_not_specialize=["rank", "index"])
def _add_packets_kernel(
    x_ptr, numel, addresses_ptr, rank, offset, step_ptr, index, given_up_ptr,
    RANKS: tl.constexpr, BLOCK: tl.constexpr, POLLS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Not `pdl_wait`: this rank's own packets say that the kernel ahead has read all it needs, and that those before
    # that one have ended.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    number = tl.load(step_ptr) + index
    place = (tl.load(addresses_ptr + rank) + offset).to(tl.pointer_type(tl.int64))
    total = tl.zeros((BLOCK,), tl.float32)
    for peer in tl.static_range(RANKS):  # in the same order on every rank, so that all get the same sum
        packets = tl.zeros((BLOCK,), tl.int64)
        missing = 1
        polls = 0
        while missing > 0:
            packets = tl.load(place + peer * numel + offs, mask=mask, other=0, volatile=True)
            missing = tl.sum((mask & (packets.to(tl.int32) != number)).to(tl.int32), 0)
            polls += 1
            if polls % POLLS == 0:
                missing = tl.where(tl.load(given_up_ptr, volatile=True) != 0, 0, missing)
        total += (packets >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + total
    tl.store(x_ptr + offs, x.to(x_ptr.dtype.element_ty), mask=mask)
    if PDL:
        tl.extra.cuda.gdc_wait()


def add_packets(x: Tensor, peers: Peers) -> Tensor:
    """Adds to x the sum of what `linear` sent to `peers` on all ranks, in place. x: [rows, size], contiguous."""
    _add_packets_kernel[(triton.cdiv(x.numel(), BLOCK),)](
        x, x.numel(), *peers[1:], RANKS=len(peers.addresses), BLOCK=BLOCK, POLLS=POLLS, num_warps=4,
        **pdl_options(x.device),
    )  # fmt: skip
    return x
