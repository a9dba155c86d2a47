"""Gemma 2 (arXiv 2408.00118): what attention and MLP compute is normalised too, before it is added to the stream.

Scores and logits have soft caps. Every other layer attends to a window.
"""

import math

import torch
from torch import Tensor

from nanovllm.checkpoint.loader import Shard
from nanovllm.config import Config
from nanovllm.layers.activation import GeluAndMul
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.residual import only_sampled
from nanovllm.models.llama import LlamaAttention
from nanovllm.models.qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3MLP
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.utils.context import Context


class Gemma2RMSNorm(RMSNorm):
    """Checkpoints have its weight less 1.

    The whole of it is kept in float32: beside the 1, bfloat16 has no room for all bits of what it is added to.
    """

    def __init__(self, size: int, eps: float, tp: TensorParallel) -> None:
        super().__init__(size, eps, tp)
        self.weight = tp.parameter(size, dtype=torch.float32)
        self.weight.shards = [Shard((size,), 0, 0, 0, size, added=1.0)]


class Gemma2MLP(Qwen3MLP):
    """down(gelu(gate) * up)."""

    activation_class = GeluAndMul


class Gemma2DecoderLayer(Qwen3DecoderLayer):
    """x = x + norm(attention(norm(x))), x = x + norm(mlp(norm(x))).

    A norm needs the whole of what it reads: with several ranks, sums over them are made at once here.
    """

    attention_class = LlamaAttention
    norm_class = Gemma2RMSNorm

    def __init__(self, config: Config, tp: TensorParallel, rotary_table: Tensor, index: int) -> None:
        super().__init__(config, tp, rotary_table, index)
        c = config.model_config
        self.pre_feedforward_layernorm = self.norm_class(c.hidden_size, c.rms_norm_eps, tp)
        self.post_feedforward_layernorm = self.norm_class(c.hidden_size, c.rms_norm_eps, tp)

    def make_mlp(self, config: Config, tp: TensorParallel, index: int) -> Gemma2MLP:
        return Gemma2MLP(config, tp)

    def forward(self, positions: Tensor, x: Tensor, context: Context) -> Tensor:
        y = self.self_attn(positions, self.input_layernorm(x), context, residual=None)
        x = self.post_attention_layernorm.add_to(x, y)
        if self.is_last:
            x = only_sampled(x, context)
        y = self.mlp(self.pre_feedforward_layernorm(x), residual=None)
        return self.post_feedforward_layernorm.add_to(x, y)


class Gemma2ForCausalLM(Qwen3ForCausalLM):
    """The decoder of Qwen3 with Gemma's layers, and embeddings times sqrt(hidden)."""

    layer_class = Gemma2DecoderLayer

    def __init__(self, config: Config, tp: TensorParallel) -> None:
        super().__init__(config, tp)
        scale = math.sqrt(config.model_config.hidden_size)
        # Rounded, as it was when the models were trained.
        self.model.embed_tokens.multiplier = torch.tensor(scale, device="cpu").to(tp.dtype).item()
