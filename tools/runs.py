"""What is asked of an engine, and what it took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Request:
    """Token ids to complete with exactly `max_tokens` tokens, and what it has of sampling parameters of its own."""

    prompt: list[int]
    max_tokens: int
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What one repeat took: seconds, and means over requests in seconds, None where the engine does not tell."""

    output_tokens: int
    seconds: float
    tokens_per_second: float
    time_to_first_token: float | None = None
    time_per_output_token: float | None = None  # after the first
    num_draft_tokens: int = 0  # that were checked
    num_accepted_tokens: int = 0
    time_to_all_first_tokens: float | None = None  # when all prompts were computed


class Engine(NamedTuple):
    """How bench.py drives one: the module that it imports, what starts the engine, and what completes requests."""

    module: str
    package: str  # that has the module, as pip calls it
    start: Callable[[str, dict[str, Any]], Any]  # model, options
    run: Callable[[Any, list[Request], dict[str, Any]], Run]  # what `start` gave, requests, sampling parameters
