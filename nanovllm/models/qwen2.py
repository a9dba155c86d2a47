"""Qwen2 and Qwen2.5 (arXiv 2407.10671)."""

from nanovllm.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3ForCausalLM


class Qwen2Attention(Qwen3Attention):
    """Query and key heads are not normalised; their projections and the values' have biases, the output's has none."""

    has_qk_norm = False
    has_qkv_bias = True


class Qwen2DecoderLayer(Qwen3DecoderLayer):
    """Qwen3's with Qwen2's attention."""

    attention_class = Qwen2Attention


class Qwen2ForCausalLM(Qwen3ForCausalLM):
    """The decoder of Qwen3 with Qwen2's layers."""

    layer_class = Qwen2DecoderLayer
