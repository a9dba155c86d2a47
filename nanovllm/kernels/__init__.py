"""Triton kernels, each beside the plain torch function that it must equal.

Every public function here chooses by itself: CUDA tensors go to the Triton kernel, anything else to `<name>_torch`.
Only sampling and paged attention have two files each, as `sampling.py` and `sampling_torch.py`; which of the samplers,
`layers/sampler.py` chooses by `sampler_backend`.
With TRITON_INTERPRET=1 in the environment (read once, at import) CPU tensors take the kernel too, in Triton's
interpreter; the tests use that. Where triton has no wheel (macOS) the package still imports and runs on torch.
The files called `*_hopper.py` have what only Hopper runs, of what others here compute elsewhere.

This file knows nothing of the engine: the functions take tensors and numbers.
"""

import functools
import os

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    from unittest.mock import MagicMock

    triton = tl = MagicMock()  # so that `@triton.jit` and `tl.constexpr` can be written down, if never run
    HAS_TRITON = False

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(x: torch.Tensor) -> bool:
    """Whether a kernel, and not the torch function beside it, computes on `x`."""
    return HAS_TRITON and (x.is_cuda or INTERPRETED)


@functools.cache
def pdl_options(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that calls `pdl_wait`, to start before the one ahead of it ends: Hopper and later."""
    pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": pdl, "launch_pdl": pdl}


@triton.jit
def pdl_wait(PDL: tl.constexpr, LAUNCH: tl.constexpr = True) -> None:
    """Let the next kernel of the stream start, and wait until all earlier ones ended and their writes are visible.

    With LAUNCH false the next kernel starts only when the program calls `gdc_launch_dependents` itself, or ends.
    Every program of a kernel that is launched with `pdl_options` calls this once: before it reads what the step
    computes, and before it writes anything at all, for memory may still be in use by an earlier kernel. What it may
    read sooner is what a kernel wrote that ended before some ordinary launch since: weights, and the step's inputs.
    """
    if PDL:
        if LAUNCH:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
