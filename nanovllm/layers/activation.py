"""The gated activations of MLPs (arXiv 2002.05202): [N, gates | ups] -> [N, gates]."""

from torch import Tensor, nn

from nanovllm.layers.linear import GateUp, apply_linear


class SiluAndMul(nn.Module):
    """silu(gate) * up, SwiGLU."""

    def forward(self, gate_up: GateUp) -> Tensor:
        return apply_linear(gate_up.x, gate_up.weight, gate_up.bias, "silu")


class GeluAndMul(nn.Module):
    """gelu(gate) * up, GEGLU, by the approximation of GELU with a tanh."""

    def forward(self, gate_up: GateUp) -> Tensor:
        return apply_linear(gate_up.x, gate_up.weight, gate_up.bias, "gelu_tanh")
