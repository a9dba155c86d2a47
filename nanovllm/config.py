"""Every engine option and every fact of the model's config.json, read and validated in one place."""

import difflib
import importlib.util
import json
import math
import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from nanovllm.sampling_params import check

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LIMITS = {"num_kvcache_blocks": (-1,), "seed": (0, 2**63 - 1),  # lowest, highest
    "max_num_batched_tokens": (1,), "max_num_seqs": (1,), "max_model_len": (2,), "gpu_memory_utilization": (0, 1),
    "tensor_parallel_size": (1,), "kvcache_block_size": (16,)}  # fmt: skip


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file without its nulls, {} where there is no such file."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return {name: value for name, value in json.load(file).items() if value is not None}


def resolve_model_path(model: str, weights: bool) -> str:
    """The local folder of `model`: itself, or the hub's snapshot (only its small files unless `weights`)."""
    if not isinstance(model, (str, os.PathLike)) or not str(model):
        raise TypeError(f"model must be a folder or a hub name, got {model!r}")
    if os.path.isdir(model):
        return os.path.abspath(model)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.jinja", "*.model"] + ["*.safetensors"] * weights
    try:
        return snapshot_download(str(model), allow_patterns=patterns)
    except Exception as error:
        raise ValueError(f"model={str(model)!r} is neither a folder nor a model the hub gives: {error}") from error


@dataclass(frozen=True)
class ModelConfig:
    """The facts of a checkpoint's config.json that the supported families need, under its names where it has them.

    Read as plain JSON rather than through transformers, whose import alone takes longer than starting an engine.
    Both spellings of the rotary options are understood: `rope_theta` + `rope_scaling`, and `rope_parameters`.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any]
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str
    eos_token_ids: frozenset[int]

    @classmethod
    def from_folder(cls, folder: str) -> "ModelConfig":
        """Reads config.json and the EOS ids of generation_config.json.

        Raises:
            ValueError: no config.json, a key is missing, or the model needs what no layer here does.
        """
        raw, generation = (read_json(os.path.join(folder, f"{name}.json")) for name in ("config", "generation_config"))
        if not raw:
            raise ValueError(f"model={folder!r} has no config.json")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        sliding = (raw.get("use_sliding_window", True) and raw.get("sliding_window")) or math.inf
        eos = [source.get("eos_token_id", []) for source in (raw, generation)]
        try:
            heads = raw["num_attention_heads"]
            facts = {
                **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), False),
                **raw,
                "architecture": raw["architectures"][0],
                "num_key_value_heads": raw.get("num_key_value_heads") or heads,
                "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
                "rope_theta": float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
                "rope_scaling": rope if rope_type == "llama3" else {},
                "dtype": raw.get("dtype") or raw.get("torch_dtype") or "float32",
                "eos_token_ids": frozenset(i for ids in eos for i in (ids if isinstance(ids, list) else [ids])),
            }
            config = cls(**{fact.name: facts[fact.name] for fact in fields(cls)})
        except KeyError as error:
            raise ValueError(f"{folder}/config.json has no {error}") from error
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        problems = {
            f"rope type {rope_type!r}": rope_type not in ("default", "llama3"),
            f"sliding_window={sliding}": sliding < config.max_position_embeddings,
            f"hidden_act={raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
            "quantization_config": raw.get("quantization_config"),
            f"num_key_value_heads={kv_heads}, no divisor of num_attention_heads={heads},": heads % kv_heads,
            f"head_dim odd or above 256, here {head_dim},": head_dim % 2 or head_dim > 256,
        }
        if problem := next((text for text, is_there in problems.items() if is_there), None):
            raise ValueError(f"{problem} is not supported ({folder}/config.json)")
        return config


@dataclass
class Config:
    """The engine's options; what is "auto" when given is resolved when constructed.

    Attributes:
        model: a Hugging Face folder or hub name (HF_HUB_OFFLINE is honoured).
        max_num_batched_tokens: most tokens a step computes, decodes and prompt chunks together.
        max_num_seqs: most sequences that run at once.
        max_model_len: most tokens of a request, prompt and output; capped by the model's positions.
        gpu_memory_utilization: share of the GPU's memory the engine may take.
        tensor_parallel_size: ranks, each a process with a device of its own (on CPU: a process).
        enforce_eager: run decode steps without CUDA graphs.
        kvcache_block_size: tokens of a block of the KV cache, a power of two of at least 16.
        num_kvcache_blocks: blocks of the KV cache, -1: as many as memory allows.
        dtype: "auto" (the checkpoint's; float32 for half types on a CPU without fast bf16), or one of Dtype's.
        device: "auto" (cuda where there is one), "cuda" or "cpu".
        attention_backend: "auto", "triton", "flash_attn" or "torch".
        enable_prefix_caching: share the KV of equal prefixes between requests.
        async_scheduling: prepare and launch a step before the tokens of the last one are seen.
        load_format: "auto" reads safetensors, "dummy" draws random weights and needs no file but config.json.
        seed: of the draws of requests that bring no seed, and of dummy weights.

    Raises:
        TypeError, ValueError: naming the option, its value and its limit.
    """

    model: str
    max_num_batched_tokens: int = 16384
    max_num_seqs: int = 512
    max_model_len: int = 4096
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    kvcache_block_size: int = 256
    num_kvcache_blocks: int = -1
    dtype: Dtype = "auto"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    attention_backend: Literal["auto", "flash_attn", "triton", "torch"] = "auto"
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    load_format: Literal["auto", "dummy"] = "auto"
    seed: int = 0
    model_config: ModelConfig = field(init=False)
    attention_reason: str = field(init=False, default="as asked for")

    @classmethod
    def create(cls, model: str, options: dict[str, Any]) -> "Config":
        """A Config from keyword options; an unknown one is a TypeError that names the nearest known one."""
        known = [option.name for option in fields(cls) if option.init]
        for name in sorted(options.keys() - known):
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise TypeError(f"unknown option {name!r}; did you mean {nearest!r}?")
        return cls(model, **options)

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Config).items():
            value = getattr(self, name, None)
            if kind in (bool, int, float):
                check(name, value, kind, *LIMITS.get(name, ()))
            elif get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
            if name in ("gpu_memory_utilization", "num_kvcache_blocks") and value == 0:
                raise ValueError(f"{name} must not be 0")
        if self.kvcache_block_size & (self.kvcache_block_size - 1):
            raise ValueError(f"kvcache_block_size must be a power of two, got {self.kvcache_block_size}")
        size, num_gpus = self.tensor_parallel_size, torch.cuda.device_count() if self.device != "cpu" else 0
        if self.device == "auto":
            self.device = "cuda" if num_gpus else "cpu"
        if self.device == "cuda" and size > num_gpus:
            raise ValueError(f"tensor_parallel_size={size} needs as many CUDA devices, there are {num_gpus}")
        self.model = resolve_model_path(self.model, weights=self.load_format == "auto")
        self.model_config = ModelConfig.from_folder(self.model)
        self.max_model_len = min(self.max_model_len, self.model_config.max_position_embeddings)
        for name in ("num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size"):
            if (value := getattr(self.model_config, name)) % size:
                raise ValueError(f"tensor_parallel_size={size} must divide {name}={value}")
        if self.dtype == "auto":
            self.dtype, dtypes = self.model_config.dtype, get_args(Dtype)[1:]  # all but "auto"
            if self.dtype not in dtypes:
                raise ValueError(f"the checkpoint's dtype {self.dtype!r} is not supported, choose one of {dtypes}")
            if self.device == "cpu" and not (self.dtype == "bfloat16" and torch.cpu._is_amx_tile_supported()):
                self.dtype = "float32"
        self._resolve_attention_backend()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The resolved `dtype` as torch knows it."""
        return getattr(torch, self.dtype)

    @property
    def max_blocks_per_seq(self) -> int:
        """Blocks that a sequence of max_model_len tokens takes."""
        return -(-self.max_model_len // self.kvcache_block_size)

    def _resolve_attention_backend(self) -> None:
        backend = "triton" if self.attention_backend == "auto" else self.attention_backend
        is_flash = backend == "flash_attn"
        block_size, head_dim = self.kvcache_block_size, self.model_config.head_dim
        obstacles = {
            f"device='cuda', got {self.device!r}": backend != "torch" and self.device != "cuda",
            f"the package {backend}, which is not installed": importlib.util.find_spec(backend) is None,
            "dtype float16 or bfloat16, got float32": is_flash and self.dtype == "float32",
            f"kvcache_block_size to be a multiple of 256, got {block_size}": is_flash and block_size % 256,
            f"head_dim to be a multiple of 8, got {head_dim}": is_flash and head_dim % 8,
        }
        obstacle = next((text for text, is_there in obstacles.items() if is_there), None)
        if self.attention_backend == "auto":
            self.attention_backend = "torch" if obstacle else backend
            self.attention_reason = f"{backend} needs {obstacle}" if obstacle else "the fastest measured on an H200"
        elif obstacle:
            raise ValueError(f"attention_backend={backend!r} needs {obstacle}")
