"""The supported models: Qwen3 whole in qwen3.py, which is to be read first; the others say what they do otherwise."""

from nanovllm.models.families import ARCHITECTURES, model_class

__all__ = ["ARCHITECTURES", "model_class"]
