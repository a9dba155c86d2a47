"""A recorded run as one SVG: sequences are rows, steps columns; below, the KV cache, tokens and time of each step."""

from collections.abc import Iterator
from html import escape
from itertools import groupby
from typing import Any

from nanovllm.timeline.states import LABELS, Cell, State, states_of

LEFT, TOP, ROW, PANEL, GAP = 92, 52, 16, 56, 30
WIDTH = 1000  # of the columns, which have whole pixels where there are few


def draw_svg(run: dict[str, Any], title: str) -> str:
    """The picture; it needs no other file.

    Raises:
        ValueError: the run has no steps.
    """
    steps = run["steps"]
    if not steps:
        raise ValueError("the run has no steps, there is nothing to draw")
    column = min(max(WIDTH / len(steps), 0.5), 24)
    cells = states_of(run)
    panels_top = TOP + ROW * len(cells) + GAP
    panels = list(_panels(run))
    height = panels_top + (PANEL + GAP) * len(panels)
    width = LEFT + column * len(steps) + 20
    body = [_text(LEFT, 18, title, size=14), *_legend(cells)]
    for index, (seq_id, row) in enumerate(cells.items()):
        body.append(_text(LEFT - 6, TOP + ROW * index + 11, f"sequence {seq_id}", anchor="end"))
        body += _row(row, TOP + ROW * index, column)
    for index, (label, values, limit, unit) in enumerate(panels):
        body += _bars(label, values, limit, unit, panels_top + (PANEL + GAP) * index, column)
    body += _axis(len(steps), height - 12, column)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(width, 760):.0f} {height}" '
        'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _row(row: dict[int, Cell], top: int, column: float) -> Iterator[str]:
    """A sequence's cells; neighbours that only wait or decode are one rectangle."""

    def kind(item: tuple[int, Cell]) -> Any:
        number, cell = item
        return number if cell.state in (State.PREFILL, State.CACHED) else cell.state

    for _, group in groupby(row.items(), kind):
        members = list(group)
        (first, cell), count = members[0], len(members)
        left, width, height = LEFT + column * first, column * count, ROW - 2
        tip = f"step {first}" if count == 1 else f"steps {first} to {first + count - 1}"
        tip = f"{tip}: {LABELS[cell.state]}"
        if cell.num_tokens:
            last = members[-1][1]
            tip += f", positions {cell.start} to {last.start + last.num_tokens - 1}"
        if cell.state is State.CACHED:  # the share that was found
            found = height * cell.start / (cell.start + cell.num_tokens)
            yield _rect(left, top, width, found, State.CACHED, tip)
            yield _rect(left, top + found, width, height - found, State.PREFILL, tip)
        else:
            yield _rect(left, top, width, height, cell.state, tip)


def _panels(run: dict[str, Any]) -> Iterator[tuple[str, list[float], float | None, str]]:
    """What is drawn below the rows: a name, the values of the steps, their limit, their unit."""
    steps, engine = run["steps"], run["engine"]
    used = [step["blocks_in_use"] for step in steps]
    # A cache that is never a quarter full would show as an empty panel.
    limit = engine["num_blocks"] if max(used) * 4 > engine["num_blocks"] else None
    yield f"KV blocks in use (of {engine['num_blocks']})", used, limit, ""
    tokens = [num_computed(step) for step in steps]
    yield f"tokens computed (at most {engine['max_num_batched_tokens']})", tokens, None, ""
    yield "time to schedule, launch and wait", [1000 * seconds for seconds in step_seconds(steps)], None, " ms"


def num_computed(step: dict[str, Any]) -> int:
    """The tokens that a step computes, drafts included."""
    return sum(num_tokens + step["num_drafts"] for _, _, num_tokens, _ in step["parts"])


def step_seconds(steps: list[dict[str, Any]]) -> list[float]:
    """What each step took the host: to schedule and launch it, and to wait for its tokens."""
    return [_between(step, "scheduling", "launched") + _between(step, "awaiting", "seen") for step in steps]


def _between(step: dict[str, Any], begin: str, end: str) -> float:
    return step[end] - step[begin] if end in step else 0.0


def _bars(label: str, values: list[float], limit: float | None, unit: str, top: int, column: float) -> Iterator[str]:
    highest = max(limit or 0, *values) or 1
    yield _text(LEFT, top - 5, label)
    yield _text(LEFT - 6, top + 9, f"{highest:.4g}{unit}", anchor="end")
    yield _text(LEFT - 6, top + PANEL, "0", anchor="end")
    outline = [f"M{LEFT} {top + PANEL}"]
    for index, value in enumerate(values):
        y = top + PANEL - PANEL * value / highest
        outline.append(f"V{y:.1f}H{LEFT + column * (index + 1):.1f}")
    yield f'<path d="{"".join(outline)}V{top + PANEL}Z" fill="#9aa7b8"/>'
    if limit:
        yield f'<path d="M{LEFT} {top}h{column * len(values):.1f}" stroke="#c0392b" stroke-dasharray="4 3"/>'


def _axis(num_steps: int, y: int, column: float) -> Iterator[str]:
    stride = next(stride for stride in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**4) if stride * column >= 28)
    for number in range(0, num_steps, stride):
        yield _text(LEFT + column * (number + 0.5), y, str(number), anchor="middle")
    yield _text(LEFT - 6, y, "step", anchor="end")


def _legend(cells: dict[int, dict[int, Cell]]) -> Iterator[str]:
    states = {cell.state for row in cells.values() for cell in row.values()}
    left = LEFT
    for state, label in LABELS.items():
        if state in states:
            yield _rect(left, 28, 11, 11, state, label)
            yield _text(left + 15, 38, label)
            left += 34 + 6 * len(label)


def _rect(left: float, top: float, width: float, height: float, state: State, tip: str) -> str:
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(width - 0.5, 0.4):.1f}" height="{height:.1f}" '
        f'fill="{state.value}"><title>{escape(tip)}</title></rect>'
    )


def _text(left: float, y: float, text: str, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{left:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
