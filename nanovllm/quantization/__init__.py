"""Weights in few bits: what a checkpoint's quantization_config, or the option `quantization`, says of each layer.

A method (a file of this folder) reads the configuration of one kind of checkpoint, and says by which scheme a layer's
weight is stored. Without this folder there would be plain weights only: layers know `Scheme`s, and kernels
`QuantizedWeight`s, wherever they come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from nanovllm.checkpoint.facts import JsonFacts
from nanovllm.checkpoint.loader import spellings_of
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.quantization.awq import Awq
from nanovllm.quantization.compressed_tensors import CompressedTensors
from nanovllm.quantization.fp8 import Fp8
from nanovllm.quantization.gptq import Gptq
from nanovllm.quantization.online import ONLINE_METHODS

if TYPE_CHECKING:  # layers are made of options, which are read here
    from nanovllm.config import Config
    from nanovllm.weights.schemes import Scheme


class Method(Protocol):
    """A kind of quantised checkpoint."""

    def __init__(self, facts: JsonFacts) -> None:
        """Reads quantization_config, an object of config.json; raises ValueError by key and value."""

    def scheme_of(self, names: list[str]) -> Scheme | None:
        """The scheme of a matrix that checkpoints call by one of these names; None: it is plain.

        Such as "model.layers.0.mlp.up_proj", or "model.layers.0.mlp.gate_up_proj" where it is a part of that.
        """


METHODS: dict[str, type[Method]] = {"fp8": Fp8, "awq": Awq, "gptq": Gptq, "compressed-tensors": CompressedTensors}
OTHER_NAMES = {"awq_marlin": "awq", "gptq_marlin": "gptq"}  # vLLM's, of kernels that it computes with


def read_method(option: str | None, quantization_config: dict[str, Any] | None, path: str) -> Method | None:
    """The method of a checkpoint, which the option `quantization` may name, or may give one that is plain.

    Raises:
        ValueError: an unknown method, one that contradicts the checkpoint, or a configuration that is not supported.
    """
    if not quantization_config:
        if option is None:
            return None
        if option not in ONLINE_METHODS:
            known = f"only {', '.join(ONLINE_METHODS)} can be made of a checkpoint without quantization_config"
            raise ValueError(f"quantization={option!r}: {known} ({path})")
        return ONLINE_METHODS[option]
    facts = JsonFacts(f"quantization_config of {path}", quantization_config)
    name = quantization_config.get("quant_method")
    if name not in METHODS:
        raise facts.error(f"quant_method={name!r} is not supported, only {', '.join(METHODS)}")
    if OTHER_NAMES.get(option, option) not in (None, name):
        raise ValueError(f"quantization={option!r} contradicts quant_method={name!r} of {path}")
    return METHODS[name](facts)


def describe_weights(model: nn.Module, config: Config) -> str:
    """How a model's weights are stored, in words; "" if they are plain."""
    if config.quantization is None:
        return ""
    values = [value for module in model.modules() for value in vars(module).values()]
    weights = [value for value in values if isinstance(value, QuantizedWeight)]
    if all(weight.is_readable for weight in weights):
        return config.quantization
    return (
        f"{config.quantization} (e4m3 is not computed with before compute capability 8.9: weights are read in 8 bits "
        f"and multiplied in {config.dtype})"
    )


def schemes_of(model: nn.Module, method: Method | None) -> Callable[[str], Scheme | None]:
    """A function from the name of a layer of the model, which may fuse several matrices, to its scheme; None: plain.

    It raises ValueError where matrices of one layer are stored by different schemes.
    """

    def scheme_of(name: str) -> Scheme | None:
        if method is None:
            return None
        *before, module = name.split(".")
        sources = model.packed_modules_mapping.get(module, (module,))
        schemes = {}
        for source in sources:  # a checkpoint may have it in the layer's one matrix
            names = dict.fromkeys([".".join([*before, source]), name])
            schemes[source] = method.scheme_of([each for one in names for each in module_spellings(model, one)])
        first = next(iter(schemes.values()))
        for source, scheme in schemes.items():
            if scheme != first:
                raise ValueError(f"{name} must be quantised as a whole: {source} is by {scheme}, others by {first}")
        return first

    return scheme_of


def module_spellings(model: nn.Module, name: str) -> list[str]:
    """What checkpoints call one of the model's modules."""
    return [spelling.removesuffix(".") for spelling in spellings_of(model, f"{name}.")]
