"""What "auto" stands for on this machine, and whether what was asked for can be had.

The functions give the values of options, and raise ValueError, naming the option, its value and what it needs.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from nanovllm.checkpoint.gguf.files import is_gguf
from nanovllm.kernels.cpu_products import multiplies_bfloat16
from nanovllm.quantization import Method, read_method
from nanovllm.quantization.gguf import Gguf

if TYPE_CHECKING:
    from nanovllm.config import Config

DTYPES = ("float32", "bfloat16", "float16")
FP8 = "fp8_e4m3"
AS_ASKED_FOR = "as asked for"


def choose_device(config: Config) -> str:
    """The kind of device; of CUDA, there must be one for each rank."""
    num_gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    device = ("cuda" if num_gpus else "cpu") if config.device == "auto" else config.device
    if device == "cuda" and config.num_ranks > num_gpus:
        if config.num_ranks == 1:
            raise ValueError("device='cuda' needs a CUDA device, torch finds none; 'auto' takes the CPU then")
        sizes = f"tensor_parallel_size={config.tensor_parallel_size}"
        if config.pipeline_parallel_size > 1:
            sizes += f" times pipeline_parallel_size={config.pipeline_parallel_size}"
        raise ValueError(f"{sizes} needs as many CUDA devices, there are {num_gpus}")
    return device


def check_heads(config: Config) -> None:
    """Raises unless the heads of the model can be divided among the ranks."""
    size = config.tensor_parallel_size
    heads, kv_heads = config.model_config.num_attention_heads, config.model_config.num_key_value_heads
    if heads % size:
        raise ValueError(f"tensor_parallel_size={size} must divide num_attention_heads={heads}")
    if kv_heads % size and size % kv_heads:
        raise ValueError(f"tensor_parallel_size={size} must divide num_key_value_heads={kv_heads}, or be a multiple")


def check_stages(config: Config) -> None:
    """Raises unless each stage has a layer, and what is asked for can be done in stages."""
    size, num_layers = config.pipeline_parallel_size, config.model_config.num_hidden_layers
    if size > num_layers:
        raise ValueError(f"pipeline_parallel_size must be at most num_hidden_layers={num_layers}, got {size}")
    if size > 1 and config.speculation is not None:
        raise ValueError(f"speculative_config is not supported with pipeline_parallel_size={size}")


def choose_quantization(config: Config) -> tuple[str | None, Method | None]:
    """The method by which weights are stored, or are to be, and its name."""
    if config.quantization == "gguf" and not is_gguf(config.model):
        raise ValueError(f"quantization='gguf' contradicts model={config.model!r}, which is no GGUF file")
    if config.quantization == "gguf" and config.device == "cpu":
        return config.quantization, Gguf(config.model)
    if config.quantization == "int4" and config.device != "cpu":
        raise ValueError(f"quantization='int4' rounds weights for device='cpu' only, got {config.device!r}")
    asked = None if config.quantization == "gguf" else config.quantization
    stored, path = config.model_config.quantization_config, config.config_folder
    path = path if is_gguf(path) else f"{path}/config.json"
    method = read_method(asked, stored, path)
    return stored.get("quant_method", asked), method


def choose_dtype(config: Config) -> tuple[str, str]:
    """The dtype of the computation, and why it is that one."""
    if config.dtype != "auto":
        return config.dtype, AS_ASKED_FOR
    stored = config.model_config.dtype
    if stored not in DTYPES:
        raise ValueError(f"the checkpoint's dtype {stored!r} is not supported, choose one of {DTYPES}")
    if config.device == "cuda" and stored == "float32":
        return "bfloat16", f"half the bytes of the checkpoint's {stored}, which dtype={stored!r} keeps"
    if config.device == "cuda" or stored == "float32":
        return stored, "the checkpoint's"
    if stored == "bfloat16" and multiplies_bfloat16():
        return stored, f"this CPU multiplies {stored}"
    return "float32", f"this CPU has no fast products of {stored}"


def choose_attention(config: Config) -> tuple[str, str]:
    """The backend of attention, and why it is that one."""
    is_flash = config.attention_backend == "flash_attn"
    block_size, head_dim = config.kvcache_block_size, config.model_config.head_dim
    obstacles = {
        "dtype float16 or bfloat16, got float32": is_flash and config.dtype == "float32",
        f"kvcache_block_size to be a multiple of 256, got {block_size}": is_flash and block_size % 256 > 0,
        f"head_dim to be a multiple of 8, got {head_dim}": is_flash and head_dim % 8 > 0,
    }
    return _choose_backend("attention_backend", config, obstacles)


def choose_sampler(config: Config) -> str:
    """The backend of sampling."""
    return _choose_backend("sampler_backend", config, {})[0]


def choose_kv_cache_dtype(config: Config) -> str:
    """The dtype of the KV cache: that of the computation, or FP8."""
    option = f"kv_cache_dtype={config.kv_cache_dtype!r}"
    if config.kv_cache_dtype in ("fp8", FP8):
        if config.attention_backend != "triton":
            raise ValueError(
                f"{option} needs attention_backend='triton', it is {config.attention_backend!r}: "
                f"{config.attention_reason}"
            )
        return FP8
    if config.kv_cache_dtype not in ("auto", config.dtype):
        raise ValueError(f"{option} must be 'auto', 'fp8' or the dtype of the computation, {config.dtype!r}")
    return config.dtype


def _choose_backend(option: str, config: Config, own_obstacles: dict[str, bool]) -> tuple[str, str]:
    """The backend and the reason; of "auto", it is Triton or, if there is an obstacle, torch."""
    choice = getattr(config, option)
    backend = "triton" if choice == "auto" else choice
    obstacles = {
        f"device='cuda', got {config.device!r}": backend != "torch" and config.device != "cuda",
        f"the package {backend}, which is not installed": importlib.util.find_spec(backend) is None,
        **own_obstacles,
    }
    obstacle = next((text for text, is_there in obstacles.items() if is_there), None)
    if choice != "auto" and obstacle:
        raise ValueError(f"{option}={backend!r} needs {obstacle}")
    if choice != "auto":
        return backend, AS_ASKED_FOR
    return ("torch", f"{backend} needs {obstacle}") if obstacle else (backend, "the fastest measured on an H200")
