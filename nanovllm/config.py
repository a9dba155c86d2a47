"""Every engine option, its default and its limits, validated in one place.

What "auto" and names of models come to is worked out in options/; what vLLM calls otherwise is translated in
compat/engine_options.py. Nothing here knows how an option is served.
"""

import os
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import torch

from nanovllm.checkpoint.model_config import ModelConfig
from nanovllm.compat.engine_options import translate
from nanovllm.kernels.e4m3 import E4M3
from nanovllm.options import choices
from nanovllm.options.checks import Limits, check_fields, field_kinds
from nanovllm.options.choices import FP8
from nanovllm.options.folders import find_folders
from nanovllm.options.spellings import spell_alike
from nanovllm.quantization import Method
from nanovllm.speculative.draft_config import draft_config_of
from nanovllm.speculative.params import MAX_CHECKED_TOKENS, Speculation, read_speculation

Dtype = Literal["auto", "float32", "bfloat16", "float16", "half", "float"]
KvCacheDtype = Literal["auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3"]
MAX_SLOTS = 2**31 - 1  # of the KV cache: they are numbered in int32, as tokens and rows are
LIMITS: Limits = {  # lowest, highest
    "num_kvcache_blocks": (-1, MAX_SLOTS),
    "seed": (0, 2**63 - 1),
    "max_num_batched_tokens": (1, MAX_SLOTS),
    "long_prefill_token_threshold": (0, MAX_SLOTS),
    "max_num_seqs": (1, MAX_SLOTS),
    "max_model_len": (2,),
    "max_logprobs": (-1,),
    "gpu_memory_utilization": (0, 1),
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
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
        tensor_parallel_size: ranks that compute each layer together, each a process with a device of its own (on CPU:
            a process).
        pipeline_parallel_size: stages that share out the layers, each of tensor_parallel_size ranks: for GPUs without
            fast links. Several requests keep them all busy. Not with speculative_config.
        enforce_eager: run steps without CUDA graphs.
        kvcache_block_size: tokens of a block of the KV cache, a power of two of at least 16.
        num_kvcache_blocks: blocks of the KV cache, -1: as many as memory allows.
        kv_cache_dtype: "auto" (that of the computation, which may be named too) or "fp8", which is "fp8_e4m3": half
            the bytes, on GPUs of compute capability 8.9 and later, with attention_backend "triton". Resolved: a
            dtype's name.
        dtype: "auto", or one of Dtype's or torch's. "auto" is the checkpoint's, of a GGUF file bfloat16; but a GPU
            computes in bfloat16 what is stored in float32, a CPU in float32 what is stored in half types, unless it
            multiplies bfloat16. Resolved: its name.
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
            {"model": folder, "num_speculative_tokens": k} checks those of another model with the same tokens.
        scheduling_policy: "fcfs": requests are served in the order in which they come; "priority": by their
            `priority`, the lowest number first, and those of one priority in order.
        model_config: the facts of the model's config.json.
        quantization_method: how the checkpoint's weights are stored, or are to be; None: plainly.
        speculation: what speculative_config says; None: nothing.
        draft_config: how the model of speculative_config is run, if it has one.
        dtype_reason, attention_reason: why the dtype and the attention_backend are what they are, in words.
        lowers_max_model_len: max_model_len is to be lowered to what the KV cache holds, rather than refused.

    Raises:
        TypeError, ValueError: naming the option, its value and its limit.
    """

    model: str | os.PathLike[str]
    _: KW_ONLY
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
    pipeline_parallel_size: int | None = 1
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
    draft_config: "Config | None" = field(init=False, default=None)
    dtype_reason: str = field(init=False)
    attention_reason: str = field(init=False)
    lowers_max_model_len: bool = field(init=False, default=False)

    @classmethod
    def create(cls, model: str | os.PathLike[str], options: dict[str, Any]) -> "Config":
        """A Config from keyword options, in our spelling or vLLM's."""
        return cls(model, **translate(options, field_kinds(cls)))

    def __post_init__(self) -> None:
        spell_alike(self)
        check_fields(self, LIMITS)
        self._check_sizes()
        self.speculation = read_speculation(self.speculative_config, self.max_num_batched_tokens)
        self.device = choices.choose_device(self)
        find_folders(self)
        self.model_config = ModelConfig.from_folder(self.config_folder, self.hf_overrides, self.generation_folder)
        self.max_model_len = min(self.max_model_len, self.model_config.max_position_embeddings)
        choices.check_heads(self)
        choices.check_stages(self)
        self.quantization, self.quantization_method = choices.choose_quantization(self)
        self.dtype, self.dtype_reason = choices.choose_dtype(self)
        self.attention_backend, self.attention_reason = choices.choose_attention(self)
        self.sampler_backend = choices.choose_sampler(self)
        self.kv_cache_dtype = choices.choose_kv_cache_dtype(self)
        if self.speculation is not None and self.speculation.model is not None:
            self.draft_config = draft_config_of(self)

    def _check_sizes(self) -> None:
        """Checks what the limits of single options leave open."""
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
    def num_ranks(self) -> int:
        """The ranks of all stages."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def max_unseen_steps(self) -> int:
        """The launched steps that may be left unseen while the host prepares the next one."""
        return max(self.pipeline_parallel_size - 1, 1) if self.async_scheduling else 0

    @property
    def max_num_decodes(self) -> int:
        """The most tokens of a step that only decodes, drafts included."""
        return self.max_num_seqs if self.speculation is None else max(self.max_num_seqs, MAX_CHECKED_TOKENS)
