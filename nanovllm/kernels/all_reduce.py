# ruff: noqa: ANN001, ANN201 (Triton types the arguments of its kernels itself)
"""Sums over tensor-parallel ranks that read and write each other's GPU memory.

Each rank has a buffer that all of them map. For the kilobytes of a decode step this takes less time than a library's
collective, and a kernel that waits for another GPU can start early like the others, so that what follows it fetches
its weights meanwhile. A sum is made by the kernel that normalises it (`rms_norm`), in one of three ways:

- Packets, for few rows. The kernel of the linear layer writes each float32 of its part to all ranks, beside the number
  of the sum in the same 64 bits (as NCCL's LL protocol does). Who reads that number has the value: no flag, no fence.
- Parts, for more rows. Each rank leaves its part in its own buffer, raises a flag in those of the others, and having
  seen all flags reads all parts.
- Shares, for the thousands of rows of prompts. Each rank sums and normalises a share of the rows. The matrix product
  writes the rows of its part straight to the ranks whose they are, which hides half of the traffic behind the
  arithmetic; the normalised rows go to all ranks. Of the residual stream, a rank keeps its own share only.

Sums of packets and of parts use two places in turn: whoever comes by for the next sum has read the last one. Those of
shares need one, as the ranks meet before and after.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import tl, triton

POLLS = tl.constexpr(4096)  # between looks at whether the engine has given up: those go to host memory


class Peers(NamedTuple):
    """Where and how this rank takes part in one sum.

    A rank's buffer holds flags, int32 [ranks], and at byte `offset` its part [rows, size]; or all ranks' packets,
    int64 [ranks, rows, size]; or all ranks' parts of its share, [ranks, share, size], and then the sums of all rows,
    normalised, [rows, size]. At first all is zero.
    """

    buffers: list[Tensor]  # of all ranks, uint8
    form: Literal["packets", "parts", "shares"]
    addresses: Tensor  # int64 [ranks] on the device, of the ranks' buffers
    rank: int
    offset: int
    step: Tensor  # int32 [1] on the device; plus `index`, the sum's number, larger than those before (it may wrap)
    index: int  # a sum of shares takes the number after it, too
    given_up: Tensor  # int32 [1] in pinned host memory; anything but 0 ends the waiting

    def share(self, rows: int) -> int:
        """The rows of a rank's share; the last one may be smaller."""
        return -(-rows // len(self.buffers))

    def view(self, rank: int, first: int, rows: int, size: int, dtype: torch.dtype) -> Tensor:
        """Rows in a rank's buffer, [rows, size], from the first-th behind `offset` on."""
        row_bytes = size * dtype.itemsize
        return self.buffers[rank][self.offset + first * row_bytes :][: rows * row_bytes].view(dtype).view(rows, size)


@triton.jit
def _meet(addresses_ptr, rank, number, given_up_ptr, is_first, RANKS: tl.constexpr, SEM: tl.constexpr) -> None:
    """Raise this rank's flags, in the first program, and wait for the others'."""
    if is_first:
        for peer in tl.static_range(RANKS):
            flags = tl.load(addresses_ptr + peer).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(flags + rank, number, sem=SEM, scope="sys")
    flags = tl.load(addresses_ptr + rank).to(tl.pointer_type(tl.int32))
    for peer in tl.static_range(RANKS):
        missing = tl.where(peer != rank, 1, 0)
        polls = 0
        while missing > 0:
            missing = number - tl.atomic_add(flags + peer, 0, sem=SEM, scope="sys")
            polls += 1
            if polls % POLLS == 0:
                missing = tl.where(tl.load(given_up_ptr, volatile=True) != 0, 0, missing)


@triton.jit(do_not_specialize=["rank", "index"])
def meet_kernel(addresses_ptr, rank, offset, step_ptr, index, given_up_ptr, RANKS: tl.constexpr):
    """One program, which ends when all ranks have come here; what they wrote before can then be read."""
    _meet(addresses_ptr, rank, tl.load(step_ptr) + index, given_up_ptr, True, RANKS, "acq_rel")


@triton.jit
def send_packets(y, offs, mask, numel, addresses_ptr, rank, offset, number, RANKS: tl.constexpr) -> None:
    """Write float32 values y to all ranks, each beside the number of the sum."""
    packets = (y.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (number.to(tl.int64) & 0xFFFFFFFF)
    for peer in tl.static_range(RANKS):
        place = (tl.load(addresses_ptr + peer) + offset).to(tl.pointer_type(tl.int64))
        tl.store(place + rank * numel + offs, packets, mask=mask)


@triton.jit
def receive_sum(row, cols, mask, numel, share, addresses_ptr, rank, offset, number, given_up_ptr, SIZE: tl.constexpr,
        DTYPE: tl.constexpr, RANKS: tl.constexpr, FORM: tl.constexpr):  # fmt: skip
    """The sum of all ranks' parts of a row, in float32, once they are there.

    It is made in the same order on every rank, so that all get the same.

    More programs than a GPU holds may wait for the flag that the first one raises: GPUs start programs in order. The
    flags need no fences, which take 2 us: kernels that have ended wrote the parts, and none is read before its flag.
    """
    total = tl.zeros(cols.shape, tl.float32)
    own = tl.load(addresses_ptr + rank) + offset
    if FORM == "packets":
        # Aligned, so that 16 bytes are read at once; and the reads of all ranks' packets are under way together.
        packets_ptr = tl.multiple_of(own.to(tl.pointer_type(tl.int64)), 16) + row * SIZE + cols
        missing = 1
        polls = 0
        while missing > 0:
            total = tl.zeros(cols.shape, tl.float32)
            is_there = mask
            for peer in tl.static_range(RANKS):
                packets = tl.load(packets_ptr + peer * numel, mask=mask, other=0, volatile=True)
                is_there &= packets.to(tl.int32) == number
                total += (packets >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            missing = tl.sum((mask & ~is_there).to(tl.int32), 0)
            polls += 1
            if polls % POLLS == 0:
                missing = tl.where(tl.load(given_up_ptr, volatile=True) != 0, 0, missing)
    else:
        if FORM == "parts":
            _meet(addresses_ptr, rank, number, given_up_ptr, row == 0, RANKS, "relaxed")
        for peer in tl.static_range(RANKS):
            place = tl.load(addresses_ptr + peer) + offset if FORM == "parts" else own
            part_ptr = tl.multiple_of(place.to(tl.pointer_type(DTYPE)), 16) + cols
            part_row = row if FORM == "parts" else row + (peer - rank) * share
            # Past the cache of the SM, which may still have what lay there two sums ago.
            part = tl.load(part_ptr + part_row * SIZE, mask=mask, other=0.0, cache_modifier=".cg")
            total += part.to(tl.float32)
    return total
