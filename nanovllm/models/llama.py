"""Llama 2 and 3 (arXiv 2302.13971, 2407.21783), and Mistral without a sliding window: the plain decoder."""

from torch import Tensor

from nanovllm.config import Config
from nanovllm.layers.decoder import CausalLM, SelfAttention
from nanovllm.utils.tensor_parallel import TensorParallel


class LlamaForCausalLM(CausalLM):
    """The shared decoder; config.json says whether the projections have biases."""

    @staticmethod
    def make_attention(config: Config, tp: TensorParallel, rotary_table: Tensor) -> SelfAttention:
        """The attention of one layer."""
        bias = config.model_config.attention_bias
        return SelfAttention(config, tp, rotary_table, qkv_bias=bias, o_bias=bias, qk_norm=False)
