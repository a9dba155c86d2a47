"""Process groups as an engine has them: its own, registered nowhere, by NCCL between GPUs and by Gloo between CPUs."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)


def make_group(store: dist.Store, rank: int, size: int, device: torch.device) -> dist.Backend:
    """The group of `size` ranks that meet at the store, of which this one computes on `device`."""
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, rank, size, TIMEOUT)
    # NCCL's watchdog would answer the death of a rank by ending this process, which may be the caller's.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    # Another thread of NCCL's would ask the store each second whether a rank wants all to write down what they did,
    # and print a stack trace when the rank that has the store ends first.
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    return dist.ProcessGroupNCCL(store, rank, size, TIMEOUT)


def all_reduce(group: dist.Backend, x: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
    """Reduces x over the ranks of a group, in place; on a GPU in the current stream."""
    options = dist.AllreduceOptions()
    options.reduceOp = op
    options.asyncOp = False
    if work := group.allreduce([x], options):
        work.wait()
    return x


def broadcast(group: dist.Backend, x: torch.Tensor) -> None:
    """Copies x from rank 0 of a group to the others' x; on a GPU in the current stream."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.asyncOp = False
    if work := group.broadcast([x], options):
        work.wait()
