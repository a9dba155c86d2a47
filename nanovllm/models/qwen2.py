"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama's layer with biases on the query, key and value projections."""

import torch
from torch import nn

from nanovllm.config import Config
from nanovllm.layers.attention import Attention
from nanovllm.layers.decoder import CausalLM
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import QKVParallelLinear, RowParallelLinear
from nanovllm.utils.context import Context
from nanovllm.utils.tensor_parallel import TensorParallel


class Qwen2Attention(nn.Module):
    """x + o(attention(qkv(norm(x)))) on [N, hidden]."""

    def __init__(self, config: Config, tp: TensorParallel, rotary_table: torch.Tensor) -> None:
        super().__init__()
        c = config.model_config
        heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.qkv_proj = QKVParallelLinear(c.hidden_size, dim, heads, kv_heads, True, tp)
        self.o_proj = RowParallelLinear(heads * dim, c.hidden_size, False, tp)
        self.attn = Attention(heads // tp.size, dim, config.attention_backend, rotary_table)

    def forward(self, x: torch.Tensor, norm: RMSNorm, positions: torch.Tensor, context: Context) -> torch.Tensor:
        o = self.attn(self.qkv_proj(x, norm), positions, context)
        return self.o_proj(o, residual=x)


class Qwen2ForCausalLM(CausalLM):
    """The decoder of `layers/decoder.py` with this attention."""

    attention_class = Qwen2Attention
