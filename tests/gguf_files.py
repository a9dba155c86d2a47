"""GGUF files of transformers' models, written by the package gguf with the names and changes of llama.cpp's converter.

The names are listed here, though the package knows them: what reads the files asks the package.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
PERMUTED = ("llama", "granite", "smollm3")
Pack = Callable[[str, np.ndarray], "tuple[np.ndarray, gguf.GGMLQuantizationType] | None"]


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of heads, all x and then all y of the pairs that rotate, as (x, y) pairs."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def unpermuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The inverse of `permuted`."""
    pairs = weight.reshape(num_heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def num_heads_of(config: object, name: str) -> int | None:
    """How many heads the rows of a tensor of a file are, if they are queries or keys."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return heads.get(name.split(".")[-2])


def tensors_of(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    """What a file of an architecture has of a model, float32, by the file's names."""
    names = NAMES | (GEMMA_NAMES if architecture.startswith("gemma") else {})
    tensors = {}
    for full_name, parameter in model.named_parameters():  # a tied head is not among them
        values = parameter.detach().float().numpy()
        prefix, name = "", full_name
        if full_name.startswith("model.layers."):
            layer, name = full_name.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{layer}."
        if name == "mlp.experts.gate_up_proj":
            tensors[f"{prefix}ffn_gate_exps.weight"], tensors[f"{prefix}ffn_up_exps.weight"] = np.split(values, 2, 1)
            continue
        if name == "mlp.experts.down_proj":
            tensors[f"{prefix}ffn_down_exps.weight"] = values
            continue
        module, kind = name.rsplit(".", 1)
        own_name = f"{prefix}{names[module]}.{kind}"
        if architecture in PERMUTED and (num_heads := num_heads_of(model.config, own_name)):
            values = permuted(values, num_heads)
        if architecture.startswith("gemma") and module.endswith("norm"):
            values = values + np.float32(1)
        if module == "mlp.shared_expert_gate":
            values = values[0]
        tensors[own_name] = values
    return tensors


def metadata_of(model: PreTrainedModel, architecture: str) -> dict[str, object]:
    """The metadata that every architecture has, without the architecture's name; more is the caller's."""
    c = model.config
    ropes = c.rope_parameters
    rope = ropes.get("full_attention", ropes)
    heads, head_dim = c.num_attention_heads, getattr(c, "head_dim", None)
    head_dim = head_dim or c.hidden_size // heads
    metadata = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * (rope.get("partial_rotary_factor") or 1)),
        "vocab_size": c.vocab_size,
    }
    if getattr(c, "num_experts_per_tok", None):
        metadata["expert_count"] = getattr(c, "num_experts", None) or c.num_local_experts
        metadata["expert_used_count"] = c.num_experts_per_tok
    for key, name in (
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ):
        if getattr(c, name, None):
            metadata[key] = getattr(c, name)
    return metadata


def write_file(
    path: Path,
    architecture: str,
    tensors: dict[str, np.ndarray],
    metadata: dict[str, object],
    pack: Pack = lambda name, values: None,
    add: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
    **options: int,
) -> str:
    """Writes a file; `pack` gives a tensor's bytes and type, None: float32; `add` adds metadata with its full name."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    for key, value in metadata.items():
        kind = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kind[type(value)](f"{architecture}.{key}", value)
    writer.add_eos_token_id(1)
    add(writer)
    for name, values in tensors.items():
        packed = pack(name, values)
        if packed is None:
            writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
        else:
            writer.add_tensor(name, packed[0], raw_dtype=packed[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def llama3_factors(rope: dict[str, float], head_dim: int) -> np.ndarray:
    """What Llama 3 divides the frequencies by, [head_dim / 2]: the tensor rope_freqs.weight of its files."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2).numpy() / head_dim)
    smooth = (rope["original_max_position_embeddings"] / wavelengths - rope["low_freq_factor"]) / (
        rope["high_freq_factor"] - rope["low_freq_factor"]
    )
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return np.where(wavelengths < high, 1, np.where(wavelengths > low, rope["factor"], between)).astype(np.float32)
