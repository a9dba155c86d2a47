"""Weights from safetensors files, each rank reading only its slices, straight into the fused parameters.

A parameter's `shards` say which slices of a checkpoint's tensors fill it: one for each tensor that it fuses, in the
order of the model's `packed_modules_mapping`, or just one. A parameter without shards is a whole tensor on each rank.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from glob import glob

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from nanovllm.config import read_json

# Some files repeat what the model has: rotary tables, or as the head a copy of the embedding that is tied to it.
REPEATED = ("rotary_emb.inv_freq", "lm_head.weight")


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
        ValueError: no or unreadable files; a missing, unexpected or mis-shaped tensor, by name.
    """
    targets = checkpoint_targets(model)
    found = {}
    for path in find_files(folder):
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
        found.update({name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118 (a file is no dict)
    unexpected = [name for name in found.keys() - targets.keys() if not name.endswith(REPEATED)]
    for problem, names in (("lacks the", targets.keys() - found.keys()), ("has the unexpected", unexpected)):
        if names:
            raise ValueError(f"{folder} {problem} tensor {min(names)!r} ({len(names)} in all)")
    for name, (_, shard) in targets.items():
        if (shape := tuple(found[name].get_shape())) != shard.full_shape:
            raise ValueError(f"tensor {name!r} has shape {shape}, the model needs {shard.full_shape}")
    for name, (parameter, shard) in targets.items():
        check()
        rows = slice(shard.start, shard.start + shard.size)
        source = found[name][rows] if shard.dim == 0 else found[name][:, rows]
        parameter.data.narrow(shard.dim, shard.offset, shard.size).copy_(source)


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


def find_files(folder: str) -> list[str]:
    """The safetensors files of a checkpoint: those that the index names, or the folder's."""
    index = read_json(os.path.join(folder, "model.safetensors.index.json"))
    names = sorted(set(index.get("weight_map", {}).values()))
    paths = [os.path.join(folder, name) for name in names] or sorted(glob(os.path.join(folder, "*.safetensors")))
    if not paths:
        raise ValueError(f"model={folder!r} has no safetensors files; other weight formats are not read")
    return paths


def fill_dummy(model: nn.Module, seed: int) -> None:
    """Random weights for measurements: matrices normal with std 0.02, norms 1, biases 0."""
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02, generator=generator)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
