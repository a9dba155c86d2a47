"""The progress bar of a call: its finished requests, and the tokens that the engine computes per second.

Knows nothing of requests but how many there are.
"""

import time
from collections.abc import Callable

from tqdm.auto import tqdm

from nanovllm.engine.scheduler import Batch

SHOW_SECONDS = 0.5  # how often the bar is drawn while nothing finishes


class ComputedTokens:
    """How many tokens an engine has computed so far: of prompts by the part, and one by one."""

    def __init__(self) -> None:
        self.num_prefilled = self.num_decoded = 0

    def count(self, batch: Batch, token_ids: list[list[int]]) -> None:
        """Takes in a step, and what its sequences drew in it."""
        num_decodes = batch.num_tokens.count(1)
        self.num_prefilled += sum(batch.num_tokens) - num_decodes
        self.num_decoded += num_decodes
        if batch.num_drafts:
            self.num_decoded += sum(len(accepted) - 1 for accepted in token_ids)


class Progress:
    """A bar that is shown within a `with` block, if at all."""

    def __init__(self, num_requests: int, use_tqdm: bool | Callable[..., tqdm], computed: ComputedTokens) -> None:
        """`use_tqdm` may be what makes a bar, as `tqdm.tqdm` does; `computed` are the engine's.

        Raises:
            TypeError: use_tqdm is something else, such as the token ids that stand in its place in older scripts.
        """
        if not (use_tqdm is None or isinstance(use_tqdm, bool) or callable(use_tqdm)):
            raise TypeError(f"use_tqdm must be a bool or what makes a bar, got {use_tqdm!r:.200}")
        make_bar = use_tqdm if callable(use_tqdm) else tqdm
        self.bar = make_bar(total=num_requests, desc="Requests", disable=not use_tqdm, dynamic_ncols=True)
        self.is_shown = bool(use_tqdm)
        self.computed = computed
        self.num_prefilled, self.num_decoded = computed.num_prefilled, computed.num_decoded  # before
        self.num_finished = 0
        self.start = self.last = time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def show(self, num_finished: int) -> None:
        """Draws the bar if there is something new: so many requests of the call have finished."""
        now = time.perf_counter()
        num_new = num_finished - self.num_finished
        if not self.is_shown or not (num_new or now - self.last > SHOW_SECONDS):
            return
        self.last, self.num_finished = now, num_finished
        num_tokens, seconds = self.computed.num_decoded - self.num_decoded, now - self.start
        prefill, decode = (self.computed.num_prefilled - self.num_prefilled) / seconds, num_tokens / seconds
        rates = f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s"
        self.bar.set_postfix_str(rates if num_finished else f"{rates}, {num_tokens} tokens", refresh=False)
        self.bar.update(num_new)
        self.bar.refresh()
