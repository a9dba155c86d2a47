"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on the query, key and value projections."""

from torch import Tensor

from nanovllm.config import Config
from nanovllm.layers.decoder import CausalLM, SelfAttention
from nanovllm.utils.tensor_parallel import TensorParallel


class Qwen2ForCausalLM(CausalLM):
    """The shared decoder; qkv has biases whatever config.json says."""

    @staticmethod
    def make_attention(config: Config, tp: TensorParallel, rotary_table: Tensor) -> SelfAttention:
        """The attention of one layer."""
        return SelfAttention(config, tp, rotary_table, qkv_bias=True, o_bias=False, qk_norm=False)
