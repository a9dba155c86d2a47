"""The supported model families by the name that a checkpoint's config.json gives in `architectures`."""

from nanovllm.models.gemma2 import Gemma2ForCausalLM
from nanovllm.models.gemma3 import Gemma3ForCausalLM, Gemma3ForConditionalGeneration
from nanovllm.models.granite import GraniteForCausalLM
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.mixtral import MixtralForCausalLM
from nanovllm.models.olmo2 import Olmo2ForCausalLM
from nanovllm.models.qwen2 import Qwen2ForCausalLM
from nanovllm.models.qwen2_moe import Qwen2MoeForCausalLM
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.models.qwen3_moe import Qwen3MoeForCausalLM

ARCHITECTURES: dict[str, type[Qwen3ForCausalLM]] = {
    "Gemma2ForCausalLM": Gemma2ForCausalLM,
    "Gemma3ForCausalLM": Gemma3ForCausalLM,
    "Gemma3ForConditionalGeneration": Gemma3ForConditionalGeneration,
    "GraniteForCausalLM": GraniteForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": LlamaForCausalLM,
    "MixtralForCausalLM": MixtralForCausalLM,
    "Olmo2ForCausalLM": Olmo2ForCausalLM,
    "Phi3ForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen2MoeForCausalLM": Qwen2MoeForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
    "SmolLM3ForCausalLM": LlamaForCausalLM,
}


def model_class(architecture: str) -> type[Qwen3ForCausalLM]:
    """The class of an architecture that `ModelConfig`, which refuses all others, has read."""
    return ARCHITECTURES[architecture]
