"""The supported model families by the name that a checkpoint's config.json gives in `architectures`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", "LlamaForCausalLM"),
    "MistralForCausalLM": ("llama", "LlamaForCausalLM"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3ForCausalLM"),
}


def model_class(architecture: str) -> type[nn.Module]:
    """The class of an architecture.

    Raises:
        ValueError: an unknown architecture; the message lists the known.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not supported, only {', '.join(ARCHITECTURES)}")
    module, name = ARCHITECTURES[architecture]
    return getattr(import_module(f"nanovllm.models.{module}"), name)
