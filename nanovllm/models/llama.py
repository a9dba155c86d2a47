"""Llama 2 and 3 (arXiv 2302.13971, 2407.21783), and what differs from them in its config.json alone.

That is Mistral (arXiv 2310.06825), which has a window; Phi-3 and Phi-4-mini (arXiv 2404.14219, 2503.01743), which
rotate parts of heads, and have their projections fused in the checkpoint as they are here; and SmolLM3 (Hugging Face,
2025), some of whose layers do not rotate.
"""

from nanovllm.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3ForCausalLM


class LlamaAttention(Qwen3Attention):
    """Query and key heads are not normalised; config.json says whether the projections have biases."""

    has_qk_norm = False


class LlamaDecoderLayer(Qwen3DecoderLayer):
    """Qwen3's with Llama's attention."""

    attention_class = LlamaAttention


class LlamaForCausalLM(Qwen3ForCausalLM):
    """The decoder of Qwen3 with Llama's layers."""

    layer_class = LlamaDecoderLayer
