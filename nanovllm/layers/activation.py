"""The gated activation of an MLP, SwiGLU (arXiv 2002.05202)."""

from torch import Tensor, nn

from nanovllm.layers.linear import GateUp, apply_linear


class SiluAndMul(nn.Module):
    """silu(gate) * up: [N, gates | ups] -> [N, gates]."""

    def forward(self, gate_up: GateUp) -> Tensor:
        return apply_linear(gate_up.x, gate_up.weight, gate_up.bias, gated=True)
