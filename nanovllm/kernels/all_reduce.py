# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Adding the sum of all ranks' partial results to a tensor, by reading the other GPUs' memory directly.

Every rank has a buffer that all map: flags, then places for partial results. A kernel tells the others that its rank's
part is there, waits for theirs, and reads them; for the few kilobytes of a decode step that takes less time than a
collective of a library, and it can start early like the other kernels (`pdl_wait`), so that what follows it fetches
its weights meanwhile. Parts go to two places in turn: whoever comes by for the next sum has read the last one.
"""

import torch
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton

MAX_BLOCKS = 256
FLAG_BYTES = 4 * MAX_BLOCKS  # of each rank
BLOCK = 2048
POLLS = 4096  # of a flag, between looks at whether the engine has given up: those go to host memory


@triton.jit(do_not_specialize=["rank"])  # one kernel for all ranks: the tests run two of them in one process
def _add_sum_kernel(
    x_ptr, peers_ptr, offset, counts_ptr, given_up_ptr, numel, rank,
    SIZE: tl.constexpr, MAX_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, POLLS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    pdl_wait(PDL)
    # The how-manieth sum of this block it is: what a flag then says. int32 that may wrap around.
    count = tl.load(counts_ptr + block) + 1
    for peer in tl.static_range(SIZE):
        flags = tl.load(peers_ptr + peer).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(flags + rank * MAX_BLOCKS + block, count, sem="release", scope="sys")
    flags = tl.load(peers_ptr + rank).to(tl.pointer_type(tl.int32))
    for peer in tl.static_range(SIZE):
        behind = 1
        polls = 0
        while behind > 0:
            behind = count - tl.atomic_add(flags + peer * MAX_BLOCKS + block, 0, sem="acquire", scope="sys")
            polls += 1
            if polls % POLLS == 0:
                behind = tl.where(tl.load(given_up_ptr, volatile=True) != 0, 0, behind)
    for begin in range(block * BLOCK, numel, tl.num_programs(0) * BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        mask = offs < numel
        total = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        for peer in tl.static_range(SIZE):  # in the same order on every rank, so that all get the same sum
            part_ptr = (tl.load(peers_ptr + peer) + offset).to(tl.pointer_type(x_ptr.dtype.element_ty))
            part_ptr = tl.multiple_of(part_ptr, 16)  # so that 16 bytes are read at once
            # Past the cache of the SM, which may still have what lay there two sums ago.
            total += tl.load(part_ptr + offs, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        tl.store(x_ptr + offs, total.to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(counts_ptr + block, count)


def add_sum_torch(x: Tensor, parts: list[Tensor]) -> Tensor:
    """What `add_sum` computes."""
    return x.copy_(x.float() + torch.stack(parts).float().sum(0))


def add_sum(x: Tensor, peers: Tensor, offset: int, counts: Tensor, given_up: Tensor, rank: int) -> Tensor:
    """Adds all ranks' parts to x, in place; all ranks must call it, with tensors of one size.

    Args:
        x: contiguous, of the parts' type.
        peers: int64 [ranks] on the device, the addresses of the ranks' buffers: int32 flags [ranks, MAX_BLOCKS], zero
            at first, and at byte `offset` the rank's part.
        counts: int32 [MAX_BLOCKS], the sums so far.
        given_up: int32 [1] in pinned host memory; anything but 0 ends the waiting.
        rank: of the caller.
    """
    _add_sum_kernel[(min(triton.cdiv(x.numel(), BLOCK), MAX_BLOCKS),)](
        x, peers, offset, counts, given_up, x.numel(), rank, SIZE=len(peers),
        MAX_BLOCKS=MAX_BLOCKS, BLOCK=BLOCK, POLLS=POLLS, num_warps=4, **pdl_options(x.device),
    )  # fmt: skip
    return x
