"""Mixtral (arXiv 2401.04088): Mistral with a mixture of experts in each layer."""

from nanovllm.models.llama import LlamaAttention
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.models.qwen3_moe import Qwen3MoeDecoderLayer


class MixtralDecoderLayer(Qwen3MoeDecoderLayer):
    """Mistral's attention before the experts."""

    attention_class = LlamaAttention


class MixtralForCausalLM(Qwen3ForCausalLM):
    """The decoder of Qwen3 with Mixtral's layers."""

    layer_class = MixtralDecoderLayer
    checkpoint_layouts = (
        {".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."},
    )
