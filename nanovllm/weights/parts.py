"""Which rows or columns of a weight a tensor-parallel rank has."""

from typing import NamedTuple

from nanovllm.parallel.tensor_parallel import TensorParallel


class Part(NamedTuple):
    """A rank's rows [start, start + size) of a weight that has full_size of them."""

    full_size: int
    start: int
    size: int


def part_of(full_size: int, tp: TensorParallel) -> Part:
    """The rank's part of a weight's rows or columns; where they do not divide, the last rank has fewer."""
    size = -(-full_size // tp.size)
    start = min(tp.rank * size, full_size)
    return Part(full_size, start, min(size, full_size - start))


def check_blocks(name: str, part: Part, size: int, tp: TensorParallel) -> None:
    """Raises ValueError if the rank's part of a weight cuts a block of so many rows or columns."""
    end = part.start + part.size
    if part.start % size or (end % size and end != part.full_size):
        raise ValueError(
            f"tensor_parallel_size={tp.size} would cut a block of {size}: a rank's part of {name} begins "
            f"at {part.start} and ends at {end} of {part.full_size}"
        )
