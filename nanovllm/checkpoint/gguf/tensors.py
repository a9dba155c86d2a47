"""Tensors of GGUF files, dequantised where they are sliced. Knows nothing of models."""

import functools

import numpy as np
import torch
from torch import Tensor

from nanovllm.checkpoint.gguf.files import gguf_package
from nanovllm.checkpoint.gguf.header import Header

PACKED_BYTES = 2**22  # dequantised at a time, which bounds what numpy takes beside the result


class GGUFTensor:
    """A tensor of a file, of which a slice is dequantised when it is asked for.

    Attributes:
        shape: one or two dimensions.
        kind: the number of its type.
        rows: [rows, bytes of a row], uint8; a tensor of one dimension is one row.
        order: [shape[0]], int64, which of the file's rows, or elements, is where; None: as in the file.
        added: what the file added to each element.
    """

    def __init__(
        self, shape: tuple[int, ...], kind: int, rows: np.ndarray, order: np.ndarray | None = None, added: float = 0.0
    ) -> None:
        self.shape = shape
        self.kind = kind
        self.rows = rows
        self.order = order
        self.added = added

    def get_shape(self) -> list[int]:
        """The shape, as safetensors' slices have it."""
        return list(self.shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """The elements of a slice along each of the first dimensions, without steps; float32.

        Of two dimensions, only the rows that are asked for are dequantised, and of them the blocks.
        """
        first, *others = index if isinstance(index, tuple) else (index,)
        if len(self.shape) == 1:
            values = self._dequantise(self.rows)[0]
            return values[first] if self.order is None else values[self.order[first]]
        rows = self.rows[first if self.order is None else self.order[first]]
        if not others:
            return self._dequantise(rows)
        block_size, block_bytes = block_of(self.kind)
        start, stop, _ = others[0].indices(self.shape[1])
        first_block, end_block = start // block_size, -(-stop // block_size)
        values = self._dequantise(rows[:, first_block * block_bytes : end_block * block_bytes])
        offset = first_block * block_size
        return values[:, start - offset : stop - offset]

    def _dequantise(self, rows: np.ndarray) -> Tensor:
        """[rows, elements], float32, of rows of whole blocks."""
        gguf = gguf_package()
        kind = gguf.GGMLQuantizationType(self.kind)
        block_size, block_bytes = block_of(self.kind)
        values = torch.empty(len(rows), rows.shape[1] // block_bytes * block_size)
        step = max(1, PACKED_BYTES // max(1, rows.shape[1]))
        for start in range(0, len(rows) if values.numel() else 0, step):  # the package refuses no elements
            packed = np.ascontiguousarray(rows[start : start + step])
            values.numpy()[start : start + step] = gguf.dequantize(packed, kind)
        return values.sub_(self.added) if self.added else values


@functools.cache
def block_of(kind: int) -> tuple[int, int]:
    """How many elements of a type are packed together, and in how many bytes.

    Raises:
        ValueError: a type that the package gguf does not know or cannot dequantise.
    """
    gguf = gguf_package()
    try:
        named = gguf.GGMLQuantizationType(kind)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[named]
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), named)
    except ValueError as error:
        raise ValueError(f"tensors of type {kind} are not known to the package gguf that is installed") from error
    except NotImplementedError as error:
        raise ValueError(f"tensors of type {named.name} are not supported: the package gguf has no values") from error
    return block_size, block_bytes


def packed_rows(header: Header, name: str) -> np.ndarray:
    """The bytes of a tensor, [rows, bytes of a row], mapped from the file; all but its last dimension are rows.

    Raises:
        ValueError: naming the tensor: of another type than the package gguf dequantises, of rows that are no whole
            blocks, or beyond the file's end.
    """
    info = header.tensors[name]
    where = f"{header.path} has the tensor {name!r}"
    try:
        block_size, block_bytes = block_of(info.kind)
    except ValueError as error:
        raise ValueError(f"{where} that cannot be read: {error}") from error
    num_blocks, rest = divmod(info.shape[-1], block_size)
    if rest or not all(info.shape):
        raise ValueError(f"{where} of shape {info.shape}, whose rows must be of whole blocks of {block_size} elements")
    num_rows, row_bytes = 1, num_blocks * block_bytes
    for size in info.shape[:-1]:
        num_rows *= size
    end = info.offset + num_rows * row_bytes
    if end > len(info.data):
        raise ValueError(f"{where} up to byte {end}, but a file of {len(info.data)} bytes: it is truncated or damaged")
    return np.asarray(info.data)[info.offset : end].reshape(num_rows, row_bytes)
