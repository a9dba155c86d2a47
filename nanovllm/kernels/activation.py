# ruff: noqa: ANN001, ANN201, ANN202 (Triton types the arguments of its kernels itself)
"""The gated activation of an MLP, behind a product of many rows; with few rows the product's kernel applies it."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton, use_triton

Gate = Literal["silu", "gelu_tanh"]
BLOCK = 1024
GELU_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def gate_and_mul(gate, up, GATE: tl.constexpr):
    """activation(gate) * up, in float32. Both activations are gate * sigmoid(z), as 1 + tanh(z / 2) = 2 sigmoid(z)."""
    z = gate
    if GATE == "gelu_tanh":
        z = GELU_SLOPE * (gate + GELU_CUBIC * gate * gate * gate)
    return gate / (1.0 + tl.exp(-z)) * up


@triton.jit
def _gate_and_mul_kernel(x_ptr, y_ptr, x_stride, size, GATE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    x = x_ptr + row * x_stride + offs
    pdl_wait(PDL)
    gate = tl.load(x, mask=mask).to(tl.float32)
    up = tl.load(x + size, mask=mask).to(tl.float32)
    tl.store(y_ptr + row * size + offs, gate_and_mul(gate, up, GATE), mask=mask)


def silu_and_mul_torch(x: Tensor) -> Tensor:
    """What `silu_and_mul` computes, said plainly."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def gelu_tanh_and_mul_torch(x: Tensor) -> Tensor:
    """What `gelu_tanh_and_mul` computes, said plainly."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020).

    x: [N, 2 I], gate then up, rows any distance apart. Arithmetic in float32. Returns [N, I] in x's dtype, contiguous.
    """
    return _launch(x, "silu") if use_triton(x) else silu_and_mul_torch(x)


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """gelu(gate) * up (Shazeer), with the approximation of GELU by a tanh (arXiv 1606.08415); as `silu_and_mul`."""
    return _launch(x, "gelu_tanh") if use_triton(x) else gelu_tanh_and_mul_torch(x)


def _launch(x: Tensor, gate: Gate) -> Tensor:
    rows, size = x.shape[0], x.shape[1] // 2
    y = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    grid = rows, triton.cdiv(size, BLOCK)
    _gate_and_mul_kernel[grid](x, y, x.stride(0), size, GATE=gate, BLOCK=BLOCK, num_warps=4, **pdl_options(x.device))
    return y


GATES: dict[Gate, Callable[[Tensor], Tensor]] = {"silu": silu_and_mul, "gelu_tanh": gelu_tanh_and_mul}
