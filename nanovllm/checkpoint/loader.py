"""Weights from safetensors files, each rank reading only its slices, straight into the fused parameters.

A parameter's `shards` say which slices of a checkpoint's tensors fill it: one for each tensor that it fuses, in the
order of the model's `packed_modules_mapping`, or just one. A parameter without shards is a whole tensor on each rank.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from nanovllm.checkpoint.files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Buffers that old checkpoints carry: tables and masks that are computed here. A tensor whose name ends in one of these
# components is passed over; any other that the model does not have is an error.
BUFFERS = (
    ".rotary_emb.inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".masked_bias",
    ".attn.bias",
    ".self_attn.bias",
)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
COMPARED_ROWS = 8192  # at a time, between which the engine may be told to stop


@dataclass(frozen=True)
class Shard:
    """Rows or columns [start, start + size) of a full tensor fill [offset, offset + size) of a parameter's `dim`."""

    full_shape: tuple[int, ...]
    dim: int
    start: int
    offset: int
    size: int


def load_model(model: nn.Module, folder: str, check: Callable[[], None] = lambda: None) -> None:
    """Fills every parameter of the model from the safetensors files of a folder.

    All names and shapes are checked before any data is read. `check` is called between tensors, to break off.

    Raises:
        ValueError: no or unreadable files; a missing, unexpected or mis-shaped tensor, by name; a head that is not the
            embedding that it is tied to.
    """
    targets = checkpoint_targets(model)
    found = find_tensors(folder)
    is_tied_copy = HEAD in found and HEAD not in targets
    unexpected = [name for name in found.keys() - targets.keys() if not f".{name}".endswith(BUFFERS)]
    if is_tied_copy:
        unexpected.remove(HEAD)
    for problem, names in (("lacks the", targets.keys() - found.keys()), ("has the unexpected", unexpected)):
        if names:
            raise ValueError(f"{folder} {problem} tensor {min(names)!r} ({len(names)} in all)")
    for name, (_, shard) in targets.items():
        if (shape := tuple(found[name].get_shape())) != shard.full_shape:
            raise ValueError(f"tensor {name!r} has shape {shape}, the model needs {shard.full_shape}")
    if is_tied_copy:
        check_tied_head(found[HEAD], found[EMBEDDING], targets[EMBEDDING][0].dtype, folder, check)
    for name, (parameter, shard) in targets.items():
        check()
        rows = slice(shard.start, shard.start + shard.size)
        source = found[name][rows] if shard.dim == 0 else found[name][:, rows]
        parameter.data.narrow(shard.dim, shard.offset, shard.size).copy_(source)


def check_tied_head(head: Any, embedding: Any, dtype: torch.dtype, folder: str, check: Callable[[], None]) -> None:
    """Raises ValueError unless two tensors of a file are the same in `dtype`.

    transformers 5 computes with both where they differ, though config.json ties them; older versions drop the head.
    """
    is_same = head.get_shape() == embedding.get_shape()
    for start in range(0, head.get_shape()[0] if is_same else 0, COMPARED_ROWS):
        check()
        rows = slice(start, start + COMPARED_ROWS)
        is_same = is_same and torch.equal(head[rows].to(dtype), embedding[rows].to(dtype))
    if not is_same:
        raise ValueError(
            f"{folder} has a tensor {HEAD!r} that differs from {EMBEDDING!r}, but its config.json has "
            "tie_word_embeddings=true; set that to false to use both, or remove the former"
        )


def checkpoint_targets(model: nn.Module) -> dict[str, tuple[nn.Parameter, Shard]]:
    """Each checkpoint tensor's name -> the parameter that it fills and how."""
    targets = {}
    for name, parameter in model.named_parameters():
        shards = getattr(parameter, "shards", [Shard(tuple(parameter.shape), 0, 0, 0, len(parameter))])
        module = name.split(".")[-2]
        sources = model.packed_modules_mapping.get(module, (module,))
        for source, shard in zip(sources, shards, strict=True):
            targets[name.replace(f"{module}.", f"{source}.")] = (parameter, shard)
    return targets


def find_tensors(folder: str) -> dict[str, Any]:
    """The tensors of a checkpoint by name, as slices that are yet to be read.

    As in transformers, model.safetensors counts, or else what model.safetensors.index.json names; other files, such as
    adapters or copies in another layout, do not. Without either, all safetensors files of the folder count together.

    Raises:
        ValueError: no or unreadable files, a damaged index, or two files with a tensor of one name.
    """
    single = os.path.join(folder, SINGLE_FILE)
    if os.path.isfile(single):
        return open_file(single)
    if os.path.isfile(os.path.join(folder, INDEX_FILE)):
        return find_indexed_tensors(folder)
    found, origins = {}, {}
    for file in sorted(os.listdir(folder)):
        path = os.path.join(folder, file)
        if not file.endswith(".safetensors") or file.startswith(".") or os.path.isdir(path):
            continue
        for name, tensor in open_file(path).items():
            if name in found:
                raise ValueError(
                    f"{folder} has the tensor {name!r} in {origins[name]} and in {file}, "
                    f"and neither {SINGLE_FILE} nor {INDEX_FILE}, which would say what counts"
                )
            found[name], origins[name] = tensor, file
    if not origins:
        raise ValueError(f"model={folder!r} has no safetensors files; other weight formats are not read")
    return found


def find_indexed_tensors(folder: str) -> dict[str, Any]:
    """The tensors that a folder's index names, each from the file that it is assigned to."""
    index = os.path.join(folder, INDEX_FILE)
    weight_map = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    if not is_map or not weight_map:
        raise ValueError(f"{index} must have a weight_map, an object that gives the file of each tensor")
    files = {file: open_file(os.path.join(folder, file)) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in files[file]:
            raise ValueError(f"{index} assigns the tensor {name!r} to {file}, which lacks it")
    return {name: files[file][name] for name, file in weight_map.items()}


def open_file(path: str) -> dict[str, Any]:
    """The tensors of a safetensors file by name, as slices that are yet to be read."""
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (a file is no dict)


def fill_dummy(model: nn.Module, seed: int) -> None:
    """Random weights for measurements: matrices normal with std 0.02, norms 1, biases 0."""
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02, generator=generator)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
