"""Triton kernels, each beside the plain torch function that it must equal.

Every public function here chooses by itself: CUDA tensors go to the Triton kernel, anything else to `<name>_torch`.
With TRITON_INTERPRET=1 in the environment (read once, at import) CPU tensors take the kernel too, in Triton's
interpreter; the tests use that. Where triton has no wheel (macOS) the package still imports and runs on torch.

This file knows nothing of the engine: the functions take tensors and numbers.
"""

import os
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:

    class _Absent:
        """Stands in for triton, so that `@triton.jit` and `tl.constexpr` can be written down, if never run."""

        def __getattr__(self, name: str) -> "_Absent":
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> "_Absent":
            return self

    triton = tl = _Absent()
    HAS_TRITON = False

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(x: torch.Tensor) -> bool:
    """Whether a kernel, and not the torch function beside it, computes on `x`."""
    return HAS_TRITON and (x.is_cuda or INTERPRETED)
