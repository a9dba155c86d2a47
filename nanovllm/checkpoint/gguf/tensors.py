"""Tensors of GGUF files, dequantised where they are sliced. Knows nothing of models."""

import functools
from typing import Any

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
        kind: its type, a gguf.GGMLQuantizationType.
        rows: [rows, bytes of a row], uint8; a tensor of one dimension is one row.
        order: [shape[0]], int64, which of the file's rows, or elements, is where; None: as in the file.
        added: what the file added to each element.
    """

    def __init__(
        self, shape: tuple[int, ...], kind: Any, rows: np.ndarray, order: np.ndarray | None = None, added: float = 0.0
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
        block_size, block_bytes = gguf_package().GGML_QUANT_SIZES[self.kind]
        start, stop, _ = others[0].indices(self.shape[1])
        first_block, end_block = start // block_size, -(-stop // block_size)
        values = self._dequantise(rows[:, first_block * block_bytes : end_block * block_bytes])
        offset = first_block * block_size
        return values[:, start - offset : stop - offset]

    def blocks(self, rows: slice) -> Tensor:
        """The bytes of some rows of a tensor of two dimensions, [rows, blocks, bytes of a block]."""
        rows = self.rows[rows if self.order is None else self.order[rows]]
        _block_size, block_bytes = gguf_package().GGML_QUANT_SIZES[self.kind]
        return torch.from_numpy(np.array(rows)).unflatten(1, (-1, block_bytes))

    def _dequantise(self, rows: np.ndarray) -> Tensor:
        """[rows, elements], float32, of rows of whole blocks."""
        gguf = gguf_package()
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        values = torch.empty(len(rows), rows.shape[1] // block_bytes * block_size)
        step = max(1, PACKED_BYTES // max(1, rows.shape[1]))
        for start in range(0, len(rows) if values.numel() else 0, step):  # the package refuses no elements
            packed = np.ascontiguousarray(rows[start : start + step])
            values.numpy()[start : start + step] = gguf.dequantize(packed, self.kind)
        return values.sub_(self.added) if self.added else values


def packed_rows(header: Header, name: str) -> np.ndarray:
    """The bytes of a tensor, [rows, bytes of a row].

    Raises:
        ValueError: naming the tensor: it is of a type that the package gguf does not dequantise.
    """
    info = header.tensors[name]
    if not has_values(info.kind):
        raise ValueError(
            f"{header.path} has the tensor {name!r} of type {info.kind.name}, of which the package gguf that is "
            "installed has no values"
        )
    return info.rows


@functools.cache
def has_values(kind: Any) -> bool:
    """Whether the package gguf can dequantise a type."""
    gguf = gguf_package()
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
