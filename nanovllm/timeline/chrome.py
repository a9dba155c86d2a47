"""A recorded run in the Trace Event Format, which chrome://tracing and ui.perfetto.dev show.

The format: "Trace Event Format", Google, 2016. Times are in microseconds.
"""

from typing import Any

HOST, STEPS, SEQUENCES = 1, 2, 3  # what is shown as processes


def chrome_events(run: dict[str, Any]) -> dict[str, Any]:
    """The run's events: what the host does, when steps are under way, and which sequences they compute."""
    events = [
        {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
        for pid, name in ((HOST, "host"), (STEPS, "steps under way"), (SEQUENCES, "sequences"))
    ]
    for number, step in enumerate(run["steps"]):
        begin = step["scheduling"]
        launched = step.get("launched", begin)  # not if the launch failed
        events.append(_event(f"launch step {number}", HOST, 0, begin, launched))
        events.append(_counter("KV blocks in use", begin, step["blocks_in_use"]))
        if "seen" not in step:
            continue
        events.append(_event(f"wait for step {number}", HOST, 0, step["awaiting"], step["seen"]))
        # Two steps may be under way at once, on two tracks.
        events.append(_event(f"step {number}", STEPS, number % 2, begin, step["seen"]))
        for seq_id, start, num_tokens, _ in step["parts"]:
            name = "decode" if num_tokens == 1 and start else f"{num_tokens} tokens"
            args = {"step": number, "start": start, "num_tokens": num_tokens}
            # A sequence's next step may have been launched before this one was seen.
            events.append(_event(name, SEQUENCES, seq_id, begin, launched) | {"args": args})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(name: str, pid: int, tid: int, begin: float, end: float) -> dict[str, Any]:
    microseconds = {"ts": round(begin * 1e6), "dur": round((end - begin) * 1e6)}
    return {"name": name, "ph": "X", "pid": pid, "tid": tid, **microseconds}


def _counter(name: str, at: float, value: int) -> dict[str, Any]:
    return {"name": name, "ph": "C", "pid": HOST, "ts": round(at * 1e6), "args": {"value": value}}
