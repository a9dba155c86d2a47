"""What each sequence of a recorded run does in each step."""

from enum import Enum
from typing import Any, NamedTuple


class State(Enum):
    """What a sequence does in a step, and the colour of it."""

    WAITING = "#d9d9d9"
    PREEMPTED = "#e5697a"
    PREFILL = "#4878cf"
    CACHED = "#f2a73b"  # prefill whose first tokens were found in the prefix cache
    DECODE = "#5aa469"
    SURPLUS = "#222222"
    IDLE = "#f3e9c6"  # runs, but has nothing to compute in the step


LABELS = {
    State.WAITING: "waiting",
    State.PREEMPTED: "preempted, waiting again",
    State.PREFILL: "prefill",
    State.CACHED: "found in the cache",
    State.DECODE: "decode",
    State.SURPLUS: "surplus: its end was seen late",
    State.IDLE: "no part in the step",
}


class Cell(NamedTuple):
    """What a sequence does in a step: how many tokens it computes from which position on."""

    state: State
    start: int = 0
    num_tokens: int = 0


def states_of(run: dict[str, Any]) -> dict[int, dict[int, Cell]]:
    """Of each sequence, by its id, its cells by the numbers of the steps in which it was there."""
    steps = run["steps"]
    cells: dict[int, dict[int, Cell]] = {}
    for text_id, seq in run["sequences"].items():
        seq_id = int(text_id)
        end = len(steps) if seq["ended"] is None else seq["ended"]
        row, absent = {}, State.WAITING
        for number in range(seq["added"], end):
            step = steps[number]
            if seq_id in step["preempted"]:
                absent = State.PREEMPTED
            row[number] = _cell(step, seq_id, absent)
            if seq_id in step["joined"]:
                absent = State.IDLE
        cells[seq_id] = row
    return cells


def _cell(step: dict[str, Any], seq_id: int, absent: State) -> Cell:
    part = next((part for part in step["parts"] if part[0] == seq_id), None)
    if part is None:
        return Cell(absent)
    _, start, num_tokens, is_sampled = part
    took_in = seq_id in dict(step.get("tokens", []))
    if is_sampled and not took_in:
        return Cell(State.SURPLUS, start, num_tokens)
    if seq_id in step["joined"]:
        return Cell(State.CACHED if start else State.PREFILL, start, num_tokens)
    return Cell(State.DECODE if num_tokens == 1 and is_sampled else State.PREFILL, start, num_tokens)
