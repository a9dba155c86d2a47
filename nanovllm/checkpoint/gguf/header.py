"""The header of a GGUF file, read by the package gguf: its metadata, and its tensors, mapped from the file.

Knows nothing of models, nor how tensors are packed.
"""

import functools
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanovllm.checkpoint.gguf.files import gguf_package, parts_of

MAX_LENGTH = 2**21  # of a list: four times the merges of Gemma 3


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the file has it.

    Attributes:
        shape: as torch has it: elements along the last dimension are neighbours.
        kind: its type, a gguf.GGMLQuantizationType.
        rows: [rows, bytes of a row], uint8, mapped from the file; all but the last dimension are rows.
    """

    shape: tuple[int, ...]
    kind: Any
    rows: np.ndarray


@dataclass(frozen=True)
class Header:
    """What a GGUF file, or the parts of one, say before the tensors, and these.

    Attributes:
        path: of the file, or of the first part.
        metadata: values by key. A list of strings, such as the vocabulary, is not kept, only how many there are.
        tensors: by the name that the file gives them.
    """

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: str) -> Header:
    """The header of a file; of one that is split, named by any part, that of all its parts.

    Raises:
        ValueError: naming the file: no GGUF, of another version, big-endian, truncated or damaged, or a part is
            missing; or the package gguf is missing.
    """
    return _read_parts(tuple((part, os.stat(part).st_mtime_ns, os.stat(part).st_size) for part in parts_of(path)))


@functools.lru_cache(maxsize=2)  # a model's and a tokenizer's
def _read_parts(parts: tuple[tuple[str, int, int], ...]) -> Header:
    """The header of files by path, time of change and size.

    The package makes several arrays of each string: a vocabulary of 49,000 tokens with its merges takes 1.7 s, one of
    152,000 takes 6 s.
    """
    headers = [_read_file(path) for path, _, _ in parts]
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        if twice := tensors.keys() & header.tensors.keys():
            raise ValueError(f"{header.path} has the tensor {min(twice)!r}, which an earlier part has too")
        tensors |= header.tensors
    return Header(headers[0].path, headers[0].metadata, tensors)


def _read_file(path: str) -> Header:
    gguf = gguf_package()

    class Reader(gguf.GGUFReader):
        """The package's, which would make arrays of as many values as a damaged length says, beyond a file's end."""

        def _get_field_parts(self, offset: int, kind: int) -> tuple[Any, ...]:
            if kind == gguf.GGUFValueType.ARRAY and (length := self._get(offset + 4, np.uint64)[0]) > MAX_LENGTH:
                raise ValueError(f"it has a list of {length} values")
            return super()._get_field_parts(offset, kind)

    try:
        reader = Reader(path)
        if reader.byte_order == "S":
            raise ValueError("it is big-endian")
        strings = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]
        metadata = {
            key: len(field.data) if field.types == strings else field.contents()
            for key, field in reader.fields.items()
        }
        tensors = {tensor.name: _info_of(tensor) for tensor in reader.tensors}
    except Exception as error:  # of many kinds, by what is damaged
        raise ValueError(f"{path} is no GGUF file that can be read, or is truncated or damaged: {error}") from error
    return Header(path, metadata, tensors)


def _info_of(tensor: Any) -> TensorInfo:
    """What a gguf.ReaderTensor says."""
    shape = tuple(tensor.shape[::-1].tolist())
    if not shape or not all(shape):
        raise ValueError(f"the tensor {tensor.name!r} of shape {shape} has no elements")
    rows = np.asarray(tensor.data).view(np.uint8).reshape(math.prod(shape[:-1]), -1)
    return TensorInfo(shape, tensor.tensor_type, rows)
