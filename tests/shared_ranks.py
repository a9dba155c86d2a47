"""Ranks on a CPU whose kernels, in Triton's interpreter, send and receive sums as GPUs do in each other's memory.

The memory is a file for each rank, which all of them map. Imported by ranks.
"""

from __future__ import annotations

from pathlib import Path

import torch

from nanovllm.parallel import peer_memory, ranks
from nanovllm.parallel.peer_memory import PeerMemory
from nanovllm.parallel.tensor_parallel import TensorParallel

MAX_PART_ROWS = 24  # so that a few prompts are summed in shares


class SharedFiles(PeerMemory):
    """What PeerMemory is on GPUs."""

    def __init__(self, folder: Path, store, tp: TensorParallel) -> None:
        num_bytes = self.lay_out(tp.rank, tp.size, tp.sum_shape, tp.dtype)
        self.buffers = [
            torch.from_file(str(folder / f"rank{rank}"), shared=True, size=num_bytes, dtype=torch.uint8)
            for rank in range(tp.size)
        ]
        self.buffers[tp.rank].zero_()
        self.buffers[tp.rank][self.candidate_offset : self.share_offset] = 255
        self.addresses = tuple(buffer.data_ptr() for buffer in self.buffers)
        self.given_up = torch.zeros(1, dtype=torch.int32)
        store.set(f"memory of rank {tp.rank}", "ready")
        for rank in range(tp.size):
            store.get(f"memory of rank {rank}")

    def close(self) -> None:
        """The files are the test's."""


class SharingRank:
    """Stands in for `run_rank` (it is pickled into the ranks), and sets up this process too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *args: object) -> None:
        self.set_up()
        ranks.run_rank(*args)

    def set_up(self) -> None:
        peer_memory.MAX_PART_ROWS = MAX_PART_ROWS
        connect = TensorParallel.connect

        def connect_and_share(tp: TensorParallel, store) -> None:
            connect(tp, store)
            tp.peer_memory = SharedFiles(self.folder, store, tp)

        TensorParallel.connect = connect_and_share
