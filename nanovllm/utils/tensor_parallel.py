"""This rank's place among the tensor-parallel ranks, and the collectives that layers use.

The process group belongs to one engine and is handed to the layers that need it. Nothing is registered globally, so
that several engines, and a caller that uses torch.distributed itself, live side by side in one process.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

TIMEOUT = timedelta(minutes=10)
ABORT_SECONDS = 3.0


class TensorParallel:
    """Rank `rank` of `size`, whose weights are of `dtype` on `device`; the collectives of a single rank do nothing."""

    def __init__(self, rank: int, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.dtype = dtype
        self.group: dist.ProcessGroup | None = None
        self.is_aborted = False
        self.aborting: threading.Thread | None = None

    def connect(self, store: dist.Store) -> None:
        """Meets the other ranks; to be called on all of them before the first collective."""
        if self.device.type == "cuda":
            # NCCL's watchdog would answer the death of a rank by ending this process, which may be the caller's.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            self.group = dist.ProcessGroupNCCL(store, self.rank, self.size, TIMEOUT)
        else:
            self.group = dist.ProcessGroupGloo(store, self.rank, self.size, TIMEOUT)
        self.min(0)

    def abort(self) -> None:
        """Breaks off collectives that wait for ranks which will not come, and refuses new ones; does not wait."""
        self.is_aborted = True
        if self.group is not None and self.aborting is None:
            # NCCL ends its kernels at once, but returns only when the CUDA graphs that hold them are gone.
            self.aborting = threading.Thread(target=self.group.abort, daemon=True, name="nanovllm-abort")
            self.aborting.start()

    def disconnect(self) -> None:
        """Gives up the group after an abort, which has a few seconds to end."""
        if self.aborting is not None:
            self.aborting.join(ABORT_SECONDS)
        self.group = self.aborting = None

    def check(self) -> None:
        """Raises RuntimeError after an abort."""
        if self.is_aborted:
            raise RuntimeError("the ranks were given up")

    def parameter(self, *shape: int) -> nn.Parameter:
        """A parameter of this rank, yet to be filled."""
        return nn.Parameter(torch.empty(*shape, dtype=self.dtype, device=self.device), requires_grad=False)

    def all_reduce(self, x: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduces x over the ranks, in place."""
        self.check()
        if self.group is not None:
            options = dist.AllreduceOptions()
            options.reduceOp = op
            self.group.allreduce([x], options).wait()
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' x of shape [N, D] side by side, [N, size * D]."""
        if self.group is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.group.allgather([parts], [x]).wait()
        return torch.cat(parts, dim=-1)

    def min(self, value: int) -> int:
        """The smallest of the ranks' values."""
        smallest = int(self.all_reduce(torch.tensor(value, device=self.device), dist.ReduceOp.MIN))
        self.check()  # else it may be anything
        return smallest
