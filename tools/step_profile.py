"""Where the time of an engine's steps goes, by torch's profiler."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm import LLM

WARMUP_STEPS, STEPS = 3, 20


def profile(llm: LLM, first_step: int, path: str) -> None:
    """Writes a Chrome trace of some steps of the requests that were added and prints where their time went."""
    import torch
    from torch import profiler

    for _ in range(first_step):
        llm.step()
    window = profiler.schedule(wait=0, warmup=WARMUP_STEPS, active=STEPS, repeat=1)
    with profiler.profile(schedule=window) as trace:
        for _ in range(WARMUP_STEPS + STEPS):
            llm.step()
            trace.step()
    trace.export_chrome_trace(path)
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"} if torch.cuda.is_available() else {"cpu_op"}
    print(f"profile of {STEPS} steps in {path}:\n{summarise_trace(path, kinds)}")


def summarise_trace(path: str, categories: set[str]) -> str:
    """The share of the time in which any event of a Chrome trace's categories ran, and the ten longest by total."""
    events = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
    events = [event for event in events if event.get("ph") == "X" and event.get("cat") in categories]
    if not events:
        return "nothing ran in these steps"
    events.sort(key=lambda event: event["ts"])
    start = end = events[0]["ts"]
    busy, calls, totals = 0.0, Counter(), Counter()
    for event in events:
        event_end = event["ts"] + event["dur"]
        busy += max(0.0, event_end - max(end, event["ts"]))
        end = max(end, event_end)
        calls[event["name"]] += 1
        totals[event["name"]] += event["dur"]
    longest = [f"{us / 1000:9.3f} ms {calls[name]:6d} x {name[:90]}" for name, us in totals.most_common(10)]
    return "\n".join([f"busy for {100 * busy / (end - start):.1f}% of {(end - start) / 1000:.3f} ms", *longest])
