"""Llama 2 and 3 (arXiv 2302.13971, 2407.21783), and Mistral without a sliding window: the plain decoder."""

from nanovllm.layers.decoder import CausalLM


class LlamaForCausalLM(CausalLM):
    """The shared decoder; config.json says whether the projections have biases."""
