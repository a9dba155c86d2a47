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
# What the models here do not do, and the values that say nothing.
REFUSED = {
    "activation_sparsity_scale": (),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "embedding_length_per_layer_input": (0,),
    "expert_chunk_feed_forward_length": (0,),
    "expert_gating_func": (0, 1),  # 1: softmax
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "moe_every_n_layers": (0, 1),
    "moe_latent_size": (0,),
    "nextn_predict_layers": (0,),
    "rope.dimension_sections": (),
    "rope.scaling.alpha": (0,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "router_logit_softcapping": (0,),
    "swiglu_clamp_exp": (),
    "swiglu_clamp_shexp": (),
    "use_parallel_residual": (False,),
}
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
    found = _read_metadata(header, name)
    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{path} lacks the tensor 'token_embd.weight'")
    optional = OPTIONAL | (MULTIPLIERS if name == "granite" else {})
    config = {key: found[theirs] for key, theirs in optional.items() if _says_something(found.get(theirs))}
    config |= {key: found[theirs] for key, theirs in REQUIRED.items()}
    config |= {
        "architectures": [_class_name(name, config) or architecture.hf_name],
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "qkv_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "dtype": "bfloat16",
        "eos_token_id": [
            header.metadata[f"tokenizer.ggml.{key}"] for key in END_KEYS if f"tokenizer.ggml.{key}" in header.metadata
        ],
    }
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("sliding_window", None)
    config.setdefault("norm_topk_prob", NORMALISES_EXPERTS.get(name, False))
    _add_head_sizes(config, JsonFacts(path, config), name, found)
    config["rope_scaling"] = _rope_scaling(header, found)
    if config["rope_scaling"] and config["rope_scaling"]["rope_type"] == "longrope":
        config.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return config


def _read_metadata(header: Header, name: str) -> dict[str, Any]:
    """The metadata of an architecture, without its name, as far as none of REFUSED asks for something."""
    found = {
        key.removeprefix(f"{name}."): shortest(value)
        for key, value in header.metadata.items()
        if key.startswith(f"{name}.")
    }
    unread = REFUSED if name in ("granite", *LAYERS_OF_27B) else REFUSED | dict.fromkeys(MULTIPLIERS.values(), (0,))
    for key, values in unread.items():
        if key in found and found[key] not in values:
            raise ValueError(f"{name}.{key}={found[key]!r} is not supported ({header.path})")
    for key in REQUIRED.values():
        if key not in found:
            where = "hf_config_path may name a folder with a config.json"
            raise ValueError(f"{header.path} has no '{name}.{key}'; {where}")
    return found


def _says_something(value: Any) -> bool:
    """Whether a value is there, and not the zero of what a model has none of."""
    return value is not None and (isinstance(value, bool) or value != 0)


def _class_name(name: str, config: dict[str, Any]) -> str | None:
    """The class of transformers, if the architecture's name alone does not say it."""
    if name == "llama" and "num_experts" in config:
        return "MixtralForCausalLM"
    return "MistralForCausalLM" if name == "llama" and "sliding_window" in config else None


def _add_head_sizes(config: dict[str, Any], facts: JsonFacts, name: str, found: dict[str, Any]) -> None:
    """Adds to config how large heads are, how much of them rotates, and what Gemma's scores are scaled by."""
    quotient = facts.size("hidden_size") // facts.size("num_attention_heads")
    config["head_dim"] = head_dim = found.get("attention.key_length", quotient)
    facts.size("head_dim")
    rotary_dim = found.get("rope.dimension_count", head_dim)
    for key, needed in (
        ("attention.value_length", head_dim),
        ("attention.key_length_swa", head_dim),
        ("attention.value_length_swa", head_dim),
        ("rope.dimension_count_swa", rotary_dim),
    ):
        if found.get(key, needed) != needed:
            raise facts.error(f"{name}.{key}={found[key]!r} is not supported, only {needed}")
    if rotary_dim != head_dim:
        config["rotary_dim"] = rotary_dim
        config["partial_rotary_factor"] = facts.size("rotary_dim") / head_dim
    if name in LAYERS_OF_27B:
        is_27b = config["num_hidden_layers"] == LAYERS_OF_27B[name]
        config["query_pre_attn_scalar"] = quotient if is_27b else head_dim
        if scale := found.get("attention.scale"):
            config["query_pre_attn_scalar"] = facts.number(f"{name}.attention.scale", scale) ** -2


def _rope_scaling(header: Header, found: dict[str, Any]) -> dict[str, Any] | None:
    """The object rope_scaling of config.json, from metadata without the architecture's name; None: there is none."""
    kind = found.get("rope.scaling.type", "linear" if "rope.scale_linear" in found else "none")
    factor = found.get("rope.scaling.factor", found.get("rope.scale_linear"))
    attention_factor = found.get("rope.scaling.attn_factor")
    if "rope_freqs.weight" in header.tensors and kind == "none":
        # Llama 3's scaling as what it comes to: numbers that the frequencies are divided by, as longrope does it.
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
