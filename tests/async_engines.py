"""What tests do with an AsyncLLM: have its process misbehave or watch itself, and ask what is left in it.

Imported by that process, so it imports little.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from faults import FaultyRank, wait_until
from integrity import check_integrity

from nanovllm import LLM, AsyncLLM
from nanovllm.async_engine import engine_process
from nanovllm.parallel import ranks
from nanovllm.reports.metrics import PREFIX


@dataclass
class WatchedEngine:
    """Stands in for `run_engine`, and is sent to the engine's process: it checks itself whenever it tells metrics.

    Attributes:
        run_rank: stands in for that of its ranks.
        num_steps: how many it launches before one fails; None: none does.
    """

    run_rank: FaultyRank | None = None
    num_steps: int | None = None

    def __call__(self, *arguments: object) -> None:
        get_metrics, launch = LLM.get_metrics, LLM._launch

        def checked_get_metrics(llm: LLM) -> list:
            check_integrity(llm.scheduler)
            return get_metrics(llm)

        def failing_launch(llm: LLM) -> object:
            self.num_steps -= 1
            return launch(llm) if self.num_steps else 1 / 0

        LLM.get_metrics = checked_get_metrics
        if self.num_steps is not None:
            LLM._launch = failing_launch
        if self.run_rank is not None:
            ranks.run_rank = self.run_rank
        engine_process.run_engine(*arguments)


@contextmanager
def watched(model: str, engine: WatchedEngine | None = None, **options: object) -> Iterator[AsyncLLM]:
    """An AsyncLLM whose process is such an engine; closed at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_process, "run_engine", engine or WatchedEngine())
        llm = AsyncLLM(model, **options)
    yield llm
    llm.close()


def metric(llm: AsyncLLM, name: str, label: str | None = None) -> float:
    """A metric by its name, or the one of its labels."""
    (value,) = (
        metric.value
        for metric in llm.get_metrics()
        if metric.name == PREFIX + name and list(metric.labels.values()) == ([] if label is None else [label])
    )
    return value


def num_unfinished(llm: AsyncLLM) -> float:
    """Samples of the engine that have not ended."""
    return metric(llm, "num_requests_running") + metric(llm, "num_requests_waiting")


def check_nothing_left(llm: AsyncLLM) -> None:
    """All calls end soon, with no request left behind; then all blocks and rows are free."""
    assert wait_until(lambda: not num_unfinished(llm) and not llm.streams, 20)
    assert metric(llm, "kv_cache_usage_perc") == 0
