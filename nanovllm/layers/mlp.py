"""The gated feed-forward block that all supported families share (SwiGLU, arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import nn

from nanovllm.kernels.silu_and_mul import silu_and_mul
from nanovllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from nanovllm.utils.tensor_parallel import TensorParallel


class SiluAndMul(nn.Module):
    """silu(gate) * up of [N, gate | up]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return silu_and_mul(x)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) on [N, hidden]."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(hidden_size, intermediate_size, bias, tp)
        self.act_fn = SiluAndMul()
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias, tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)))
