"""The supported model families by the name that a checkpoint's config.json gives in `architectures`."""

from nanovllm.layers.decoder import CausalLM
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.qwen2 import Qwen2ForCausalLM
from nanovllm.models.qwen3 import Qwen3ForCausalLM

FAMILIES: tuple[type[CausalLM], ...] = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
ARCHITECTURES = {family.__name__: family for family in FAMILIES} | {"MistralForCausalLM": LlamaForCausalLM}


def model_class(architecture: str) -> type[CausalLM]:
    """The class of an architecture that `ModelConfig`, which refuses all others, has read."""
    return ARCHITECTURES[architecture]
