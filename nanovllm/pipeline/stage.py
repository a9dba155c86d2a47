"""A rank's stage of the pipeline: which layers it has, and the links by which hidden states come and go."""

import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.parallel.groups import all_reduce, broadcast, make_group

CPU = torch.device("cpu")


class Stage:
    """Rank 0 is in the last stage, where the host reads the tokens; each rank hands on to its like in the next stage.

    Attributes:
        index: of the stage, 0 is the first one.
        layers: the numbers of its layers. Where all stages cannot have as many, the first ones have one more.
        states: [N, hidden], the hidden states of a step's tokens: those that came, then those that go.
    """

    states: torch.Tensor

    def __init__(self, config: Config, rank: int, device: torch.device) -> None:
        """Not connected yet. `rank` is one of all ranks, and `device` its own."""
        self.rank, self.num_ranks = rank, config.num_ranks
        self.device = device
        self.distance = config.tensor_parallel_size  # between a rank and its like in the next stage
        num_layers, num_stages = config.model_config.num_hidden_layers, config.pipeline_parallel_size
        self.index = num_stages - 1 - rank // self.distance
        self.is_first, self.is_last = self.index == 0, self.index == num_stages - 1
        start, end = (-(-num_layers * index // num_stages) for index in (self.index, self.index + 1))
        self.layers = range(start, end)
        self.everyone: dist.Backend | None = None
        self.inlet: dist.Backend | None = None
        self.outlet: dist.Backend | None = None

    @property
    def groups(self) -> list[dist.Backend]:
        """All that it is a member of."""
        return [group for group in (self.inlet, self.outlet, self.everyone) if group is not None]

    def connect(self, store: dist.Store) -> None:
        """Meets the ranks of all stages; does nothing where there is one."""
        if self.is_first and self.is_last:
            return
        self.everyone = make_group(dist.PrefixStore("everyone", store), self.rank, self.num_ranks, CPU)
        # A link is a group of two, as NCCL sends and receives in another stream than the current one, but broadcasts
        # in it. Each has one direction, so that no two ranks ever wait for each other.
        if not self.is_first:
            self.inlet = self._link(store, sender=self.rank + self.distance)
        if not self.is_last:
            self.outlet = self._link(store, sender=self.rank)
        self.receive(1)  # NCCL connects two ranks when they first use their group
        self.send(1)

    def disconnect(self) -> None:
        """Gives up the groups, which have been aborted."""
        self.everyone = self.inlet = self.outlet = None

    def receive(self, num_tokens: int) -> None:
        """Waits, on the device, for the states that the stage before sends, if there is one."""
        if self.inlet is not None:
            broadcast(self.inlet, self.states[:num_tokens])

    def send(self, num_tokens: int) -> None:
        """Sends the states to the stage behind, if there is one."""
        if self.outlet is not None:
            broadcast(self.outlet, self.states[:num_tokens])

    def min(self, value: int) -> int:
        """The smallest of all ranks' values."""
        if self.everyone is None:
            return value
        return int(all_reduce(self.everyone, torch.tensor(value), dist.ReduceOp.MIN))

    def _link(self, store: dist.Store, sender: int) -> dist.Backend:
        store = dist.PrefixStore(f"states of rank {sender}", store)
        return make_group(store, int(self.rank != sender), 2, self.device)
