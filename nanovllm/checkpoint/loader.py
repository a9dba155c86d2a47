"""Weights from safetensors or GGUF files, each rank reading only its slices, straight into the fused parameters.

A parameter's `shards` say which slices of a checkpoint's tensors fill it: one for each tensor that it fuses, in the
order of the model's `packed_modules_mapping`, or just one. A parameter without shards is a whole tensor on each rank.
A parameter of experts has those of one expert. Checkpoints have several layouts: a model's `checkpoint_layouts` are
other names of its tensors, and what is fused here may be fused there, or all experts be one tensor.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from nanovllm.checkpoint.files import read_json, why_damaged
from nanovllm.checkpoint.gguf.files import is_gguf
from nanovllm.checkpoint.gguf.names import find_gguf_tensors
from nanovllm.checkpoint.kv_scales import SCALES
from nanovllm.kernels.e4m3 import E4M3, E4M3_MAX

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
# Of parameters that hold codes, which no conversion keeps: what safetensors calls their dtypes.
CODES_DTYPES = {E4M3: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32"}
EXPERTS_SCALES = ("_scale_inv", "_scale")  # ends of a weight's name, with scales in place of the codes of all experts
DUMMY_STD = 100.0  # of codes in e4m3
ROWS_AT_ONCE = 8192  # of a matrix that is compared, or filled


@dataclass(frozen=True)
class Shard:
    """Elements [start, start + size) along `dim` of a checkpoint's tensor fill [offset, offset + size) of a parameter.

    Attributes:
        full_shape: of the checkpoint's tensor.
        expert: whose weights the tensor has, if those of one out of a parameter's.
        added: to each element, in the parameter's dtype.
    """

    is_copied: ClassVar[bool] = True  # element by element, so that dtypes must fit
    is_joined: ClassVar[bool] = True  # of matrices that a checkpoint has as one, it has the elements behind each other
    full_shape: tuple[int, ...]
    dim: int
    start: int
    offset: int
    size: int
    expert: int | None = None
    added: float = 0.0

    def copy(self, source: Any, parameter: nn.Parameter) -> None:
        """Copies a slice of the tensor, of which nothing else is read."""
        place = parameter.data if self.expert is None else parameter.data[self.expert]
        slices = (slice(None),) * self.dim + (slice(self.start, self.start + self.size),)
        place = place.narrow(self.dim, self.offset, self.size).copy_(source[slices])
        if self.added:
            place += self.added


@dataclass(frozen=True)
class ScalarShard(Shard):
    """One number of a parameter, from a tensor that has one: of shape () or (1,)."""

    is_joined: ClassVar[bool] = False

    def copy(self, source: Any, parameter: nn.Parameter) -> None:
        parameter.data[self.offset] = source[()].item()


@dataclass(frozen=True)
class VectorShard(Shard):
    """Some elements of a parameter, [N], from a tensor that matrices which a checkpoint has as one have in common."""

    is_joined: ClassVar[bool] = False


def load_model(model: nn.Module, folder: str, check: Callable[[], None] = lambda: None) -> None:
    """Fills every parameter of the model from the safetensors files of a folder, or from a GGUF file.

    All names and shapes are checked before any data is read. `check` is called between tensors, to break off.

    Raises:
        ValueError: no or unreadable files; a missing, unexpected or mis-shaped tensor, by name; a head that is not the
            embedding that it is tied to.
    """
    found = model_tensors(model, folder)
    targets = checkpoint_targets(model, found)
    head, embedding = (original_name(model, name, found) for name in (HEAD, EMBEDDING))
    is_tied_copy = head in found and head not in targets
    if is_tied_copy and embedding not in found:  # of two names for one tensor, some programs save the first
        found[embedding], is_tied_copy = found.pop(head), False
    passed_over = [head] if is_tied_copy else []
    passed_over += [name for name in found if f".{name}".endswith(BUFFERS + SCALES)]
    unexpected = found.keys() - targets.keys() - set(passed_over)
    unexpected = {name for name in unexpected if not is_empty_bias(name, found)}
    problems = (("lacks the", targets.keys() - found.keys()), ("has the unexpected", unexpected))
    texts = [f"{problem} tensor {min(names)!r} ({len(names)} in all)" for problem, names in problems if names]
    if texts:  # both, where names have a prefix
        raise ValueError(f"{folder} {' and '.join(texts)}")
    for name, places in targets.items():
        shape, needed = tuple(found[name].get_shape()), places[0][1].full_shape
        if shape != needed and (needed, shape) != ((), (1,)):  # a number may be written either way
            raise ValueError(f"tensor {name!r} has shape {shape}, the model needs {needed}")
        codes_dtype = CODES_DTYPES.get(places[0][0].dtype) if places[0][1].is_copied else None
        if codes_dtype is not None and found[name].get_dtype() != codes_dtype:
            raise ValueError(f"tensor {name!r} has dtype {found[name].get_dtype()}, the model needs {codes_dtype}")
    if is_tied_copy:
        check_tied_head(found[head], found[embedding], targets[embedding][0][0].dtype, folder, check)
    for name, places in targets.items():
        check()
        for parameter, shard in places:
            shard.copy(found[name], parameter)


def is_empty_bias(name: str, found: Mapping[str, Any]) -> bool:
    """Whether a tensor is a bias of zeros, which AutoGPTQ gives each quantised matrix, be there none in the model."""
    module = name.removesuffix(".bias")
    return module != name and f"{module}.qweight" in found and not found[name][:].any()


def check_tied_head(head: Any, embedding: Any, dtype: torch.dtype, folder: str, check: Callable[[], None]) -> None:
    """Raises ValueError unless two tensors of a file are the same in `dtype`.

    transformers 5 computes with both where they differ, though config.json ties them; older versions drop the head.
    """
    is_same = head.get_shape() == embedding.get_shape()
    for start in range(0, head.get_shape()[0] if is_same else 0, ROWS_AT_ONCE):
        check()
        rows = slice(start, start + ROWS_AT_ONCE)
        is_same = is_same and torch.equal(head[rows].to(dtype), embedding[rows].to(dtype))
    if not is_same:
        raise ValueError(
            f"{folder} has a tensor {HEAD!r} that differs from {EMBEDDING!r}, but its config.json has "
            "tie_word_embeddings=true; set that to false to use both, or remove the former"
        )


def checkpoint_targets(model: nn.Module, names: Collection[str]) -> Mapping[str, list[tuple[nn.Parameter, Shard]]]:
    """Each tensor that a checkpoint with tensors of these names must have -> the parameters that it fills and how."""
    targets = defaultdict(list)
    for name, parameter in model.named_parameters():
        for source, shard in _sources(model, name, parameter, names):
            targets[source].append((parameter, shard))
    return targets


def _sources(
    model: nn.Module, name: str, parameter: nn.Parameter, names: Collection[str]
) -> Iterator[tuple[str, Shard]]:
    """The tensors of a checkpoint that fill a parameter, and how."""
    shards = getattr(parameter, "shards", [Shard(tuple(parameter.shape), 0, 0, 0, len(parameter))])
    has_experts = parameter.dim() > max(len(shards[0].full_shape), 1)  # numbers are side by side in a parameter
    path, kind = name.rsplit(".", 1)
    if has_experts:  # "experts.down_proj" and "experts.down_proj_scale_inv"
        suffix = next((suffix for suffix in EXPERTS_SCALES if name.endswith(suffix)), "")
        path, kind = name.removesuffix(suffix), f"weight{suffix}"
    *before, module = path.split(".")
    own_name = original_name(model, name, names)
    if own_name in names or not (has_experts or module in model.packed_modules_mapping):
        for shard in _fused(shards, len(parameter) if has_experts else None):
            yield own_name, shard
        return
    for expert in range(len(parameter)) if has_experts else [None]:
        number = [] if expert is None else [str(expert)]
        for source, shard in zip(model.packed_modules_mapping.get(module, (module,)), shards, strict=True):
            source_name = ".".join([*before, *number, source, kind])
            yield original_name(model, source_name, names), replace(shard, expert=expert)


def _fused(shards: list[Shard], num_experts: int | None) -> Iterator[Shard]:
    """The shards of one tensor that has the tensors of several behind each other, perhaps of all experts."""
    if not shards[0].is_joined:
        yield from shards
        return
    dim, start = shards[0].dim, 0
    shape = list(shards[0].full_shape)
    shape[dim] = sum(shard.full_shape[dim] for shard in shards)
    experts = [] if num_experts is None else [num_experts]
    for shard in shards:
        yield replace(shard, full_shape=(*experts, *shape), dim=len(experts) + dim, start=start + shard.start)
        start += shard.full_shape[dim]


def original_name(model: nn.Module, name: str, names: Collection[str]) -> str:
    """What a checkpoint with tensors of these names calls one of the model's: in the first layout that has it."""
    spellings = spellings_of(model, name)
    return next((spelling for spelling in spellings if spelling in names), spellings[-1])


def spellings_of(model: nn.Module, name: str) -> list[str]:
    """What checkpoints call one of the model's tensors: as it does, then in each of the model's layouts."""
    spellings = [name]
    for layout in model.checkpoint_layouts:
        spelling = name
        for ours, theirs in layout.items():
            spelling = spelling.replace(ours, theirs)
        spellings.append(spelling)
    return spellings


def model_tensors(model: nn.Module, folder: str) -> dict[str, Any]:
    """Those of `find_tensors` that may be the model's: without its `ignored_tensors`."""
    return {name: x for name, x in find_tensors(folder).items() if not name.startswith(model.ignored_tensors)}


def find_tensors(folder: str) -> dict[str, Any]:
    """The tensors of a checkpoint, a folder or a GGUF file, by name, as slices that are yet to be read.

    As in transformers, model.safetensors counts, or else what model.safetensors.index.json names; other files, such as
    adapters or copies in another layout, do not. Without either, all safetensors files of the folder count together.

    Raises:
        ValueError: no or unreadable files, a damaged index, or two files with a tensor of one name.
    """
    if is_gguf(folder):
        return find_gguf_tensors(folder)
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
        raise ValueError(
            f"model={folder!r} has no safetensors files, nor one GGUF file; other weight formats are not read"
        )
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
        raise ValueError(f"{path} cannot be read as safetensors: {error}{why_damaged(path)}") from error
    return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (a file is no dict)


def fill_dummy(model: nn.Module, seed: int) -> None:
    """Random weights for measurements: matrices normal with std 0.02, norms 1, biases 0.

    Codes of quantised weights are random too. What else belongs to them has its value in an attribute `dummy`.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "dummy"):
            parameter.data.copy_(torch.as_tensor(parameter.dummy))
        elif parameter.dtype == E4M3:
            for rows in parameter.data.flatten(0, -2).split(ROWS_AT_ONCE):
                numbers = torch.empty_like(rows, dtype=torch.float16).normal_(0, DUMMY_STD, generator=generator)
                rows.copy_(numbers.clamp_(-E4M3_MAX, E4M3_MAX))
        elif not parameter.is_floating_point():
            parameter.data.view(torch.uint8).random_(generator=generator)
        elif parameter.dim() > 1:
            parameter.data.normal_(0, 0.02, generator=generator)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
