"""Kernels compiled many at once, ahead of the steps that launch them.

Triton compiles a kernel when it is first launched, one after the other, each in 0.1 to 2 s. On a machine that has none
of them in Triton's cache, that is most of a start.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.jit import JITFunction


@contextmanager
def compiling_together() -> Iterator[None]:
    """Within, kernels that are launched are not run but compiled, by many threads; at its end all are there.

    Results of kernels are whatever was in their memory: what is launched within must be a capture, which computes
    nothing.
    """
    launch, seen = JITFunction.run, set()

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        # Layers launch the same kernels; what Triton does to see that is slow.
        key = kernel, *map(_kind, args), *((name, _kind(value)) for name, value in options.items())
        if key not in seen:
            seen.add(key)
            launch(kernel, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    try:
        with ThreadPoolExecutor() as threads, AsyncCompileMode(threads):
            yield
    finally:
        JITFunction.run = launch


def _kind(argument: Any) -> Any:
    """What a kernel is compiled anew for, of one of its arguments; equal kinds share a kernel."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, (tuple, list)):
        return tuple(map(_kind, argument))
    if hasattr(argument, "block_shape"):  # a tensor map
        return _kind(argument.base), tuple(argument.block_shape)
    return argument
