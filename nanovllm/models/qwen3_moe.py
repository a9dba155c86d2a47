"""Qwen3 with a mixture of experts (arXiv 2505.09388), such as Qwen3-30B-A3B."""

from torch import nn

from nanovllm.config import Config
from nanovllm.layers.experts import SparseMLP
from nanovllm.models.qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3MLP
from nanovllm.parallel.tensor_parallel import TensorParallel


class Qwen3MoeDecoderLayer(Qwen3DecoderLayer):
    """Most layers, if not all, have experts in place of an MLP."""

    def make_mlp(self, config: Config, tp: TensorParallel, index: int) -> nn.Module:
        c = config.model_config
        if index not in c.sparse_layers:
            return Qwen3MLP(config, tp)
        sizes = c.hidden_size, c.moe_intermediate_size, c.num_experts
        return SparseMLP(*sizes, c.num_experts_per_tok, c.norm_topk_prob, tp)


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """The decoder of Qwen3 with sparse layers."""

    decoder_layer_class = Qwen3MoeDecoderLayer
