"""Qwen3 (arXiv 2505.09388): grouped-query attention whose queries and keys are normalised head by head."""

from nanovllm.layers.decoder import CausalLM


class Qwen3ForCausalLM(CausalLM):
    """The shared decoder, with an RMSNorm of each query and key head before the rotary embedding."""

    has_qk_norm = True
