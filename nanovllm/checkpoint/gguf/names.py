"""The tensors of a GGUF file under the names that the engine's models have for them."""

import re

import numpy as np

from nanovllm.checkpoint.facts import JsonFacts
from nanovllm.checkpoint.gguf.architectures import ARCHITECTURES, architecture_of
from nanovllm.checkpoint.gguf.files import gguf_package
from nanovllm.checkpoint.gguf.header import read_header
from nanovllm.checkpoint.gguf.tensors import GGUFTensor, packed_rows

# What models may have. The package gguf knows what files of an architecture call it.
MODULES = ("model.embed_tokens", "model.norm", "lm_head")
LAYER = "model.layers.0."
EXPERTS = "mlp.experts."
LAYER_MODULES = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "mlp.gate",
    f"{EXPERTS}gate_proj",
    f"{EXPERTS}up_proj",
    f"{EXPERTS}down_proj",
    "mlp.shared_expert.gate_proj",
    "mlp.shared_expert.up_proj",
    "mlp.shared_expert.down_proj",
    "mlp.shared_expert_gate",
)
FUSED_MODULES = ("self_attn.qkv_proj", "mlp.gate_up_proj")
TENSOR_NAME = re.compile(r"(blk\.(\d+)\.)?(\w+)\.(weight|bias)")
HEAD_COUNTS = {"self_attn.q_proj": "head_count", "self_attn.k_proj": "head_count_kv"}
# Of the rotary embedding: they are part of the config.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def find_gguf_tensors(path: str) -> dict[str, GGUFTensor]:
    """The tensors of a file, or of all parts of a split one, by the models' names.

    All experts of a layer are one tensor in the file; here each has its own. A tensor that no model of the file's
    architecture has keeps the file's name for it.

    Raises:
        ValueError: the package gguf is missing; the file is damaged or truncated, or its architecture or the type of a
            tensor is not supported, by name.
    """
    header = read_header(path)
    name, architecture = architecture_of(header)
    modules = module_names(name)
    facts = JsonFacts(header.path, header.metadata)
    tensors: dict[str, GGUFTensor] = {}
    for file_name, info in header.tensors.items():
        if file_name in ROPE_TENSORS:
            continue
        rows = packed_rows(header, file_name)
        match = TENSOR_NAME.fullmatch(file_name)
        layer, module, kind = match.group(2, 3, 4) if match else (None, None, None)
        module = modules.get((layer is not None, module))
        if module is None:
            tensors[file_name] = GGUFTensor(info.shape, info.kind, rows)
        elif module.startswith(EXPERTS):
            projection = module.removeprefix(EXPERTS)
            for expert, its_rows in enumerate(np.split(rows, info.shape[0])):
                its_name = f"model.layers.{layer}.{EXPERTS}{expert}.{projection}.{kind}"
                tensors[its_name] = GGUFTensor(info.shape[1:], info.kind, its_rows)
        else:
            order = None
            if architecture.permutes and module in HEAD_COUNTS:
                all_heads = facts.size(f"{name}.attention.head_count")
                num_heads = facts.size(f"{name}.attention.{HEAD_COUNTS[module]}", all_heads)
                order = halves_of_pairs(info.shape[0], num_heads, f"{file_name!r} in {header.path}")
            # A matrix of one row, which some files have as the row.
            is_row = module == "mlp.shared_expert_gate" and len(info.shape) == 1
            shape = (1, *info.shape) if is_row else info.shape
            added = 1.0 if architecture.adds_one and module.endswith("norm") else 0.0
            full_name = f"{module}.{kind}" if layer is None else f"model.layers.{layer}.{module}.{kind}"
            tensors[full_name] = GGUFTensor(shape, info.kind, rows, order, added)
    return tensors


def module_names(architecture: str) -> dict[tuple[bool, str], str]:
    """The models' names of modules by whether they are in a layer and what files of an architecture call them."""
    gguf = gguf_package()
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ValueError(f"general.architecture={architecture!r} is not known to the package gguf that is installed")
    names = gguf.get_tensor_name_map(known[architecture], 1)
    # Theirs has one name for up_proj and for gate_up_proj, of which the latter is meant where there is one.
    fused = FUSED_MODULES if ARCHITECTURES[architecture].is_fused else ()
    modules = {}
    for module in (*LAYER_MODULES, *fused):
        if (theirs := names.get_name(LAYER + module)) is not None:
            modules[True, theirs.removeprefix("blk.0.")] = module
    for module in MODULES:
        if (theirs := names.get_name(module)) is not None:
            modules[False, theirs] = module
    return modules


def halves_of_pairs(size: int, num_heads: int, what: str) -> np.ndarray:
    """Where, in heads of (x, y) pairs, the rows of heads are that have all x first, then all y; [size], int64.

    Raises:
        ValueError: the rows are not those of so many heads.
    """
    if size % (2 * num_heads):
        raise ValueError(f"{what} has {size} rows, which {num_heads} heads of pairs cannot share")
    return np.arange(size).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)
