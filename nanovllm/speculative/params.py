"""The option `speculative_config`, as vLLM spells it. Nothing here knows how it is served."""

import os
from collections.abc import Mapping
from types import NoneType
from typing import Any, NamedTuple

from nanovllm.options.checks import check

NGRAM, DRAFT_MODEL = "ngram", "draft_model"
# Tokens that a step with drafts computes at most: beyond, products take as much longer as there are more of them.
MAX_CHECKED_TOKENS = 64
LIMITS = {  # lowest, highest
    "num_speculative_tokens": (1, 31),
    "prompt_lookup_max": (1, 32),
    "prompt_lookup_min": (1, 32),
}
DEFAULT_LOOKUP = 5  # where neither the longest nor the shortest n-gram is given


class Speculation(NamedTuple):
    """What is proposed.

    Attributes:
        num_speculative_tokens: the most drafts of a row.
        prompt_lookup_max, prompt_lookup_min: how many of a text's last tokens must occur earlier in it.
        model: the folder or hub name of the model that drafts; None: drafts are looked up in the text.
    """

    num_speculative_tokens: int
    prompt_lookup_max: int = DEFAULT_LOOKUP
    prompt_lookup_min: int = DEFAULT_LOOKUP
    model: str | None = None

    @property
    def num_drafted_ahead(self) -> int:
        """Tokens behind those of a step whose KV is stored in it: the one that it draws, and drafts but the last."""
        return 0 if self.model is None else self.num_speculative_tokens

    def num_drafts_of(self, num_rows: int) -> int:
        """How many drafts of each row a step of so many rows may check.

        The same for all numbers of rows up to the same power of two: a step and the graph it is padded to agree.
        """
        num_fitting = MAX_CHECKED_TOKENS // (1 << (num_rows - 1).bit_length()) - 1
        return min(self.num_speculative_tokens, max(num_fitting, 0))


def read_speculation(options: Mapping[str, Any] | None, max_num_batched_tokens: int) -> Speculation | None:
    """The speculation that `speculative_config` asks for; None: none.

    Raises:
        TypeError, ValueError: naming what is wrong, its value and the limit.
    """
    if options is None:
        return None
    if not isinstance(options, Mapping):
        raise TypeError(f"speculative_config must be a dict, got {options!r}")
    model = options.get("model")
    if not isinstance(model, (str, os.PathLike, NoneType)):
        raise TypeError(f"the 'model' of speculative_config must be a folder or hub name, got {model!r}")
    known = ("method", "model", *(LIMITS if model is None else ["num_speculative_tokens"]))
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"speculative_config may have {', '.join(known)}, got {name!r}: {value!r:.200}")
    method = options.get("method", None if model is None else DRAFT_MODEL)
    if method != (NGRAM if model is None else DRAFT_MODEL):
        raise ValueError(
            f"the 'method' of speculative_config must be {NGRAM!r}, a look-up in the text itself, or with a 'model' "
            f"{DRAFT_MODEL!r}, got {method!r}"
        )
    longest, shortest = options.get("prompt_lookup_max"), options.get("prompt_lookup_min")
    if longest is None and shortest is None:
        longest = shortest = DEFAULT_LOOKUP
    speculation = Speculation(
        num_speculative_tokens=options.get("num_speculative_tokens"),
        prompt_lookup_max=shortest if longest is None else longest,
        prompt_lookup_min=longest if shortest is None else shortest,
        model=model,
    )
    for name, limits in LIMITS.items():
        check(f"the {name!r} of speculative_config", getattr(speculation, name), int, *limits)
    if speculation.prompt_lookup_min > speculation.prompt_lookup_max:
        raise ValueError(
            f"the 'prompt_lookup_min' of speculative_config, {speculation.prompt_lookup_min}, must be at most its "
            f"'prompt_lookup_max', {speculation.prompt_lookup_max}"
        )
    if speculation.num_speculative_tokens >= max_num_batched_tokens:
        raise ValueError(
            f"the 'num_speculative_tokens' of speculative_config, {speculation.num_speculative_tokens}, must be less "
            f"than max_num_batched_tokens={max_num_batched_tokens}: a step checks them beside a row's last token"
        )
    return speculation
