"""Engine options that may be spelled in several ways, brought to one. Nothing here knows their limits."""

from __future__ import annotations

import sys
from types import NoneType
from typing import TYPE_CHECKING

import torch

from nanovllm.options.checks import field_kinds

if TYPE_CHECKING:
    from nanovllm.config import Config

OTHER_DTYPES = {"half": "float16", "float": "float32"}


def spell_alike(config: Config) -> None:
    """Replaces what says the same as something else; where None is no value of its own, it is the default.

    Raises:
        TypeError: a quantization that is not given by its name.
    """
    config.lowers_max_model_len = config.max_model_len in (None, -1, "auto")
    if config.lowers_max_model_len:
        config.max_model_len = sys.maxsize  # until the model's positions cap it
    if config.generation_config is None:
        config.generation_config = "vllm"
    if not isinstance(config.quantization, str | None):
        raise TypeError(f"quantization must be the name of a method, got {config.quantization!r}")
    if isinstance(config.dtype, torch.dtype):
        config.dtype = str(config.dtype).removeprefix("torch.")
    if isinstance(config.dtype, str):
        config.dtype = OTHER_DTYPES.get(config.dtype, config.dtype)
    for name, kinds in field_kinds(type(config)).items():
        if getattr(config, name) is None and NoneType in kinds:
            setattr(config, name, getattr(type(config), name))
