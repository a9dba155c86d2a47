"""Small checkpoints in formats with few bits, packed as the formats are documented, by loops to be read.

Nothing of the package is used here: what it makes of such a checkpoint is held to transformers with the numbers that
the format says the codes are.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import SEED, Checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Phi3Config, PretrainedConfig, Qwen3Config

# Sizes that two ranks can halve: into whole blocks of 128.
SHAPE = {
    "vocab_size": 320,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CONFIG = Qwen3Config(**SHAPE, hidden_size=128, head_dim=128, tie_word_embeddings=True)
PHI3 = Phi3Config(**SHAPE, hidden_size=256, pad_token_id=None)  # which has q, k and v, and gate and up, as one
INPUTS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}

Pack = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]  # name, weight -> its tensors, and their numbers


@dataclass(frozen=True)
class Format:
    """A quantization_config, and what makes a weight [N, K] the tensors that it says."""

    config: dict[str, Any]
    pack: Pack
    plain: tuple[str, ...] = ()  # ends of the names of linear layers that are not packed
    model: PretrainedConfig = field(default_factory=lambda: CONFIG)


class QuantizedCheckpoint(Checkpoint):
    """A checkpoint whose linear layers are packed, and transformers' model with the numbers of their codes."""

    def __init__(self, made: Format, folder: Path, seed: int = SEED) -> None:
        super().__init__(made.model, folder, seed)
        file = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and ".layers." in name and not name.endswith(made.plain or ("-",)):
                del tensors[f"{name}.weight"]
                packed, numbers = made.pack(name, module.weight.data)
                tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in packed.items()}
                module.weight.data.copy_(numbers)
        save_file(tensors, file)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": made.config}))


def order_of(name: str, size: int, group: int) -> Tensor:
    """The groups of columns in some order, which the matrices that read the same x share: int64 [K]."""
    *layer, module = name.split(".")
    seed = zlib.crc32(".".join([*layer, INPUTS.get(module, module)]).encode())
    return (torch.arange(size) // group)[torch.randperm(size, generator=torch.Generator().manual_seed(seed))]


@dataclass
class Rounded:
    """A weight [N, K]: codes from 0 on, zeros and scales [N, G], the group of each column [K], and the numbers."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor
    numbers: Tensor


def rounded(
    weight: Tensor, bits: int, group: int, is_symmetric: bool, dtype: torch.dtype, groups: Tensor | None = None
) -> Rounded:
    """Rounds to integers, with scales of a dtype."""
    size = weight.size(1)
    group = size if group == -1 else group
    groups = torch.arange(size) // group if groups is None else groups
    largest = 2**bits - 1
    scales, zeros = [], []
    for index in range(size // group):
        part = weight[:, groups == index]
        if is_symmetric:
            scale = part.abs().amax(1) / (largest // 2)
            zero = torch.full_like(scale, (largest + 1) // 2)
        else:
            low, high = part.amin(1), part.amax(1)
            scale = (high - low) / largest
            zero = (-low / scale).round().clamp(1, largest)
        scales.append(scale.to(dtype))
        zeros.append(zero)
    scales, zeros = torch.stack(scales, 1), torch.stack(zeros, 1)
    scale, zero = scales.float()[:, groups], zeros[:, groups]
    codes = (weight / scale + zero).round().clamp(0, largest)
    return Rounded(codes.int(), zeros.int(), scales, groups, (codes - zero) * scale)


def words(codes: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """Packs codes [R, C] into int32 [R, C * bits / 32]; order: which of its codes a word has in its i-th bits."""
    count = 32 // bits
    packed = torch.zeros(codes.size(0), codes.size(1) // count, dtype=torch.int64)
    for place, code in enumerate(order or range(count)):
        packed |= codes[:, code::count].long() << (bits * place)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq(group: int, is_symmetric: bool = False, model: PretrainedConfig = CONFIG, **config: Any) -> Format:
    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        made = rounded(weight, 4, group, is_symmetric, torch.float16)
        qweight, qzeros = words(made.codes.t(), 4, AWQ_ORDER), words(made.zeros.t(), 4, AWQ_ORDER)
        return {"qweight": qweight, "qzeros": qzeros, "scales": made.scales.t()}, made.numbers

    raw = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": not is_symmetric, "version": "gemm"}
    return Format(raw | config, pack, model=model)


def gptq(
    bits: int,
    group: int,
    is_symmetric: bool = True,
    desc_act: bool = False,
    version: str = "gptq",
    model: PretrainedConfig = CONFIG,
    **config: Any,
) -> Format:
    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        groups = order_of(name, weight.size(1), group) if desc_act else None
        made = rounded(weight, bits, group, is_symmetric, torch.float16, groups)
        zeros = made.zeros - 1 if version == "gptq" else made.zeros
        return {
            "qweight": words(made.codes, bits).t(),
            "qzeros": words(zeros.t(), bits),
            "scales": made.scales.t(),
            "g_idx": made.groups.int(),
        }, made.numbers

    raw = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": desc_act, "sym": is_symmetric}
    return Format(raw | {"checkpoint_format": version} | config, pack, model=model)


def compressed(name: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """A quantization_config of one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "format": name,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


DYNAMIC = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
STATIC = DYNAMIC | {"strategy": "tensor", "dynamic": False}


def packed(
    bits: int,
    group: int,
    is_symmetric: bool = True,
    actorder: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    model: PretrainedConfig = CONFIG,
) -> Format:
    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        groups = order_of(name, weight.size(1), group) if actorder == "group" else None
        made = rounded(weight, bits, group, is_symmetric, dtype, groups)
        tensors = {"weight_packed": words(made.codes, bits), "weight_scale": made.scales}
        tensors["weight_shape"] = torch.tensor(weight.shape)
        if not is_symmetric:
            tensors["weight_zero_point"] = words(made.zeros.t(), bits).t()
        if groups is not None:
            tensors["weight_g_idx"] = groups.int()
        return tensors, made.numbers

    weights = {"num_bits": bits, "type": "int", "symmetric": is_symmetric, "strategy": "group", "group_size": group}
    if group == -1:
        weights |= {"strategy": "channel", "group_size": None}
    return Format(compressed("pack-quantized", weights | {"actorder": actorder}), pack, model=model)


def unpacked(
    kind: str,
    strategy: str,
    inputs: dict[str, Any] | None,
    name: str | None = None,
    scale_dtype: torch.dtype = torch.float32,
    model: PretrainedConfig = CONFIG,
) -> Format:
    """8-bit floats or integers as they are."""
    dtype, largest = {"float": (torch.float8_e4m3fn, 448), "int": (torch.int8, 127)}[kind]

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scales, spread = scales_of(weight, strategy, largest, scale_dtype)
        codes = weight / spread
        codes = (codes.round() if kind == "int" else codes).to(dtype)
        tensors = {"weight": codes, "weight_scale": scales}
        if inputs is not None and not inputs["dynamic"]:
            tensors["input_scale"] = torch.tensor([0.01])
        return tensors, codes.float() * spread

    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = [128, 128]
    config = compressed(name or f"{kind}-quantized", weights, inputs if inputs is None else inputs | {"type": kind})
    return Format(config, pack, model=model)


def scales_of(weight: Tensor, strategy: str, largest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scales as compressed-tensors stores them, and float32 [N or 1, K or 1], one for each number."""
    if strategy == "tensor":
        scales = (weight.abs().max() / largest).to(dtype).view(1)
        return scales, scales.float().view(1, 1)
    if strategy == "channel":
        scales = (weight.abs().amax(1, keepdim=True) / largest).to(dtype)
        return scales, scales.float()
    rows = []
    for some in weight.split(128):
        rows.append(torch.stack([block.abs().max() / largest for block in some.split(128, 1)]))
    scales = torch.stack(rows).to(dtype)
    spread = scales.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return scales, spread[: weight.size(0), : weight.size(1)]


def fp8(has_blocks: bool, is_static: bool = False, model: PretrainedConfig = CONFIG) -> Format:
    """quant_method "fp8"."""
    made = unpacked("float", "block" if has_blocks else "tensor", STATIC if is_static else None, model=model)

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, numbers = made.pack(name, weight)
        if has_blocks:
            tensors["weight_scale_inv"] = tensors.pop("weight_scale")
        return tensors, numbers

    config = {"quant_method": "fp8", "activation_scheme": "static" if is_static else "dynamic"}
    return Format(config | ({"weight_block_size": [128, 128]} if has_blocks else {}), pack, model=model)


TOKEN_GROUP = DYNAMIC | {"strategy": "group", "group_size": 128}
FORMATS = {
    "awq_32": awq(32),
    "awq_128": awq(128, version="GEMM"),
    "awq_rows": awq(-1),
    "awq_symmetric": awq(64, is_symmetric=True),
    "gptq_4": gptq(4, 64),
    "gptq_4_rows": gptq(4, -1),
    "gptq_4_zeros": gptq(4, 32, is_symmetric=False),
    "gptq_4_order": gptq(4, 32, is_symmetric=False, desc_act=True),
    "gptq_4_v2": gptq(4, 128, is_symmetric=False, version="gptq_v2"),
    "gptq_8": gptq(8, 64),
    "gptq_8_order": gptq(8, 32, is_symmetric=False, desc_act=True, version="gptq_v2"),
    "packed_4": packed(4, 128),
    "packed_4_zeros": packed(4, 32, is_symmetric=False, dtype=torch.float16),
    "packed_4_rows": packed(4, -1, dtype=torch.float32),
    "packed_4_order": packed(4, 32, actorder="group"),
    "packed_4_weight_order": packed(4, 64, actorder="weight"),
    "packed_8": packed(8, 32),
    "packed_8_zeros": packed(8, -1, is_symmetric=False),
    "int8_rows": unpacked("int", "channel", DYNAMIC),
    "int8_tensor": unpacked("int", "tensor", STATIC, scale_dtype=torch.bfloat16),
    "float_tensor": unpacked("float", "tensor", STATIC),
    "float_rows": unpacked("float", "channel", DYNAMIC, scale_dtype=torch.bfloat16),
    "float_blocks": unpacked("float", "block", TOKEN_GROUP),
    "naive_weights_only": unpacked("float", "channel", None, name="naive-quantized"),
    "fp8_blocks": fp8(has_blocks=True),
    "fp8_tensor": fp8(has_blocks=False),
    "fp8_static": fp8(has_blocks=False, is_static=True),
    "phi3_gptq_4_order": gptq(4, 32, is_symmetric=False, desc_act=True, model=PHI3),
    "phi3_awq": awq(64, model=PHI3),
    "phi3_packed_4": packed(4, 32, is_symmetric=False, model=PHI3),
    "phi3_float_rows": unpacked("float", "channel", DYNAMIC, model=PHI3),
    "phi3_fp8_blocks": fp8(has_blocks=True, model=PHI3),
    "phi3_fp8_static": fp8(has_blocks=False, is_static=True, model=PHI3),
}
