"""What one request asks for: how its tokens are drawn and when it ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


def check(name: str, value: object, kind: type, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises unless `value` is what `kind` asks, a bool, an int or (float) a finite number, within [low, high]."""
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")
    if not (low <= value <= high and abs(value) < math.inf):
        limit = f"between {low} and {high}" if high < math.inf else f"finite and at least {low}"
        raise ValueError(f"{name} must be {limit}, got {value}")


LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
LIMITS = {  # type, lowest, highest: what the device's numbers hold
    "temperature": (float, 0, LARGEST_FLOAT32),
    "top_k": (int, -1, 2**63 - 1),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "max_tokens": (int, 1),
    "ignore_eos": (bool,),
    "seed": (int, -(2**63), 2**64 - 1),
}


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens; -1 or 0 keeps all, as does a k of the vocabulary's size or more.
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
        for name, (kind, *limits) in LIMITS.items():
            if name != "seed" or self.seed is not None:
                check(name, getattr(self, name), kind, *limits)
        if self.top_p == 0:
            raise ValueError("top_p must be greater than 0, got 0")
        object.__setattr__(self, "stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (list, tuple)):
                raise TypeError(f"{name} must be a list, got {value!r}")
            object.__setattr__(self, name, tuple(value or ()))
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise (ValueError if text == "" else TypeError)(f"stop must hold non-empty strings, got {text!r}")
        for token_id in self.stop_token_ids:
            check("stop_token_ids", token_id, int, 0)

    @cached_property  # every step asks it of every row
    def is_filtered(self) -> bool:
        """Whether sampling must look at the whole distribution before it draws."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
