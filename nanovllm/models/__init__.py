"""The supported model families by the name that a checkpoint's config.json gives in `architectures`."""

from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.qwen2 import Qwen2ForCausalLM
from nanovllm.models.qwen3 import Qwen3ForCausalLM

ARCHITECTURES: dict[str, type[Qwen3ForCausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def model_class(architecture: str) -> type[Qwen3ForCausalLM]:
    """The class of an architecture that `ModelConfig`, which refuses all others, has read."""
    return ARCHITECTURES[architecture]
