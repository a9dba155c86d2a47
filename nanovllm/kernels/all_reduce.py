# ruff: noqa: ANN001, ANN201 (Triton types the arguments of its kernels itself)
"""Sums over tensor-parallel ranks that read and write each other's GPU memory.

Each rank has a buffer that all of them map. For the kilobytes of a decode step this takes less time than a library's
collective, and a kernel that waits for another GPU can start early like the others, so that what follows it fetches
its weights meanwhile. A sum is made by the kernel that normalises it (`rms_norm`), in one of two ways:

- Packets, for few rows. The kernel of the linear layer writes each float32 of its part to all ranks, beside the number
  of the sum in the same 64 bits (as NCCL's LL protocol does). Who reads that number has the value: no flag, no fence.
- Parts, for more rows. Each rank leaves its part in its own buffer, raises a flag in those of the others, and having
  seen all flags reads all parts.

The sums of a step use two places in turn: whoever comes by for the next sum has read the last one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import tl, triton

POLLS = tl.constexpr(4096)  # between looks at whether the engine has given up: those go to host memory


class Peers(NamedTuple):
    """Where and how this rank takes part in one sum.

    A rank's buffer holds flags, int32 [ranks], and at byte `offset` its part [rows, size], or all ranks' packets,
    int64 [ranks, rows, size]; at first all is zero.
    """

    buffer: Tensor  # this rank's, uint8
    has_packets: bool
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
def send_packets(y, offs, mask, numel, addresses_ptr, rank, offset, number, RANKS: tl.constexpr) -> None:
    """Write float32 values y to all ranks, each beside the number of the sum."""
    packets = (y.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (number.to(tl.int64) & 0xFFFFFFFF)
    for peer in tl.static_range(RANKS):
        place = (tl.load(addresses_ptr + peer) + offset).to(tl.pointer_type(tl.int64))
        tl.store(place + rank * numel + offs, packets, mask=mask)


@triton.jit
def receive_sum(row, cols, mask, numel, addresses_ptr, rank, offset, number, given_up_ptr, SIZE: tl.constexpr,
        DTYPE: tl.constexpr, RANKS: tl.constexpr, HAS_PACKETS: tl.constexpr):  # fmt: skip
    """The sum of all ranks' parts of a row, in float32, once they are there.

    More programs than a GPU holds may wait for the flag that the first one raises: GPUs start programs in order. The
    flags need no fences, which take 2 us: kernels that have ended wrote the parts, and none is read before its flag.
    """
    offs = row * SIZE + cols
    own = tl.load(addresses_ptr + rank)
    if not HAS_PACKETS and row == 0:
        for peer in tl.static_range(RANKS):
            flags = tl.load(addresses_ptr + peer).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(flags + rank, number, sem="relaxed", scope="sys")
    total = tl.zeros(cols.shape, tl.float32)
    for peer in tl.static_range(RANKS):  # in the same order on every rank, so that all get the same sum
        packets = tl.zeros(cols.shape, tl.int64)
        missing = tl.where(HAS_PACKETS or peer != rank, 1, 0)  # the part of its own needs no flag
        polls = 0
        while missing > 0:
            if HAS_PACKETS:
                place = (own + offset).to(tl.pointer_type(tl.int64))
                packets = tl.load(place + peer * numel + offs, mask=mask, other=0, volatile=True)
                missing = tl.sum((mask & (packets.to(tl.int32) != number)).to(tl.int32), 0)
            else:
                flag_ptr = own.to(tl.pointer_type(tl.int32)) + peer
                missing = number - tl.atomic_add(flag_ptr, 0, sem="relaxed", scope="sys")
            polls += 1
            if polls % POLLS == 0:
                missing = tl.where(tl.load(given_up_ptr, volatile=True) != 0, 0, missing)
        if HAS_PACKETS:
            total += (packets >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    if not HAS_PACKETS:
        for peer in tl.static_range(RANKS):
            part_ptr = (tl.load(addresses_ptr + peer) + offset).to(tl.pointer_type(DTYPE))
            part_ptr = tl.multiple_of(part_ptr, 16)  # so that 16 bytes are read at once
            # Past the cache of the SM, which may still have what lay there two sums ago.
            total += tl.load(part_ptr + offs, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    return total
