"""Folders of models that have no weights: shapes of published ones, to be loaded with `load_format="dummy"`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

# Facts of config.json; Llama keeps those of Qwen3 that have no bearing on speed.
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_act": "silu"}
QWEN3 |= {"head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
LLAMA3 = QWEN3 | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256}
QWEN3_MOE = QWEN3 | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 128}
QWEN3_MOE |= {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000, "hidden_act": "silu"}
MISTRAL |= {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": 4096}
MIXTRAL = MISTRAL | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
MIXTRAL |= {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6}
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262208, "head_dim": 256}
GEMMA3 |= {"hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072, "rms_norm_eps": 1e-6}
GEMMA3 |= {"query_pre_attn_scalar": 256, "sliding_window": 1024, "sliding_window_pattern": 6, "rope_theta": 1e6}
GEMMA3 |= {"rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {  # facts, SIZES, whether head and embedding are tied
    "qwen3-0.6b": (QWEN3, (1024, 3072, 28, 16, 8), True),
    "qwen3-1.7b": (QWEN3, (2048, 6144, 28, 16, 8), True),
    "qwen3-4b": (QWEN3, (2560, 9728, 36, 32, 8), True),
    "qwen3-8b": (QWEN3, (4096, 12288, 36, 32, 8), False),
    "qwen3-8b-128k": (QWEN3 | {"max_position_embeddings": 131072}, (4096, 12288, 36, 32, 8), False),
    "qwen3-14b": (QWEN3, (5120, 17408, 40, 40, 8), False),
    "qwen3-32b": (QWEN3, (5120, 25600, 64, 64, 8), False),
    "qwen3-30b-a3b": (QWEN3_MOE, (2048, 6144, 48, 32, 4), False),
    "llama-3.1-8b": (LLAMA3, (4096, 14336, 32, 32, 8), False),
    "mistral-7b": (MISTRAL, (4096, 14336, 32, 32, 8), False),
    "mixtral-8x7b": (MIXTRAL, (4096, 14336, 32, 32, 8), False),
    "gemma3-4b": (GEMMA3, (2560, 10240, 34, 8, 4), True),
}
WHOLE_ROWS = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
QUANTIZATIONS: dict[str, dict[str, Any]] = {  # what config.json says in published checkpoints, by a name of our own
    "fp8-block": {  # Qwen/Qwen3-8B-FP8
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    },
    "int8": {  # RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a8
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": WHOLE_ROWS | {"strategy": "channel", "dynamic": False},
                "input_activations": WHOLE_ROWS | {"strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
    },
    "int4": {  # Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "damp_percent": 0.01,
        "static_groups": False,
        "true_sequential": True,
    },
    "awq": {  # Qwen/Qwen3-8B-AWQ
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    },
}


def write_dummy_model(
    shape: str, folder: str, with_tokenizer: bool = True, quantization_config: dict[str, Any] | None = None
) -> None:
    """Writes a shape's config.json, and a byte-level BPE tokenizer of all bytes and made-up words.

    With it, turning tokens into text is part of the work, as it is with a real checkpoint.
    """
    facts, sizes, is_tied = SHAPES[shape]
    config = facts | dict(zip(SIZES, sizes, strict=True))
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    files = {"config.json": config | {"tie_word_embeddings": is_tied, "torch_dtype": "bfloat16"}}
    if with_tokenizer:
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        alphabet = sorted(ByteLevel.alphabet())
        words = [f"Ġ{i:05x}" for i in range(len(alphabet), facts["vocab_size"])]
        bpe = {"type": "BPE", "vocab": {text: i for i, text in enumerate(alphabet + words)}, "merges": []}
        files["tokenizer.json"] = {"added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": bpe}
        files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, content in files.items():
        Path(folder, name).write_text(json.dumps(content), encoding="utf-8")
