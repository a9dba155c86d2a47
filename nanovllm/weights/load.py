"""All weights of a rank's model: made by their schemes, filled from a checkpoint, brought to the kernels' form."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from nanovllm.checkpoint.kv_scales import set_kv_scales
from nanovllm.checkpoint.loader import fill_dummy, load_model, model_tensors
from nanovllm.config import FP8, Config
from nanovllm.kernels.e4m3 import check_e4m3
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.quantization import schemes_of
from nanovllm.weights.schemes import Plain, Scheme, Weighted


def load_weights(model: nn.Module, config: Config, tp: TensorParallel) -> None:
    """Makes and fills the weights of a model, and sets the scales of its KV cache.

    Raises:
        ValueError: the checkpoint, or how it is quantised, does not fit the model, the ranks or the device.
    """
    if config.kv_cache_dtype == FP8:
        check_e4m3(f"kv_cache_dtype={FP8!r}", tp.device)
    create_weights(model, schemes_of(model, config.quantization_method))
    if config.load_format == "dummy":
        fill_dummy(model, config.seed)
    else:
        load_model(model, config.model, tp.check)
        if config.kv_cache_dtype == FP8:
            set_kv_scales(model, model_tensors(model, config.model))
    finish_weights(model)


def create_weights(model: nn.Module, scheme_of: Callable[[str], Scheme | None]) -> None:
    """Gives the layers of a model the parameters of their schemes, by their names; None: they are plain."""
    for name, layer in model.named_modules():
        if isinstance(layer, Weighted):
            layer.scheme = scheme_of(name) or Plain()
            with _named(name):
                layer.create_weights()


def finish_weights(model: nn.Module) -> None:
    """Brings all loaded weights to the form that the kernels take."""
    for name, layer in model.named_modules():
        if isinstance(layer, Weighted):
            with _named(name):
                layer.finish_weights()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts the name of a layer, which schemes do not know, before what a ValueError says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
