"""Every engine option, validated in one place. What vLLM calls otherwise is translated in compat/engine_options.py.

Nothing here knows how an option is served.
"""

import importlib.util
import os
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from nanovllm.checkpoint.files import find_generation_config, find_tokenizer, has_tokenizer, resolve_model_path
from nanovllm.checkpoint.gguf.files import find_gguf, is_gguf
from nanovllm.checkpoint.model_config import ModelConfig
from nanovllm.compat.engine_options import translate
from nanovllm.kernels.cpu_products import multiplies_bfloat16
from nanovllm.kernels.e4m3 import E4M3
from nanovllm.quantization import Method, read_method
from nanovllm.quantization.gguf import Gguf
from nanovllm.speculative.params import MAX_CHECKED_TOKENS, Speculation, read_speculation
from nanovllm.utils.checks import check

Dtype = Literal["auto", "float32", "bfloat16", "float16", "half", "float"]
DTYPES = ("float32", "bfloat16", "float16")
KvCacheDtype = Literal["auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3"]
FP8 = "fp8_e4m3"
OTHER_DTYPES = {"half": "float16", "float": "float32"}
MAX_SLOTS = 2**31 - 1  # of the KV cache: they are numbered in int32, as tokens and rows are
LIMITS = {  # lowest, highest
    "num_kvcache_blocks": (-1, MAX_SLOTS),
    "seed": (0, 2**63 - 1),
    "max_num_batched_tokens": (1, MAX_SLOTS),
    "long_prefill_token_threshold": (0, MAX_SLOTS),
    "max_num_seqs": (1, MAX_SLOTS),
    "max_model_len": (2,),
    "max_logprobs": (-1,),
    "gpu_memory_utilization": (0, 1),
    "tensor_parallel_size": (1,),
    "kvcache_block_size": (16, MAX_SLOTS),
}


@dataclass
class Config:
    """The engine's options; what is "auto", or None where that says the same, is resolved when constructed.

    Attributes:
        model: a Hugging Face folder or hub name (HF_HUB_OFFLINE is honoured), or a GGUF file. Resolved: the folder or
            the file.
        tokenizer: a folder or hub name of another tokenizer than the model's. Resolved: its folder, or the GGUF file
            that has it, or None if skip_tokenizer_init.
        revision: the branch, tag or commit of a model of the hub; a folder is the one that it is.
        tokenizer_revision: the same of the tokenizer; without `tokenizer`, None is the model's.
        download_dir: where the hub's files are kept, None: where Hugging Face keeps them.
        hf_token: for the hub; True: the one that was stored by logging in.
        hf_config_path: a folder or hub name whose config.json and generation_config.json count in place of the
            model's, such as the one that a GGUF file was made of. Resolved: its folder, or None: the model's.
        hf_overrides: keys of config.json with other values.
        skip_tokenizer_init: have no tokenizer; prompts must be token ids, and results have no text.
        generation_config: whose generation_config.json says what requests without parameters ask for and, with
            config.json, which tokens end a text: "auto" (the model's), a folder or hub name, or "vllm" or None (the
            model's for the tokens alone). Resolved: "auto", "vllm" or a folder.
        max_num_batched_tokens: most tokens a step computes, decodes and prompt chunks together.
        long_prefill_token_threshold: most tokens of one prompt that a step computes, so that one that comes among
            decodes does not keep them waiting for long; 0: what max_num_batched_tokens leaves.
        max_num_seqs: most sequences that run at once.
        max_model_len: most tokens of a request, prompt and output; capped by the model's positions. None, -1 or
            "auto": as many as the model has positions, and the KV cache room for.
        max_logprobs: most `logprobs` or `prompt_logprobs` a request may ask for, -1: as many as there are tokens.
        gpu_memory_utilization: share of the GPU's memory the engine may take.
        tensor_parallel_size: ranks, each a process with a device of its own (on CPU: a process).
        enforce_eager: run decode steps without CUDA graphs.
        kvcache_block_size: tokens of a block of the KV cache, a power of two of at least 16.
        num_kvcache_blocks: blocks of the KV cache, -1: as many as memory allows.
        kv_cache_dtype: "auto" (that of the computation, which may be named too) or "fp8", which is "fp8_e4m3": half
            the bytes, on GPUs of compute capability 8.9 and later, with attention_backend "triton". Resolved: one of
            DTYPES or FP8.
        dtype: "auto" (the checkpoint's, of a GGUF file bfloat16; float32 for half types on a CPU, but for bfloat16 on
            one that multiplies it), or one of Dtype's or torch's. Resolved: one of DTYPES.
        device: "auto" (cuda where there is one), "cuda" or "cpu".
        attention_backend: "auto", "triton", "flash_attn" or "torch".
        sampler_backend: "auto" (the faster one), "triton" or "torch" (compiled on CUDA); they make equal draws.
        enable_prefix_caching: share the KV of equal prefixes between requests.
        async_scheduling: prepare and launch a step before the tokens of the last one are seen.
        load_format: "safetensors" and "gguf" read such files, "auto" the latter where a folder has none of the
            former; "dummy" draws random weights and needs no file but config.json.
        seed: of the draws of requests that bring no seed, and of dummy weights.
        quantization: the method of a quantised checkpoint, which is known without it; "fp8", "int8" or, on a CPU,
            "int4" to round a plain one while it is loaded; "gguf" to keep the codes of 4 bits that a GGUF file has, on
            a CPU (on a GPU it says nothing). Resolved: the name of the method; None: plain weights.
        speculative_config: {"method": "ngram", "num_speculative_tokens": k, "prompt_lookup_max": n,
            "prompt_lookup_min": m} checks up to k drafts of a request's next tokens in a step: what followed its last
            m to n tokens when they occurred before in its text. Without m or n both are the other, without both 5.
        scheduling_policy: "fcfs": requests are served in the order in which they come; "priority": by their
            `priority`, the lowest number first, and those of one priority in order.
        speculation: what that says; None: nothing.
        lowers_max_model_len: max_model_len is to be lowered to what the KV cache holds, rather than refused.

    Raises:
        TypeError, ValueError: naming the option, its value and its limit.
    """

    model: str | os.PathLike[str]
    tokenizer: str | os.PathLike[str] | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    download_dir: str | os.PathLike[str] | None = None
    hf_token: str | bool | None = field(default=None, repr=False)
    hf_config_path: str | os.PathLike[str] | None = None
    hf_overrides: dict[str, Any] | None = None
    skip_tokenizer_init: bool = False
    generation_config: str | os.PathLike[str] | None = "auto"
    max_num_batched_tokens: int | None = 16384
    long_prefill_token_threshold: int | None = 0
    max_num_seqs: int | None = 512
    max_model_len: int | Literal["auto"] | None = 4096
    max_logprobs: int = 20
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    enforce_eager: bool | None = False
    kvcache_block_size: int = 256
    num_kvcache_blocks: int = -1
    kv_cache_dtype: KvCacheDtype | None = "auto"
    dtype: Dtype | torch.dtype = "auto"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    attention_backend: Literal["auto", "flash_attn", "triton", "torch"] = "auto"
    sampler_backend: Literal["auto", "triton", "torch"] = "auto"
    enable_prefix_caching: bool | None = True
    async_scheduling: bool | None = True
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = "auto"
    seed: int | None = 0
    quantization: str | None = None
    speculative_config: dict[str, Any] | None = None
    scheduling_policy: Literal["fcfs", "priority"] | None = "fcfs"
    model_config: ModelConfig = field(init=False)
    quantization_method: Method | None = field(init=False, default=None)
    speculation: Speculation | None = field(init=False, default=None)
    dtype_reason: str = field(init=False)
    attention_reason: str = field(init=False)
    lowers_max_model_len: bool = field(init=False, default=False)

    @classmethod
    def create(cls, model: str | os.PathLike[str], options: dict[str, Any]) -> "Config":
        """A Config from keyword options, in our spelling or vLLM's."""
        return cls(model, **translate(options, {option.name for option in fields(cls) if option.init}))

    def __post_init__(self) -> None:
        self._check()
        size, num_gpus = self.tensor_parallel_size, torch.cuda.device_count() if self.device != "cpu" else 0
        if self.device == "auto":
            self.device = "cuda" if num_gpus else "cpu"
        if self.device == "cuda" and size > num_gpus:
            raise ValueError(f"tensor_parallel_size={size} needs as many CUDA devices, there are {num_gpus}")
        self._find_folders()
        self.model_config = ModelConfig.from_folder(self.config_folder, self.hf_overrides, self.generation_folder)
        self.max_model_len = min(self.max_model_len, self.model_config.max_position_embeddings)
        heads, kv_heads = self.model_config.num_attention_heads, self.model_config.num_key_value_heads
        if heads % size:
            raise ValueError(f"tensor_parallel_size={size} must divide num_attention_heads={heads}")
        if kv_heads % size and size % kv_heads:
            raise ValueError(
                f"tensor_parallel_size={size} must divide num_key_value_heads={kv_heads}, or be a multiple"
            )
        self._resolve_quantization()
        self.dtype_reason = "as asked for"
        if self.dtype == "auto":
            self._choose_dtype()
        self._resolve_backends()
        self._resolve_kv_cache_dtype()

    @property
    def config_folder(self) -> str:
        """The folder whose config.json counts, or the GGUF file that has the same to say."""
        return self.model if self.hf_config_path is None else self.hf_config_path

    @property
    def generation_folder(self) -> str:
        """The folder whose generation_config.json counts, be it for the tokens that end a text alone."""
        return self.config_folder if self.generation_config in ("auto", "vllm") else self.generation_config

    @property
    def torch_dtype(self) -> torch.dtype:
        """The resolved `dtype` as torch knows it."""
        return getattr(torch, self.dtype)

    @property
    def torch_kv_cache_dtype(self) -> torch.dtype:
        """The resolved `kv_cache_dtype` as torch knows it."""
        return E4M3 if self.kv_cache_dtype == FP8 else getattr(torch, self.kv_cache_dtype)

    @property
    def max_blocks_per_seq(self) -> int:
        """Blocks that a sequence of max_model_len tokens takes."""
        return -(-self.max_model_len // self.kvcache_block_size)

    @property
    def max_num_decodes(self) -> int:
        """The most tokens of a step that only decodes, drafts included."""
        return self.max_num_seqs if self.speculation is None else max(self.max_num_seqs, MAX_CHECKED_TOKENS)

    def _check(self) -> None:
        """Brings the options to one spelling each, and checks what can be checked without a file."""
        self.lowers_max_model_len = self.max_model_len in (None, -1, "auto")
        if self.lowers_max_model_len:
            self.max_model_len = MAX_SLOTS
        if self.generation_config is None:
            self.generation_config = "vllm"
        if not isinstance(self.quantization, (str, NoneType)):
            raise TypeError(f"quantization must be the name of a method, got {self.quantization!r}")
        if isinstance(self.dtype, torch.dtype):
            self.dtype = str(self.dtype).removeprefix("torch.")
        for name, hint in get_type_hints(Config).items():
            kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            if getattr(self, name, None) is None and NoneType in kinds:
                setattr(self, name, getattr(Config, name))
            kind, value = kinds[0], getattr(self, name, None)
            if kind in (bool, int, float):
                check(name, value, kind, *LIMITS.get(name, ()))
            elif get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
        self.dtype = OTHER_DTYPES.get(self.dtype, self.dtype)
        for name in ("gpu_memory_utilization", "num_kvcache_blocks"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must not be 0")
        if self.kvcache_block_size & (self.kvcache_block_size - 1):
            raise ValueError(f"kvcache_block_size must be a power of two, got {self.kvcache_block_size}")
        if self.num_kvcache_blocks * self.kvcache_block_size > MAX_SLOTS:
            raise ValueError(
                f"num_kvcache_blocks={self.num_kvcache_blocks} of kvcache_block_size={self.kvcache_block_size} tokens "
                f"are more than the {MAX_SLOTS} tokens that a KV cache can hold"
            )
        self.speculation = read_speculation(self.speculative_config, self.max_num_batched_tokens)

    def _find_folders(self) -> None:
        """Brings the names of model, tokenizer, hf_config_path and generation_config to folders, or a GGUF file."""
        hub, name = {"download_dir": self.download_dir, "hf_token": self.hf_token}, self.model
        folder = resolve_model_path(name, self.load_format != "dummy", revision=self.revision, **hub)
        self.model = find_gguf(folder, self.load_format) or folder
        if self.hf_config_path is not None:
            self.hf_config_path = resolve_model_path(self.hf_config_path, option="hf_config_path", **hub)
        elif self.model != folder:  # a GGUF file, beside which the folder may have more
            if os.path.isfile(os.path.join(folder, "config.json")):
                self.hf_config_path = folder
            elif self.generation_config == "auto" and os.path.isfile(os.path.join(folder, "generation_config.json")):
                self.generation_config = folder
        if self.skip_tokenizer_init:
            self.tokenizer = None
        elif self.tokenizer is None and self.tokenizer_revision is None:
            self.tokenizer = folder if has_tokenizer(folder) else self.model
        else:
            name = name if self.tokenizer is None else self.tokenizer
            self.tokenizer = find_tokenizer(name, revision=self.tokenizer_revision, **hub)
        if self.generation_config not in ("auto", "vllm"):
            self.generation_config = find_generation_config(self.generation_config, **hub)

    def _choose_dtype(self) -> None:
        stored = self.model_config.dtype
        if stored not in DTYPES:
            raise ValueError(f"the checkpoint's dtype {stored!r} is not supported, choose one of {DTYPES}")
        self.dtype, self.dtype_reason = stored, "the checkpoint's"
        if self.device == "cpu" and stored != "float32":
            is_native = stored == "bfloat16" and multiplies_bfloat16()
            self.dtype = stored if is_native else "float32"
            self.dtype_reason = f"this CPU {'multiplies' if is_native else 'has no fast products of'} {stored}"

    def _resolve_quantization(self) -> None:
        """Finds the method by which weights are stored, or are to be."""
        if self.quantization == "gguf":
            if not is_gguf(self.model):
                raise ValueError(f"quantization='gguf' contradicts model={self.model!r}, which is no GGUF file")
            if self.device == "cpu":
                self.quantization_method = Gguf(self.model)
                return
            self.quantization = None
        if self.quantization == "int4" and self.device != "cpu":
            raise ValueError(f"quantization='int4' rounds weights for device='cpu' only, got {self.device!r}")
        stored, path = self.model_config.quantization_config, self.config_folder
        path = path if is_gguf(path) else f"{path}/config.json"
        self.quantization_method = read_method(self.quantization, stored, path)
        self.quantization = stored.get("quant_method", self.quantization)

    def _resolve_backends(self) -> None:
        is_flash = self.attention_backend == "flash_attn"
        block_size, head_dim = self.kvcache_block_size, self.model_config.head_dim
        obstacles = {
            "dtype float16 or bfloat16, got float32": is_flash and self.dtype == "float32",
            f"kvcache_block_size to be a multiple of 256, got {block_size}": is_flash and block_size % 256 > 0,
            f"head_dim to be a multiple of 8, got {head_dim}": is_flash and head_dim % 8 > 0,
        }
        self.attention_reason = self._resolve_backend("attention_backend", obstacles)
        self._resolve_backend("sampler_backend", {})

    def _resolve_kv_cache_dtype(self) -> None:
        option = f"kv_cache_dtype={self.kv_cache_dtype!r}"
        if self.kv_cache_dtype in ("fp8", FP8):
            self.kv_cache_dtype = FP8
            if self.attention_backend != "triton":
                raise ValueError(
                    f"{option} needs attention_backend='triton', it is {self.attention_backend!r}: "
                    f"{self.attention_reason}"
                )
        elif self.kv_cache_dtype not in ("auto", self.dtype):
            raise ValueError(f"{option} must be 'auto', 'fp8' or the dtype of the computation, {self.dtype!r}")
        else:
            self.kv_cache_dtype = self.dtype

    def _resolve_backend(self, option: str, own_obstacles: dict[str, bool]) -> str:
        """Resolves "auto" to Triton or, if there is an obstacle, to torch; returns the reason.

        Raises:
            ValueError: there is an obstacle to a backend that was asked for.
        """
        choice = getattr(self, option)
        backend = "triton" if choice == "auto" else choice
        obstacles = {
            f"device='cuda', got {self.device!r}": backend != "torch" and self.device != "cuda",
            f"the package {backend}, which is not installed": importlib.util.find_spec(backend) is None,
            **own_obstacles,
        }
        obstacle = next((text for text, is_there in obstacles.items() if is_there), None)
        if choice != "auto" and obstacle:
            raise ValueError(f"{option}={backend!r} needs {obstacle}")
        if choice != "auto":
            return "as asked for"
        setattr(self, option, "torch" if obstacle else backend)
        return f"{backend} needs {obstacle}" if obstacle else "the fastest measured on an H200"
