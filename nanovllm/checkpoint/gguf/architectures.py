"""What the supported architectures of GGUF files differ in, in a table."""

from dataclasses import dataclass

from nanovllm.checkpoint.gguf.header import Header


@dataclass(frozen=True)
class Architecture:
    """What `general.architecture` stands for.

    Attributes:
        hf_name: the class of transformers.
        permutes: whether a head's rows of the queries' and keys' projections are those of (x, y) pairs that rotate
            together, one pair after the other. In Hugging Face's checkpoints all x come first, then all y.
        adds_one: whether 1 was added to the norms' weights.
        is_fused: whether q, k and v are one tensor, and gate and up.
    """

    hf_name: str
    permutes: bool = False
    adds_one: bool = False
    is_fused: bool = False


ARCHITECTURES = {
    "gemma2": Architecture("Gemma2ForCausalLM", adds_one=True),
    "gemma3": Architecture("Gemma3ForCausalLM", adds_one=True),
    "granite": Architecture("GraniteForCausalLM", permutes=True),
    "llama": Architecture("LlamaForCausalLM", permutes=True),  # Mistral and Mixtral too
    "phi3": Architecture("Phi3ForCausalLM", is_fused=True),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen2moe": Architecture("Qwen2MoeForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM"),
    "smollm3": Architecture("SmolLM3ForCausalLM", permutes=True),
}


def architecture_of(header: Header) -> tuple[str, Architecture]:
    """The name of a file's architecture, and what is particular to it.

    Raises:
        ValueError: it is not one of ARCHITECTURES.
    """
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"general.architecture={name!r} is not supported, only {known} ({header.path})")
    return name, ARCHITECTURES[name]
