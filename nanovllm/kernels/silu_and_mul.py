# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""The gated activation of a Llama-style MLP (SwiGLU), on the fused gate-and-up projection."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import tl, triton, use_triton

BLOCK = 1024


@triton.jit
def _silu_and_mul_kernel(x_ptr, y_ptr, x_stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    x = x_ptr + row * x_stride + offs
    gate = tl.load(x, mask=mask).to(tl.float32)
    up = tl.load(x + size, mask=mask).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * size + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def silu_and_mul_torch(x: Tensor) -> Tensor:
    """What `silu_and_mul` computes, said plainly."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020).

    x: [N, 2 I], gate then up, rows any distance apart. Arithmetic in float32. Returns [N, I] in x's dtype, contiguous.
    """
    if not use_triton(x):
        return silu_and_mul_torch(x)
    rows, size = x.shape[0], x.shape[1] // 2
    y = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if rows:
        _silu_and_mul_kernel[(rows, triton.cdiv(size, BLOCK))](x, y, x.stride(0), size, BLOCK=BLOCK, num_warps=4)
    return y
