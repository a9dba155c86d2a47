"""The progress bar of a call: its finished requests, and the tokens that the engine computes per second.

Knows nothing of engines or requests: it is told numbers.
"""

import time
from collections.abc import Callable

from tqdm.auto import tqdm

SHOW_SECONDS = 0.5  # how often the bar is drawn while nothing finishes


class Progress:
    """A bar that is shown within a `with` block, if at all."""

    def __init__(
        self, num_requests: int, use_tqdm: bool | Callable[..., tqdm], num_prefilled: int, num_decoded: int
    ) -> None:
        """`use_tqdm` may be what makes a bar, as `tqdm.tqdm` does; the others are what was computed before."""
        make_bar = use_tqdm if callable(use_tqdm) else tqdm
        self.bar = make_bar(total=num_requests, desc="Requests", disable=not use_tqdm, dynamic_ncols=True)
        self.is_shown = bool(use_tqdm)
        self.num_prefilled = num_prefilled
        self.num_decoded = num_decoded
        self.num_finished = 0
        self.start = self.last = time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def show(self, num_finished: int, num_prefilled: int, num_decoded: int) -> None:
        """Draws the bar if there is something new: requests of the call, and tokens of the engine, so far."""
        now = time.perf_counter()
        num_new = num_finished - self.num_finished
        if not self.is_shown or not (num_new or now - self.last > SHOW_SECONDS):
            return
        self.last, self.num_finished = now, num_finished
        num_tokens = num_decoded - self.num_decoded
        prefill, decode = (num_prefilled - self.num_prefilled) / (now - self.start), num_tokens / (now - self.start)
        rates = f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s"
        self.bar.set_postfix_str(rates if num_finished else f"{rates}, {num_tokens} tokens", refresh=False)
        self.bar.update(num_new)
        self.bar.refresh()
