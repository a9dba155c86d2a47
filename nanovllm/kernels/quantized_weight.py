"""A weight in few bits, as the kernels take it, and what its numbers are. Knows nothing of checkpoints' formats."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nanovllm.kernels.e4m3 import E4M3, has_e4m3

INT4_RUN = 16  # codes that lie side by side in the low halves of bytes, those that follow them in the high halves


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [N, K], or one of each of E experts, [E, N, K]: number = (code - zero) * scale.

    Attributes:
        codes: float8_e4m3fn or int8, [..., N, K]; or uint8 [..., N, K / 2], two codes of 4 bits a byte, see
            `pack_int4`.
        scales: any float dtype, [..., ceil(N / block[0]), ceil(K / block[1])].
        block: the rows and columns of codes that have one scale; (1, K): each row has its own.
        zeros: any dtype, like scales; None: 8 of codes of 4 bits, 0 of others.
        order: int64 [K], the element of x that each column belongs to; None: its own.
        rounds_input: whether many rows are multiplied in 8 bits too, with a scale for each row, or for each block[1]
            elements of a row if weights have several; few rows, where reading weights is what takes time, never are.
        input_scale: float32 [1], the scale of all rows that are rounded; None: chosen for each.
        one: float32 [], 1, the scale that torch's products of codes ask for. It is made with the weight, as what is
            made in a step may be made in the capture of a graph, where nothing is computed.
    """

    codes: Tensor
    scales: Tensor
    block: tuple[int, int]
    zeros: Tensor | None = None
    order: Tensor | None = None
    rounds_input: bool = False
    input_scale: Tensor | None = None
    one: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.rounds_input:
            object.__setattr__(self, "one", torch.ones((), device=self.codes.device))

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def is_readable(self) -> bool:
        """Whether kernels can read the codes where they are; torch can, see `dequantize`."""
        return self.codes.dtype != E4M3 or has_e4m3(self.codes.device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        *rest, size = self.codes.shape
        return (*rest, size * 8 // self.bits)

    def __len__(self) -> int:
        return self.codes.size(0)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The numbers [..., N, K], rounded to a dtype, in the order of x's elements."""
        codes = (unpack_int4(self.codes) if self.bits == 4 else self.codes).float()
        if self.zeros is not None:
            codes -= self._spread(self.zeros)
        elif self.bits == 4:
            codes -= 8
        numbers = (codes * self._spread(self.scales)).to(dtype)
        if self.order is not None:
            numbers = torch.empty_like(numbers).index_copy_(-1, self.order, numbers)
        return numbers

    def in_order_of_columns(self, x: Tensor, norm: Tensor | None) -> tuple["QuantizedWeight", Tensor, Tensor | None]:
        """The weight without `order`, and rows x [M, K] and a norm's weight [K] in the order of its columns."""
        norm = norm if norm is None else norm[self.order]
        return replace(self, order=None), x.index_select(1, self.order), norm

    def _spread(self, values: Tensor) -> Tensor:
        """A value of each block -> float32 [..., N or 1, K or 1], one of each code."""
        num_rows, num_columns = self.shape[-2:]
        rows, columns = self.block
        values = values.float()
        if values.size(-1) > 1:
            values = values.repeat_interleave(columns, -1)[..., :num_columns]
        if rows > 1 and values.size(-2) > 1:
            values = values.repeat_interleave(rows, -2)[..., :num_rows, :]
        return values


def pack_int4(codes: Tensor) -> Tensor:
    """Codes of 4 bits, uint8 [..., K], K a multiple of 32 -> uint8 [..., K / 2].

    Of each 32 codes the first 16 are the low halves of 16 bytes and the others the high halves, so that a kernel that
    reads bytes has 16 neighbours in either.
    """
    low, high = codes.unflatten(-1, (-1, 2, INT4_RUN)).unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack_int4(packed: Tensor) -> Tensor:
    """The opposite of `pack_int4`."""
    runs = packed.unflatten(-1, (-1, INT4_RUN))
    return torch.stack((runs & 15, runs >> 4), dim=-2).flatten(-3)
