"""The pre-norm decoder that all supported families share; a family brings its attention.

The residual stream x [N, hidden] runs through all layers; what reads it norms it, what adds to it does so in place.
"""

from typing import ClassVar

import torch
from torch import nn

from nanovllm.config import Config
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.rotary_embedding import rotary_table
from nanovllm.utils.context import Context
from nanovllm.utils.tensor_parallel import TensorParallel


class DecoderLayer(nn.Module):
    """Attention, then the feed-forward block."""

    def __init__(self, attention: nn.Module, config: Config, tp: TensorParallel) -> None:
        super().__init__()
        c = config.model_config
        self.self_attn = attention
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, c.mlp_bias, tp)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, tp)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, tp)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
        x = self.self_attn(x, self.input_layernorm, positions, context)
        return self.mlp(x, self.post_attention_layernorm)


class Decoder(nn.Module):
    """Token ids [N] to hidden states [N, hidden]; the LM head applies `norm`, to the tokens that need it."""

    def __init__(self, attention_class: type[nn.Module], config: Config, tp: TensorParallel) -> None:
        super().__init__()
        c = config.model_config
        table = rotary_table(c, config.max_model_len, tp.device)
        self.embed_tokens = VocabParallelEmbedding(c.vocab_size, c.hidden_size, tp)
        self.layers = nn.ModuleList(
            DecoderLayer(attention_class(config, tp, table), config, tp) for _ in range(c.num_hidden_layers)
        )
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, tp)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, positions, context)
        return x


class CausalLM(nn.Module):
    """A decoder with its LM head. Its parameters have a checkpoint's names, but for the modules that fuse several."""

    packed_modules_mapping: ClassVar = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    attention_class: ClassVar[type[nn.Module]]

    def __init__(self, config: Config, tp: TensorParallel) -> None:
        super().__init__()
        c = config.model_config
        self.model = Decoder(self.attention_class, config, tp)
        self.lm_head = ParallelLMHead(c.vocab_size, c.hidden_size, tp)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
        """Token ids and positions [N] -> hidden states [N, hidden]."""
        return self.model(input_ids, positions, context)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [M, hidden] -> this rank's logits [M, vocab / ranks]."""
        return self.lm_head(hidden_states, self.model.norm)
