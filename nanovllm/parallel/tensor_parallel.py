"""This rank's place among the tensor-parallel ranks, and the collectives that layers use.

Collectives go through NCCL (Gloo on CPUs) or, where the GPUs reach each other's memory, through kernels of our own.
The process group belongs to one engine and is handed to the layers that need it. Nothing is registered globally, so
that several engines, and a caller that uses torch.distributed itself, live side by side in one process. Nothing here
knows how the ranks' processes are started, or what the layers compute.
"""

import functools
import threading
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import nn

from nanovllm.config import Config
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.kernels.tuning import SMALL_BATCH
from nanovllm.parallel.all_reduce import Peers, max_over_ranks, packet_rows
from nanovllm.parallel.groups import all_reduce, make_group
from nanovllm.parallel.peer_memory import PeerMemory
from nanovllm.pipeline.stage import Stage

ABORT_SECONDS = 3.0


class TensorParallel:
    """Rank `rank` of its stage's `size`, with a device of its own; the collectives of a single rank do nothing."""

    def __init__(self, config: Config, rank: int) -> None:
        """Not connected yet. `rank` is one of all ranks of the engine, see pipeline/stage.py for their order."""
        self.size = config.tensor_parallel_size
        self.rank = rank % self.size
        self.device = torch.device(config.device, rank if config.device == "cuda" else None)
        self.stage = Stage(config, rank, self.device)
        self.dtype = config.torch_dtype
        self.sum_shape = (config.max_num_batched_tokens, config.model_config.hidden_size)  # of the largest
        self.group: dist.Backend | None = None
        self.peer_memory: PeerMemory | None = None
        self.is_aborted = False
        self.aborting: threading.Thread | None = None

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream | None:
        """The stream of all work on this rank's GPU, captures of CUDA graphs included.

        Once a second stream has run a few kernels, a GPU starts each kernel of a graph later: an H200 by up to 0.4 us,
        which is 4% of a step of Qwen3-0.6B (compare pytorch issue 161104).
        """
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def connect(self, store: dist.Store) -> None:
        """Meets the other ranks; to be called on all of them before the first collective."""
        self.stage.connect(store)
        if self.size == 1:
            return
        store = dist.PrefixStore(f"stage {self.stage.index}", store)
        self.group = make_group(store, self.rank, self.size, self.device)
        self.min(0)
        if self.device.type == "cpu":
            return
        try:
            self.peer_memory = PeerMemory(store, self.rank, self.size, self.sum_shape, self.dtype, self.device)
        except (RuntimeError, OSError):  # NCCL finds a way
            self.check()
        if not self.min(self.peer_memory is not None):
            self.peer_memory = None

    def abort(self) -> None:
        """Breaks off collectives that wait for ranks which will not come, and refuses new ones; does not wait."""
        self.is_aborted = True
        if self.peer_memory is not None:
            self.peer_memory.given_up.fill_(1)
        groups = self.stage.groups + ([self.group] if self.group is not None else [])
        if groups and self.aborting is None:
            # NCCL ends its kernels at once, but returns only when the CUDA graphs that hold them are gone: the links
            # between stages, which no graph holds, come first.
            abort = functools.partial(abort_all, groups)
            self.aborting = threading.Thread(target=abort, daemon=True, name="nanovllm-abort")
            self.aborting.start()

    def disconnect(self) -> None:
        """Gives up the group after an abort, which has a few seconds to end."""
        if self.aborting is not None:
            self.aborting.join(ABORT_SECONDS)
        if self.peer_memory is not None:
            with suppress(RuntimeError):  # of a GPU that has failed
                self.peer_memory.close()
        self.stage.disconnect()
        self.group = self.peer_memory = self.aborting = None

    def check(self) -> None:
        """Raises RuntimeError after an abort."""
        if self.is_aborted:
            raise RuntimeError("the ranks were given up")

    def parameter(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """A parameter of this rank, yet to be filled; None: in the model's dtype."""
        return nn.Parameter(torch.empty(*shape, dtype=dtype or self.dtype, device=self.device), requires_grad=False)

    def next_peers(self, rows: int, weight: torch.Tensor | QuantizedWeight | None = None) -> Peers | None:
        """The ranks' memory for the step's next sum, of some rows; None if `all_reduce` is to make it.

        `weight` is what they are a product with, if they are one.
        """
        self.check()
        if not self._fits_peer_memory(rows):
            return None
        return self.peer_memory.next_peers(rows, SMALL_BATCH if weight is None else packet_rows(weight))

    def all_reduce(self, x: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduces x over the ranks, in place."""
        self.check()
        return x if self.group is None else all_reduce(self.group, x, op)

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """The largest of the ranks' values, int64 [N] and none of them -1, in place of x."""
        if self._fits_peer_memory(len(x)):
            return max_over_ranks(x, self.peer_memory.candidates())
        return self.all_reduce(x, dist.ReduceOp.MAX)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' x of shape [N, D] side by side, [N, size * D]."""
        if self.group is None:
            return x
        whole = x.new_zeros(len(x), self.size, x.size(1))
        whole[:, self.rank] = x
        return self.all_reduce(whole.flatten(1))  # each adds zeros to the others' parts

    def min(self, value: int) -> int:
        """The smallest of the values of all ranks, of all stages."""
        smallest = int(self.all_reduce(torch.tensor(value, device=self.device), dist.ReduceOp.MIN))
        self.check()  # else it may be anything
        return self.stage.min(smallest)

    def _fits_peer_memory(self, rows: int) -> bool:
        """Whether there is memory that all ranks' GPUs reach, with room for a collective of so many rows."""
        return self.peer_memory is not None and rows <= self.sum_shape[0]


def abort_all(groups: list[dist.Backend]) -> None:
    """Breaks off all that waits in some groups, one after the other."""
    for group in groups:
        group.abort()
