"""What config.json would say, from the metadata of a GGUF file, which says most of it by other names.

What the metadata leaves out, llama.cpp knows of the architectures; it is the reference for that.
"""

from typing import Any

import numpy as np

from nanovllm.checkpoint.facts import JsonFacts
from nanovllm.checkpoint.gguf.architectures import architecture_of
from nanovllm.checkpoint.gguf.header import Header, read_header
from nanovllm.checkpoint.gguf.tensors import GGUFTensor, packed_rows

# Keys of config.json, and of the metadata behind the architecture's name.
REQUIRED = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
OPTIONAL = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "moe_intermediate_size": "expert_feed_forward_length",
    "norm_topk_prob": "expert_weights_norm",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "num_key_value_heads": "attention.head_count_kv",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "rope_local_base_freq": "rope.freq_base_swa",
    "rope_theta": "rope.freq_base",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
}
MULTIPLIERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "logits_scaling": "logit_scale",
    "residual_multiplier": "residual_scale",
}
# What the models here do not do. 0 and 1 say nothing.
REFUSED = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.output_scale",
    "attention.shared_kv_layers",
    "attention.temperature_length",
    "attention.temperature_scale",
    "expert_gating_func",
    "expert_group_count",
    "expert_weights_scale",
    "rope.scaling.alpha",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
)
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, of a turn, of a message
# Numbers of layers of the models of 27B, whose scores are scaled by hidden_size / num_attention_heads.
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
NORMALISES_EXPERTS = {"qwen2moe": False, "qwen3moe": True}


def read_gguf_config(path: str) -> dict[str, Any]:
    """The object of a config.json for a file. A file names no dtype: the config has bfloat16.

    Raises:
        ValueError: the file is damaged, of an architecture that is not supported, lacks a key, or has one that asks
            for what no model here does.
    """
    header = read_header(path)
    name, architecture = architecture_of(header)
    found = {
        key.removeprefix(f"{name}."): shortest(value)
        for key, value in header.metadata.items()
        if key.startswith(f"{name}.")
    }
    for key in (*REFUSED, *(MULTIPLIERS.values() if name not in ("granite", *LAYERS_OF_27B) else ())):
        if found.get(key, 0) not in (0, 1, []):
            raise ValueError(f"{name}.{key}={found[key]!r} is not supported ({path})")
    for key in REQUIRED.values():
        if key not in found:
            raise ValueError(f"{path} has no '{name}.{key}'; hf_config_path may name a folder with a config.json")
    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{path} lacks the tensor 'token_embd.weight'")
    keys = REQUIRED | OPTIONAL | (MULTIPLIERS if name == "granite" else {})
    config = {key: found[theirs] for key, theirs in keys.items() if found.get(theirs) not in (None, 0)}
    facts = JsonFacts(path, config)
    quotient = facts.size("hidden_size") // facts.size("num_attention_heads")
    head_dim = found.get("attention.key_length", quotient)
    if (value_dim := found.get("attention.value_length", head_dim)) != head_dim:
        raise ValueError(f"{name}.attention.value_length={value_dim} must be the key_length={head_dim} ({path})")
    config |= {
        "architectures": [architecture.hf_name],
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "head_dim": head_dim,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "qkv_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "dtype": "bfloat16",
        "eos_token_id": [
            header.metadata[f"tokenizer.ggml.{key}"] for key in END_KEYS if f"tokenizer.ggml.{key}" in header.metadata
        ],
    }
    if name == "llama" and "num_experts" in config:
        config["architectures"] = ["MixtralForCausalLM"]
    elif name == "llama" and "sliding_window" in config:
        config["architectures"] = ["MistralForCausalLM"]
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("sliding_window", None)
    config.setdefault("norm_topk_prob", NORMALISES_EXPERTS.get(name, False))
    if name in LAYERS_OF_27B:
        scale_dim = quotient if config["num_hidden_layers"] == LAYERS_OF_27B[name] else head_dim
        scale = found.get(MULTIPLIERS["attention_multiplier"])
        config["query_pre_attn_scalar"] = scale**-2 if scale else scale_dim
    rotary_dim = found.get("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    config["rope_scaling"] = _rope_scaling(header, found)
    if config["rope_scaling"] and config["rope_scaling"]["rope_type"] == "longrope":
        config.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return config


def _rope_scaling(header: Header, found: dict[str, Any]) -> dict[str, Any] | None:
    """The object rope_scaling of config.json, from metadata without the architecture's name; None: there is none."""
    kind = found.get("rope.scaling.type", "linear" if "rope.scale_linear" in found else "none")
    factor = found.get("rope.scaling.factor", found.get("rope.scale_linear"))
    attention_factor = found.get("rope.scaling.attn_factor")
    if "rope_freqs.weight" in header.tensors and kind == "none":
        # Llama 3's scaling, computed: what each frequency is divided by. So are the two lists of longrope used.
        factors = _numbers(header, "rope_freqs.weight")
        return {
            "rope_type": "longrope",
            "factor": 1.0,
            "attention_factor": 1.0,
            "short_factor": factors,
            "long_factor": factors,
        }
    if "rope_factors_long.weight" in header.tensors and kind in ("none", "longrope"):
        scaling = {
            "rope_type": "longrope",
            "short_factor": _numbers(header, "rope_factors_short.weight"),
            "long_factor": _numbers(header, "rope_factors_long.weight"),
        }
        return scaling if attention_factor is None else scaling | {"attention_factor": attention_factor}
    if kind == "none":
        return None
    if attention_factor not in (None, 1):
        raise ValueError(f"rope.scaling.attn_factor={attention_factor} is not supported ({header.path})")
    scaling = {"rope_type": kind, "factor": factor}
    for key in ("beta_fast", "beta_slow"):
        if f"rope.scaling.yarn_{key}" in found:
            scaling[key] = found[f"rope.scaling.yarn_{key}"]
    return scaling


def _numbers(header: Header, name: str) -> list[float]:
    """The elements of a tensor of one dimension."""
    if name not in header.tensors:
        raise ValueError(f"{header.path} lacks the tensor {name!r}")
    info = header.tensors[name]
    return [shortest(number) for number in GGUFTensor(info.shape, info.kind, packed_rows(header, name))[:].tolist()]


def shortest(value: Any) -> Any:
    """A value as config.json would have it: 1e-06, not the digits that the float32 nearest to it has."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
