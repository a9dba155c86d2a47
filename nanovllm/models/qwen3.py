"""Qwen3 (arXiv 2505.09388): grouped-query attention whose queries and keys are normalised head by head."""

from torch import Tensor

from nanovllm.config import Config
from nanovllm.layers.decoder import CausalLM, SelfAttention
from nanovllm.utils.tensor_parallel import TensorParallel


class Qwen3ForCausalLM(CausalLM):
    """The shared decoder, with an RMSNorm of each query and key head before the rotary embedding."""

    @staticmethod
    def make_attention(config: Config, tp: TensorParallel, rotary_table: Tensor) -> SelfAttention:
        """The attention of one layer."""
        bias = config.model_config.attention_bias
        return SelfAttention(config, tp, rotary_table, qkv_bias=bias, o_bias=bias, qk_norm=True)
