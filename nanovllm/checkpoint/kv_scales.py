"""The scales of an FP8 KV cache, as checkpoints have them: one number of a layer for its keys, one for its values.

A stored number times the scale is the key's or value's. Layers without scales keep 1, with which FP8 holds numbers up
to 448. Every rank has all scales: they are of whole layers. This file knows nothing of how the cache is computed with.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

# What a layer's attention is called, and what follows: as vLLM, llm-compressor, ModelOpt and older quantisers have it.
# A layer that has a scale by several names has the first one's.
KEY_SCALES = ("k_scale", "attn.k_scale", "k_proj.k_scale", "k_proj.output_scale")
VALUE_SCALES = ("v_scale", "attn.v_scale", "v_proj.v_scale", "v_proj.output_scale")
SCALES = tuple(f".self_attn.{name}" for name in (*KEY_SCALES, *VALUE_SCALES))
NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)")
NAME = re.compile(NUMBER.pattern + r"\.self_attn\.(.+)")


def set_kv_scales(model: nn.Module, found: Mapping[str, Any]) -> None:
    """Sets the `k_scale` and `v_scale` of the model's attention layers to those among a checkpoint's tensors.

    Args:
        model: whose attention layers have numbers in their names.
        found: `model_tensors` of the checkpoint.

    Raises:
        ValueError: a scale that is not one number, finite and more than 0; named, with its value.
    """
    of_layers: dict[str, dict[str, str]] = defaultdict(dict)  # by the layer's number, the rest of the name -> the name
    for name in found:
        match = NAME.search(name)
        if match:
            of_layers[match[1]][match[2]] = name
    for path, layer in model.named_modules():
        if not hasattr(layer, "k_scale"):
            continue
        names = of_layers[NUMBER.search(path)[1]]
        for attribute, spellings in (("k_scale", KEY_SCALES), ("v_scale", VALUE_SCALES)):
            name = next((names[spelling] for spelling in spellings if spelling in names), None)
            if name is not None:
                setattr(layer, attribute, read_scale(name, found[name]))


def read_scale(name: str, tensor: Any) -> float:
    """The one number of a tensor of a file, of shape [] or [1].

    Raises:
        ValueError: it has another shape, or the number is not finite and more than 0.
    """
    if math.prod(tensor.get_shape()) != 1:
        raise ValueError(
            f"tensor {name!r} must be one number, a scale of the KV cache, got shape {tensor.get_shape()}"
        )
    scale = float(tensor[...])
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"tensor {name!r} must be a scale of the KV cache, finite and more than 0, got {scale}")
    return scale
