"""The gated feed-forward block that all supported families share (SwiGLU, arXiv 2002.05202)."""

import torch
from torch import nn

from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from nanovllm.utils.tensor_parallel import TensorParallel


class GatedMLP(nn.Module):
    """x + down(silu(gate(norm(x))) * up(norm(x))) on [N, hidden]."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(hidden_size, intermediate_size, bias, tp)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias, tp)

    def forward(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        return self.down_proj(self.gate_up_proj(x, norm), residual=x)
