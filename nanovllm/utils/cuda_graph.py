"""CUDA graphs, captured and replayed through the CUDA runtime.

torch.cuda.CUDAGraph would do, but each of its captures leaves the process with more streams in use, and from the
fourth capture on a GPU starts every kernel later: on an H200 by 0.4 us, or 4% of a step (compare pytorch issue 161104).
"""

import ctypes
import functools
from collections.abc import Callable

import torch

RELAXED = 2  # a capture mode: a kernel may have to be loaded, or compiled, on the way


@functools.cache
def cuda_runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch has loaded."""
    return ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")


def call(function: str, *args: object) -> None:
    """Calls the CUDA runtime; RuntimeError if that fails."""
    if code := getattr(cuda_runtime(), function)(*args):
        raise RuntimeError(f"{function} failed with CUDA error {code}")


class CUDAGraph:
    """The kernels that a function launches, to be replayed by one launch."""

    def __init__(self, function: Callable[[], object], pool: torch.cuda.MemPool, stream: torch.cuda.Stream) -> None:
        """Captures the function's work on a stream. What it allocates comes from the pool, which must live as long.

        Graphs of one pool use the same memory: no two may run at a time.
        """
        graph, self.executable = ctypes.c_void_p(), ctypes.c_void_p()
        capture_stream = ctypes.c_void_p(stream.cuda_stream)
        torch.cuda.synchronize()
        with torch.cuda.use_mem_pool(pool), torch.cuda.stream(stream):
            call("cudaStreamBeginCapture", capture_stream, RELAXED)
            try:
                function()
            finally:
                call("cudaStreamEndCapture", capture_stream, ctypes.byref(graph))
        call("cudaGraphInstantiateWithFlags", ctypes.byref(self.executable), graph, ctypes.c_ulonglong(0))
        call("cudaGraphDestroy", graph)

    def replay(self) -> None:
        """Launches the graph on the current stream."""
        call("cudaGraphLaunch", self.executable, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))

    def __del__(self) -> None:
        """Frees the graph, but not what it allocated, which is the pool's."""
        cuda_runtime().cudaGraphExecDestroy(self.executable)
