"""What one request asks for: how its tokens are drawn and when it ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raises unless `value` is an int (a bool is none) within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limit}, got {value}")


def check_float(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raises unless `value` is a finite number within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and low <= value <= high):
        limit = f"finite and at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limit}, got {value}")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens; -1 or 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to top_p (nucleus sampling,
            arXiv 1904.09751); in (0, 1].
        min_p: keep tokens at least min_p times as likely as the most likely one (arXiv 2407.01082); in [0, 1].
        max_tokens: most tokens to generate.
        ignore_eos: do not end at the model's end-of-sequence tokens.
        seed: makes the request's draws reproducible, whatever it is batched with; None derives one from the engine's.
        stop: a string or strings that end the text; the text returned ends before the first of them.
        stop_token_ids: further tokens that end the request.

    Raises:
        TypeError, ValueError: an option of another type or out of its range.
    """

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 64
    ignore_eos: bool = False
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_float("temperature", self.temperature, 0.0)
        check_int("top_k", self.top_k, -1)
        check_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise ValueError("top_p must be greater than 0, got 0")
        check_float("min_p", self.min_p, 0.0, 1.0)
        check_int("max_tokens", self.max_tokens, 1)
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be a bool, got {self.ignore_eos!r}")
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**64 - 1)
        stop = (self.stop,) if isinstance(self.stop, str) else self._as_tuple("stop")
        for text in stop:
            if not isinstance(text, str) or not text:
                raise (ValueError if text == "" else TypeError)(f"stop must hold non-empty strings, got {text!r}")
        stop_token_ids = self._as_tuple("stop_token_ids")
        for token_id in stop_token_ids:
            check_int("stop_token_ids", token_id, 0)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)

    def _as_tuple(self, name: str) -> tuple:
        value = getattr(self, name)
        if value is not None and not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list, got {value!r}")
        return tuple(value or ())

    @property
    def is_filtered(self) -> bool:
        """Whether sampling must look at the whole distribution before it draws."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
