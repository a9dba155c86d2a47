"""The header of a GGUF file: its metadata, and where its tensors are.

Knows nothing of models, nor how tensors are packed. The package gguf reads headers too, but makes several arrays of
each string: of a vocabulary of 49,000 tokens in 1.9 s, of which a start would take it two or three times.
"""

import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanovllm.checkpoint.gguf.files import parts_of

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is.

    Attributes:
        shape: as torch has it: elements along the last dimension are neighbours.
        kind: the number of its type.
        data: all bytes of its file.
        offset: of its first byte.
    """

    shape: tuple[int, ...]
    kind: int
    data: np.ndarray
    offset: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file, or the parts of one, say before the tensors.

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
        ValueError: naming the file: no GGUF, of another version, truncated or damaged, or a part is missing.
    """
    headers = [_HeaderReader(file).read() for file in parts_of(path)]
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        if twice := tensors.keys() & header.tensors.keys():
            raise ValueError(f"{header.path} has the tensor {min(twice)!r}, which an earlier part has too")
        tensors |= header.tensors
    return Header(headers[0].path, headers[0].metadata, tensors)


class _HeaderReader:
    """Reads a header from its beginning to its end."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.data = np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.empty(0, np.uint8)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        self.bytes = memoryview(self.data)
        self.position = 0

    def read(self) -> Header:
        if bytes(self.bytes[:4]) != MAGIC:
            raise ValueError(f"{self.path} is no GGUF file: it does not begin with {MAGIC!r}")
        self.position = 4
        version = self._number("I")
        if version not in VERSIONS:  # the bytes of big-endian files are swapped
            raise ValueError(f"{self.path} is GGUF of version {version}, read are {VERSIONS}, little-endian")
        num_tensors, num_values = self._number("Q"), self._number("Q")
        metadata = {}
        for _ in range(num_values):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        infos = {}
        for _ in range(num_tensors):
            name = self._string()
            if name in infos:
                raise ValueError(f"{self.path} has the tensor {name!r} twice")
            num_dims = self._number("I")
            if not 1 <= num_dims <= MAX_DIMS:
                raise ValueError(f"{self.path} has the tensor {name!r} with {num_dims} dimensions, of 1 to {MAX_DIMS}")
            shape = tuple(self._number("Q") for _ in range(num_dims))[::-1]
            infos[name] = shape, self._number("I"), self._number("Q")
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment must be an integer above 0, got {alignment!r} ({self.path})")
        start = -(-self.position // alignment) * alignment
        tensors = {
            name: TensorInfo(shape, kind, self.data, start + offset) for name, (shape, kind, offset) in infos.items()
        }
        return Header(self.path, metadata, tensors)

    def _take(self, size: int) -> memoryview:
        """The next bytes."""
        end = self.position + size
        if end > len(self.bytes):
            raise ValueError(f"{self.path} ends within its header: it is truncated or damaged")
        taken = self.bytes[self.position : end]
        self.position = end
        return taken

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        try:
            return str(self._take(self._number("Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} has a name or a text that is not UTF-8: {error}") from error

    def _value(self, kind: int) -> Any:
        """A value of the metadata."""
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._number(self._code(kind))
        kind, count = self._number("I"), self._number("Q")
        if kind == STRING:
            for _ in range(count):
                self._take(self._number("Q"))
            return count
        code = f"<{count}{self._code(kind)}"
        return list(struct.unpack(code, self._take(count * struct.calcsize("<" + self._code(kind)))))

    def _code(self, kind: int) -> str:
        if kind not in NUMBERS:
            raise ValueError(f"{self.path} has metadata of the unknown type {kind}")
        return NUMBERS[kind]
