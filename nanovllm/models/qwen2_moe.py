"""Qwen2 and Qwen1.5 with a mixture of experts (arXiv 2407.10671): one expert more computes every token."""

from torch import Tensor, nn

from nanovllm.experts.layers import SparseMLP
from nanovllm.experts.mixture import Mixture
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.layernorm import Normalised
from nanovllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear, apply_linear
from nanovllm.models.llama import LlamaAttention
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.models.qwen3_moe import Qwen3MoeDecoderLayer
from nanovllm.parallel.tensor_parallel import TensorParallel


class SharedExpert(nn.Module):
    """The MLP of all tokens; this rank's part of its result, [N, hidden]."""

    def __init__(self, hidden_size: int, intermediate_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(hidden_size, intermediate_size, False, tp)
        self.act_fn = SiluAndMul()
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, False, tp)

    def forward(self, x: Normalised | Tensor) -> Tensor:
        return apply_linear(self.act_fn(self.gate_up_proj(x)), self.down_proj.weight)


class Qwen2MoeMLP(SparseMLP):
    """Experts, and the shared one weighted by a gate of its own."""

    def __init__(self, hidden_size: int, mixture: Mixture, tp: TensorParallel) -> None:
        super().__init__(hidden_size, mixture, tp)
        self.shared_expert = SharedExpert(hidden_size, mixture.shared_intermediate_size, tp)
        self.shared_expert_gate = nn.Module()
        self.shared_expert_gate.weight = tp.parameter(1, hidden_size)

    def add_to(self, y: Tensor | None, x: Normalised | Tensor) -> Tensor:
        weight = apply_linear(x, self.shared_expert_gate.weight).sigmoid()
        shared = self.shared_expert(x)
        return super().add_to(y, x).addcmul_(shared, weight)


class Qwen2MoeDecoderLayer(Qwen3MoeDecoderLayer):
    """Attention without norms of heads, as Llama's, before the experts; config.json says whether it has biases."""

    attention_class = LlamaAttention
    sparse_mlp_class = Qwen2MoeMLP


class Qwen2MoeForCausalLM(Qwen3ForCausalLM):
    """The decoder of Qwen3 with Qwen2's sparse layers."""

    layer_class = Qwen2MoeDecoderLayer
