# ruff: noqa: ANN001, ANN201, ANN202 (Triton types the arguments of its kernels itself)
"""Sums over tensor-parallel ranks that read and write each other's GPU memory.

Each rank has a buffer that all of them map. For the kilobytes of a decode step this takes less time than a library's
collective, and a kernel that waits for another GPU can start early like the others, so that what follows it fetches
its weights meanwhile. A sum is made by a kernel that normalises it too (`add_sum`), in one of three ways:

- Packets, for few rows. The kernel of the linear layer sends its rank's part to all ranks (`send_linear`).
- Parts, for more rows. The kernel that normalises sends what the matrix product left in its own rank's buffer.
- Shares, for the thousands of rows of prompts. Each rank sums and normalises a share of the rows. The matrix product
  writes the rows of its part straight to the ranks whose they are, which hides half of the traffic behind the
  arithmetic; the normalised rows go to all ranks. Of the residual stream, a rank keeps its own share only.

Packets and parts need no flag and no fence: where a value may come, all bits are set until it is there (as in the
Lamport protocol of TensorRT-LLM), which is a NaN that no arithmetic gives, and who has read it sets them again. Two
places take turns, so that nothing is sent to where a rank still reads: what a rank sends for the next sum says that
its kernel that read the last one has ended. Such a place is empty, so that a sum of other rows may lay it out in
another way. Nor may a kernel look for values before those ahead of it have ended: it could find what was sent two sums
ago. Sums of shares need one place, as the ranks meet before and after.

`max_over_ranks`, for the tokens that the ranks sample, works as sums of parts do, with int64.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton
from nanovllm.kernels.linear import launch_linear, linear_torch, takes_few_rows, takes_hopper_rows
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.kernels.rms_norm import normalise, num_warps, rms_norm_torch
from nanovllm.kernels.tuning import HOPPER_PACKET_ROWS, SMALL_BATCH, gpu_of

POLLS = tl.constexpr(4096)  # between looks at whether the engine has given up: those go to host memory


class Peers(NamedTuple):
    """Where and how this rank takes part in one sum.

    A rank's buffer holds flags, int32 [ranks], zero at first; and at byte `offset` all ranks' packets or parts,
    [ranks, rows, size], all bits set at first; or all ranks' parts of its share, [ranks, share, size], and then the
    sums of all rows, normalised, [rows, size].
    """

    buffers: list[Tensor]  # of all ranks, uint8
    form: Literal["packets", "parts", "shares"]
    addresses: tuple[int, ...]  # of the ranks' buffers
    rank: int
    offset: int
    given_up: Tensor  # int32 [1] in pinned host memory; anything but 0 ends the waiting

    def share(self, rows: int) -> int:
        """The rows of a rank's share; the last one may be smaller."""
        return -(-rows // len(self.buffers))

    def view(self, rank: int, first: int, rows: int, size: int, dtype: torch.dtype) -> Tensor:
        """Rows in a rank's buffer, [rows, size], from the first-th behind `offset` on."""
        row_bytes = size * dtype.itemsize
        return self.buffers[rank][self.offset + first * row_bytes :][: rows * row_bytes].view(dtype).view(rows, size)


@triton.jit
def meet_kernel(addresses, rank: tl.constexpr, given_up_ptr, RANKS: tl.constexpr):
    """One program, which ends when all ranks have come here; what they wrote before can then be read."""
    flags = addresses[rank].to(tl.pointer_type(tl.int32))
    number = tl.load(flags + rank) + 1
    for peer in tl.static_range(RANKS):
        tl.atomic_xchg(addresses[peer].to(tl.pointer_type(tl.int32)) + rank, number, sem="acq_rel", scope="sys")
    for peer in tl.static_range(RANKS):
        missing = 1
        polls = 0
        while missing > 0:
            missing = number - tl.atomic_add(flags + peer, 0, sem="acq_rel", scope="sys")
            polls += 1
            if polls % POLLS == 0:
                missing = tl.where(tl.load(given_up_ptr, volatile=True) != 0, 0, missing)


@triton.jit
def send(values, offs, mask, stride, addresses, rank: tl.constexpr, offset, RANKS: tl.constexpr) -> None:
    """Write this rank's values to all ranks; `stride` is the number of values of one."""
    for peer in tl.static_range(RANKS):
        place_ptr = tl.multiple_of((addresses[peer] + offset).to(tl.pointer_type(values.dtype)), 16)
        tl.store(place_ptr + rank * stride + offs, values, mask=mask)


@triton.jit
def receive(
    own,
    offs,
    mask,
    stride,
    addresses,
    rank: tl.constexpr,
    offset,
    given_up_ptr,
    DTYPE: tl.constexpr,
    RANKS: tl.constexpr,
    WAIT: tl.constexpr = True,
):
    """The sum, in float32, of what all ranks sent, or the maximum if that is int64, once it is there.

    own: this rank's values, if at hand. WAIT: false if all is there. `stride` and offs are those of `send`. The sum is
    made in the same order on every rank, so that all get the same. More programs than a GPU holds may wait for others:
    GPUs start programs in order, so that the first of those that wait find what they wait for.
    """
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    VALUE: tl.constexpr = tl.int64 if BITS == 64 else tl.int32 if BITS == 32 else tl.int16
    # Aligned, so that 16 bytes are read at once; and the reads of all ranks' values are under way together.
    place_ptr = tl.multiple_of((addresses[rank] + offset).to(tl.pointer_type(VALUE)), 16) + offs
    total = tl.zeros(offs.shape, VALUE if BITS == 64 else tl.float32)
    missing = 1
    polls = 0
    while missing > 0:
        is_there = mask
        for peer in tl.static_range(RANKS):
            if own is not None and peer == rank:
                value = own.to(VALUE, bitcast=True)
            else:
                value = tl.load(place_ptr + peer * stride, mask=mask, other=0, volatile=True)
                is_there &= value != -1
            part = value if BITS == 64 else value.to(DTYPE, bitcast=True).to(tl.float32)
            total = part if peer == 0 else tl.maximum(total, part) if BITS == 64 else total + part
        missing = tl.sum((mask & ~is_there).to(tl.int32), 0) if WAIT else 0
        polls += 1
        if polls % POLLS == 0:
            missing = tl.where(tl.load(given_up_ptr, volatile=True) != 0, 0, missing)
    if WAIT:
        for peer in tl.static_range(RANKS):
            tl.store(place_ptr + peer * stride, -1, mask=mask)
    return total


@triton.jit(do_not_specialize=["share"])
def _add_sum_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    eps,
    y_ptr,
    stride: tl.int64,
    share,
    addresses,
    rank: tl.constexpr,
    offset,
    given_up_ptr,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    FORM: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program + rank * share if FORM == "shares" else program
    cols = tl.arange(0, triton.next_power_of_2(SIZE))
    mask = cols < SIZE
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    x_ptr += row * x_stride + cols
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    pdl_wait(PDL)
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    offs, part = program * SIZE + cols, None
    if FORM == "parts":
        part_ptr = tl.multiple_of((addresses[rank] + offset).to(tl.pointer_type(DTYPE)), 16) + rank * stride
        part = tl.load(part_ptr + offs, mask=mask, other=0.0)
        send(part, offs, mask, stride, addresses, rank, offset, RANKS)
    SENT: tl.constexpr = FORM != "shares"
    total = receive(part, offs, mask, stride, addresses, rank, offset, given_up_ptr, DTYPE, RANKS, SENT)
    rounded = (x + total).to(DTYPE)
    tl.store(x_ptr, rounded, mask=mask)
    x = rounded.to(tl.float32)
    if weight_ptr is not None:
        x = normalise(x, weight, eps, SIZE)
    if FORM == "shares":
        for peer in tl.static_range(RANKS):
            sums_ptr = tl.multiple_of((addresses[peer] + offset).to(tl.pointer_type(DTYPE)), 16)
            tl.store(sums_ptr + RANKS * stride + row * SIZE + cols, x, mask=mask)
    elif weight_ptr is not None:
        tl.store(y_ptr + row * SIZE + cols, x, mask=mask)


def add_sum_torch(x: Tensor, weight: Tensor | None, eps: float, parts: Tensor) -> Tensor:
    """What `add_sum` computes, said plainly, with the parts of all ranks, [ranks, N, H]."""
    x.copy_(x.float() + parts.float().sum(0))
    return x if weight is None else rms_norm_torch(x, weight, eps)


def add_sum(x: Tensor, weight: Tensor | None, eps: float, peers: Peers) -> Tensor:
    """Adds a sum over ranks to the rows of x, [N, H], in place, and normalises them as `rms_norm` does.

    x: rows any distance apart, elements of a row contiguous. weight: [H]; None to only add. Returns the normalised
    rows, [N, H] in x's dtype, contiguous; without a weight, x. Of a sum of shares, only the rank's own rows of x are
    read and written; what is returned, in the ranks' memory until the next such sum, has all rows.
    """
    rows, size = x.shape
    share = num_rows = rows
    y = x if weight is None else None
    if peers.form == "shares":
        share = peers.share(rows)
        num_rows = min(share, rows - peers.rank * share)
        y = peers.view(peers.rank, len(peers.buffers) * share, rows, size, x.dtype)
        meet(peers)
    elif y is None:
        y = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    _add_sum_kernel[(num_rows,)](
        x,
        x.stride(0),
        weight,
        eps,
        y,
        share * size,
        share,
        peers.addresses,
        peers.rank,
        peers.offset,
        peers.given_up,
        SIZE=size,
        RANKS=len(peers.buffers),
        FORM=peers.form,
        num_warps=num_warps(size),
        **pdl_options(x.device),
    )
    if peers.form == "shares":
        meet(peers)
    return y


def meet(peers: Peers) -> None:
    """Launches a kernel that ends when all ranks have come to theirs."""
    meet_kernel[(1,)](peers.addresses, peers.rank, peers.given_up, RANKS=len(peers.buffers), num_warps=1)


@triton.jit
def _send_rows(y, offs, mask, y_ptr, destination):
    """The rows of a product, to all ranks instead of y."""
    addresses, offset, rank, size, dtype_ptr = destination
    send(y.to(dtype_ptr.dtype.element_ty), offs, mask, size, addresses, rank, offset, len(addresses))


def packet_rows(weight: Tensor | QuantizedWeight) -> int:
    """The rows of a product with the weight up to which they are sent as packets; the same on all ranks."""
    is_hoppers = not isinstance(weight, QuantizedWeight) and weight.dtype != torch.float32
    return HOPPER_PACKET_ROWS if is_hoppers and gpu_of(weight.device).is_hopper else SMALL_BATCH


def send_linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, peers: Peers) -> None:
    """x W^T + bias, left with `peers` as this rank's part of a sum: x [M, K], weight [N, K], bias [N]."""
    rows, size = len(x), len(weight)
    if peers.form == "shares":
        share = peers.share(rows)
        for peer, x_share in enumerate(x.split(share)):
            out = peers.view(peer, peers.rank * share, len(x_share), size, x.dtype)
            linear_torch(x_share, weight, bias, out=out)
    elif peers.form == "parts":
        linear_torch(x, weight, bias, out=peers.view(peers.rank, peers.rank * rows, rows, size, x.dtype))
    elif takes_few_rows(x, weight):
        destination = (peers.addresses, peers.offset, peers.rank, rows * size, x)
        launch_linear(x, weight, bias, None, 0.0, None, None, False, store=_send_rows, destination=destination)
    elif takes_hopper_rows(x, weight, is_normed=False):
        from nanovllm.kernels.linear_hopper import launch_linear_hopper

        destination = (peers.addresses, peers.offset, peers.rank)
        launch_linear_hopper(x, weight, bias, None, 0.0, x, None, False, destination)
    else:
        send_part(linear_torch(x, weight, bias), peers)


@triton.jit
def _send_kernel(x_ptr, size, addresses, rank: tl.constexpr, offset, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    send(tl.load(x_ptr + offs, mask=mask), offs, mask, size, addresses, rank, offset, RANKS)


def send_part(x: Tensor, peers: Peers) -> None:
    """Leaves x, [M, N] and contiguous, with `peers` as this rank's part of a sum, as `send_linear` does a product."""
    rows, size = x.shape
    if peers.form == "shares":
        share = peers.share(rows)
        for peer, x_share in enumerate(x.split(share)):
            peers.view(peer, peers.rank * share, len(x_share), size, x.dtype).copy_(x_share)
    elif peers.form == "parts":
        peers.view(peers.rank, peers.rank * rows, rows, size, x.dtype).copy_(x)
    else:
        _send_kernel[(triton.cdiv(x.numel(), 1024),)](
            x, x.numel(), peers.addresses, peers.rank, peers.offset, RANKS=len(peers.buffers), BLOCK=1024
        )


@triton.jit
def _max_kernel(
    x_ptr, size, addresses, rank: tl.constexpr, offset, given_up_ptr, RANKS: tl.constexpr, BLOCK: tl.constexpr
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    x = tl.load(x_ptr + offs, mask=mask, other=0)
    send(x, offs, mask, size, addresses, rank, offset, RANKS)
    best = receive(x, offs, mask, size, addresses, rank, offset, given_up_ptr, tl.int64, RANKS)
    tl.store(x_ptr + offs, best, mask)


def max_over_ranks_torch(values: Tensor) -> Tensor:
    """What `max_over_ranks` computes, said plainly, with the values of all ranks, [ranks, N]."""
    return values.amax(0)


def max_over_ranks(x: Tensor, peers: Peers) -> Tensor:
    """The largest of the ranks' values, int64 [N] and none of them -1, in place of x."""
    _max_kernel[(triton.cdiv(len(x), 128),)](
        x,
        len(x),
        peers.addresses,
        peers.rank,
        peers.offset,
        peers.given_up,
        RANKS=len(peers.buffers),
        BLOCK=128,
        num_warps=1,
    )
    return x
