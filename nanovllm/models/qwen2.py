"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on the query, key and value projections."""

from nanovllm.layers.decoder import CausalLM


class Qwen2ForCausalLM(CausalLM):
    """The shared decoder; qkv has biases whatever config.json says."""

    has_qkv_bias = True
