"""Every engine option and every fact of the model's config.json, read and validated in one place."""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
import os
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

from nanovllm.sampling_params import check_float, check_int

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOWEST = {"max_num_batched_tokens": 1, "max_num_seqs": 1, "max_model_len": 2, "tensor_parallel_size": 1}
CHOICES = {
    "dtype": ("auto", *DTYPES),
    "device": ("auto", "cuda", "cpu"),
    "attention_backend": ("auto", "flash_attn", "triton", "torch"),
    "load_format": ("auto", "dummy"),
}


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no such file."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


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
    """The facts of a checkpoint's config.json that the supported families need.

    Read as plain JSON rather than through transformers, whose import alone takes longer than starting an engine.
    Both spellings of the rotary options are understood: `rope_theta` + `rope_scaling`, and `rope_parameters`.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: dict[str, Any]
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str
    eos_token_ids: frozenset[int]

    REQUIRED: ClassVar = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("max_position_embeddings", "rms_norm_eps"),
    )

    @classmethod
    def from_folder(cls, folder: str) -> ModelConfig:
        """Reads config.json and the EOS ids of generation_config.json.

        Raises:
            ValueError: no config.json, a key is missing, or the model needs what no layer here does.
        """
        raw = read_json(os.path.join(folder, "config.json"))
        generation = read_json(os.path.join(folder, "generation_config.json"))
        if not raw:
            raise ValueError(f"model={folder!r} has no config.json")
        for name in (*cls.REQUIRED, "architectures"):
            if raw.get(name) is None:
                raise ValueError(f"{folder}/config.json has no {name!r}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        sliding = (raw.get("use_sliding_window", True) and raw.get("sliding_window")) or math.inf
        head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        for problem, is_there in (
            (f"rope type {rope_type!r}", rope_type not in ("default", "llama3")),
            (f"sliding_window={sliding}", sliding < raw["max_position_embeddings"]),
            (f"hidden_act={raw.get('hidden_act')!r}", raw.get("hidden_act", "silu") != "silu"),
            ("quantization_config", bool(raw.get("quantization_config"))),
            (f"head_dim odd or above 256, here {head_dim},", head_dim % 2 or head_dim > 256),
        ):
            if is_there:
                raise ValueError(f"{problem} is not supported ({folder}/config.json)")
        eos_token_ids: set[int] = set()
        for ids in (raw.get("eos_token_id"), generation.get("eos_token_id")):
            if ids is not None:
                eos_token_ids.update(ids if isinstance(ids, list) else [ids])
        return cls(
            **{name: raw[name] for name in cls.REQUIRED},
            architecture=raw["architectures"][0],
            num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=head_dim,
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
            rope_scaling=rope if rope_type == "llama3" else {},
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
            eos_token_ids=frozenset(eos_token_ids),
        )


@dataclass(frozen=True)
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
        dtype: "auto" (the checkpoint's; float32 for half types on a CPU without fast bf16), or one of DTYPES.
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
    dtype: str = "auto"
    device: str = "auto"
    attention_backend: str = "auto"
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    load_format: str = "auto"
    seed: int = 0
    model_config: ModelConfig = field(init=False)
    attention_reason: str = field(init=False, default="as asked for")

    @classmethod
    def create(cls, model: str, options: dict[str, Any]) -> Config:
        """A Config from keyword options; an unknown one is a TypeError that names the nearest known one."""
        known = [option.name for option in fields(cls) if option.init and option.name != "model"]
        for name in options:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise TypeError(f"unknown option {name!r}; did you mean {nearest!r}?")
        return cls(model, **options)

    def __post_init__(self) -> None:
        for name, low in LOWEST.items():
            check_int(name, getattr(self, name), low)
        check_int("seed", self.seed, 0, 2**63 - 1)
        check_int("kvcache_block_size", self.kvcache_block_size, 16)
        if self.num_kvcache_blocks != -1:
            check_int("num_kvcache_blocks", self.num_kvcache_blocks, 1)
        if self.kvcache_block_size & (self.kvcache_block_size - 1):
            raise ValueError(f"kvcache_block_size must be a power of two, got {self.kvcache_block_size}")
        check_float("gpu_memory_utilization", self.gpu_memory_utilization, 0.0, 1.0)
        if self.gpu_memory_utilization == 0:
            raise ValueError("gpu_memory_utilization must be greater than 0, got 0")
        for name in ("enforce_eager", "enable_prefix_caching", "async_scheduling"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        self._resolve_device()
        self._set("model", resolve_model_path(self.model, weights=self.load_format == "auto"))
        self._set("model_config", ModelConfig.from_folder(self.model))
        self._set("max_model_len", min(self.max_model_len, self.model_config.max_position_embeddings))
        self._check_divisible()
        self._resolve_dtype()
        self._resolve_attention_backend()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The resolved `dtype` as torch knows it."""
        return DTYPES[self.dtype]

    @property
    def max_blocks_per_seq(self) -> int:
        """Blocks that a sequence of max_model_len tokens takes."""
        return -(-self.max_model_len // self.kvcache_block_size)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _resolve_device(self) -> None:
        num_gpus = torch.cuda.device_count() if self.device != "cpu" else 0
        if self.device == "auto":
            self._set("device", "cuda" if num_gpus else "cpu")
        size = self.tensor_parallel_size
        if self.device == "cuda" and size > num_gpus:
            raise ValueError(f"tensor_parallel_size={size} needs as many CUDA devices, there are {num_gpus}")

    def _check_divisible(self) -> None:
        model, size = self.model_config, self.tensor_parallel_size
        for name in ("num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size"):
            if getattr(model, name) % size:
                raise ValueError(f"tensor_parallel_size={size} must divide {name}={getattr(model, name)}")
        heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads={kv_heads} must divide num_attention_heads={heads}")

    def _resolve_dtype(self) -> None:
        if self.dtype != "auto":
            return
        dtype = self.model_config.dtype
        if dtype not in DTYPES:
            raise ValueError(f"the checkpoint's dtype {dtype!r} is not supported, choose one of {', '.join(DTYPES)}")
        if self.device == "cpu" and not (dtype == "bfloat16" and torch.cpu._is_amx_tile_supported()):
            dtype = "float32"
        self._set("dtype", dtype)

    def _resolve_attention_backend(self) -> None:
        if self.attention_backend != "auto":
            obstacle = self._backend_obstacle(self.attention_backend)
            if obstacle:
                raise ValueError(f"attention_backend={self.attention_backend!r} needs {obstacle}")
            return
        obstacle = self._backend_obstacle("triton")
        self._set("attention_backend", "torch" if obstacle else "triton")
        self._set("attention_reason", f"triton needs {obstacle}" if obstacle else "the fastest measured on an H200")

    def _backend_obstacle(self, backend: str) -> str | None:
        """What a backend needs that is not there, None if it can be used."""
        if backend == "torch":
            return None
        if self.device != "cuda":
            return f"device='cuda', got {self.device!r}"
        if importlib.util.find_spec(backend) is None:
            return f"the package {backend}, which is not installed"
        if backend == "flash_attn":
            if self.dtype == "float32":
                return "dtype float16 or bfloat16, got float32"
            if self.kvcache_block_size % 256:
                return f"kvcache_block_size to be a multiple of 256, got {self.kvcache_block_size}"
            if self.model_config.head_dim % 8:
                return f"head_dim to be a multiple of 8, got {self.model_config.head_dim}"
        return None
