"""What a row of the device's batch has of its request's sampling parameters. Nothing here knows of steps."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.engine.sequence import Sequence

COLDEST = 1e-5  # colder draws are greedy, and logits / temperature might overflow


def row_ints(seq: "Sequence") -> tuple[int, ...]:
    """What `DeviceRows.row_ints` has of a sequence."""
    adjustment = seq.adjustment
    least_length, flags = (adjustment.min_length, adjustment.flags) if adjustment is not None else (0, 0)
    return seq.sampling_params.top_k, _as_int64(seq.seed), least_length, flags


def row_floats(seq: "Sequence") -> tuple[float, ...]:
    """What `DeviceRows.row_floats` has of a sequence."""
    params = seq.sampling_params
    temperature = params.temperature if params.temperature >= COLDEST else 0.0
    penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
    return temperature, params.top_p, params.min_p, *penalties


def _as_int64(seed: int) -> int:
    """The signed number with the bits of an unsigned one, modulo 2**64."""
    return (seed + 2**63) % 2**64 - 2**63
