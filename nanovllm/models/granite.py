"""Granite 3 (IBM, 2024): Llama with a multiplier in each place where hidden states grow or shrink with the size."""

from torch import Tensor

from nanovllm.config import Config
from nanovllm.layers.layernorm import Normalised
from nanovllm.layers.residual import Residual, only_sampled
from nanovllm.models.llama import LlamaDecoderLayer
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.utils.context import Context


class GraniteDecoderLayer(LlamaDecoderLayer):
    """x = x + r attention(norm(x)), x = x + r mlp(norm(x))."""

    def __init__(self, config: Config, tp: TensorParallel, rotary_table: Tensor, index: int) -> None:
        super().__init__(config, tp, rotary_table, index)
        self.residual_multiplier = config.model_config.residual_multiplier

    def forward(self, positions: Tensor, x: Residual, context: Context) -> Residual:
        x.add_(self.self_attn(positions, self.input_layernorm(x), context), alpha=self.residual_multiplier)
        if self.is_last:
            x = only_sampled(x, context)
        return x.add_(self.mlp(self.post_attention_layernorm(x)), alpha=self.residual_multiplier)


class GraniteForCausalLM(Qwen3ForCausalLM):
    """The decoder of Qwen3 with Granite's layers between an embedding and a head that have multipliers too."""

    layer_class = GraniteDecoderLayer

    def __init__(self, config: Config, tp: TensorParallel) -> None:
        super().__init__(config, tp)
        self.model.embed_tokens.multiplier = config.model_config.embedding_multiplier
        self.logits_scaling = config.model_config.logits_scaling

    def compute_logits(self, hidden_states: Normalised | Tensor) -> Tensor:
        return super().compute_logits(hidden_states).div_(self.logits_scaling)
