"""Gemma 3 (arXiv 2503.19786), and of the models that take images too the part that computes text."""

from nanovllm.models.gemma2 import Gemma2DecoderLayer, Gemma2ForCausalLM, Gemma2RMSNorm
from nanovllm.models.qwen3 import Qwen3Attention


class Gemma3Attention(Qwen3Attention):
    """Query and key heads are normalised, with Gemma's norm."""

    norm_class = Gemma2RMSNorm


class Gemma3DecoderLayer(Gemma2DecoderLayer):
    """Gemma 2's with Gemma 3's attention; layers with a window have a rotary embedding of their own."""

    attention_class = Gemma3Attention


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """The decoder of Gemma 2 with Gemma 3's layers."""

    layer_class = Gemma3DecoderLayer


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """Without what sees images: its tensors are passed over. Layouts: of transformers before 5, and since."""

    checkpoint_layouts = (
        {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        {"model.": "model.language_model."},
    )
    ignored_tensors = tuple(
        f"{prefix}{module}." for prefix in ("", "model.") for module in ("vision_tower", "multi_modal_projector")
    )
