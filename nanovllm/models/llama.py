"""Llama 2 and 3 (arXiv 2302.13971, 2407.21783), and Mistral without a sliding window: the plain decoder."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from nanovllm.config import Config
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import QKVParallelLinear, RowParallelLinear
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.rotary_embedding import rotary_table
from nanovllm.utils.context import Context
from nanovllm.utils.tensor_parallel import TensorParallel


class LlamaAttention(nn.Module):
    """x + o(attention(qkv(norm(x)))) on [N, hidden]."""

    def __init__(self, config: Config, tp: TensorParallel, table: torch.Tensor) -> None:
        super().__init__()
        c = config.model_config
        heads, kv_heads, bias = c.num_attention_heads, c.num_key_value_heads, c.attention_bias
        self.qkv_proj = QKVParallelLinear(c.hidden_size, c.head_dim, heads, kv_heads, bias, tp)
        self.o_proj = RowParallelLinear(heads * c.head_dim, c.hidden_size, bias, tp)
        self.attn = Attention(heads // tp.size, c.head_dim, config.attention_backend, table)

    def forward(self, x: torch.Tensor, norm: RMSNorm, positions: torch.Tensor, context: Context) -> torch.Tensor:
        o = self.attn(self.qkv_proj(x, norm), positions, context)
        return self.o_proj(o, residual=x)


class LlamaDecoderLayer(nn.Module):
    """Attention, then the feed-forward block, each of which norms what it reads and adds to it: [N, hidden]."""

    def __init__(self, config: Config, tp: TensorParallel, table: torch.Tensor) -> None:
        super().__init__()
        c = config.model_config
        self.self_attn = LlamaAttention(config, tp, table)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, c.mlp_bias, tp)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, tp)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, tp)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
        x = self.self_attn(x, self.input_layernorm, positions, context)
        return self.mlp(x, self.post_attention_layernorm)


class LlamaModel(nn.Module):
    """Token ids [N] to hidden states [N, hidden]; the LM head applies `norm`, to the tokens that need it."""

    def __init__(self, config: Config, tp: TensorParallel) -> None:
        super().__init__()
        c = config.model_config
        table = rotary_table(c, config.max_model_len, tp.device)
        self.embed_tokens = VocabParallelEmbedding(c.vocab_size, c.hidden_size, tp)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, tp, table) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, tp)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, positions, context)
        return x


class LlamaForCausalLM(nn.Module):
    """The model with its LM head; `packed_modules_mapping` says which modules fuse several of a checkpoint's."""

    packed_modules_mapping: ClassVar = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(self, config: Config, tp: TensorParallel) -> None:
        super().__init__()
        c = config.model_config
        self.model = LlamaModel(config, tp)
        self.lm_head = ParallelLMHead(c.vocab_size, c.hidden_size, tp)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
        """Token ids and positions [N] -> hidden states [N, hidden]."""
        return self.model(input_ids, positions, context)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [M, hidden] -> this rank's logits [M, vocab / ranks]."""
        return self.lm_head(hidden_states, self.model.norm)
