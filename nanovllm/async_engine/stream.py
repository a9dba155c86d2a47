"""What goes from the engine to a call that awaits it. Knows neither."""

import asyncio
import threading
import time

from nanovllm.outputs import Logprobs, RequestOutput
from nanovllm.requests.admission import CheckedRequest
from nanovllm.sampling_params import RequestOutputKind


class Stream:
    """What one call is yet to read: never more than one output, however slowly it reads.

    Attributes:
        loop: the event loop of the call.
        kind: what the call wants to read. All so far is made here of what is new, lest it be sent with every token.
        arrival_time: when the call was made, in seconds of `time.time`.
        checked: the request; None before it is queued.
        is_aborted: whether it is to end as soon as it is queued.
    """

    def __init__(self, kind: RequestOutputKind) -> None:
        self.loop = asyncio.get_running_loop()
        self.kind = kind
        self.arrival_time = time.time()
        self.checked: CheckedRequest | None = None
        self.is_aborted = False
        self._guard = threading.Lock()
        self._unread: RequestOutput | RuntimeError | None = None
        self._latest: RequestOutput | None = None  # that was read
        self._prompt_logprobs: list[Logprobs | None] | None = None  # which come once
        self._has_unread = asyncio.Event()

    def put(self, item: RequestOutput | RuntimeError) -> bool:
        """Adds an output, or why there will be none; returns whether the reader is to be woken. In any thread."""
        with self._guard:
            earlier, self._unread = self._unread, item
            if isinstance(item, RequestOutput):
                self._prompt_logprobs = item["prompt_logprobs"] or self._prompt_logprobs
                item["prompt_logprobs"] = self._prompt_logprobs
                if earlier is not None:
                    prepend(earlier, item)
            elif earlier is not None and earlier.finished:
                self._unread = earlier  # what happens to the engine then is not this call's concern
        return earlier is None

    def wake(self) -> None:
        """Tells the reader that there is something to read. In its event loop."""
        self._has_unread.set()

    async def read(self) -> RequestOutput:
        """Waits for the next output. Raises RuntimeError if the engine has failed or is closed."""
        await self._has_unread.wait()
        self._has_unread.clear()
        with self._guard:
            item, self._unread = self._unread, None
        if isinstance(item, RuntimeError):
            raise item
        item["prompt"], item["prompt_token_ids"] = self.checked.prompt, self.checked.token_ids
        if self.kind is RequestOutputKind.CUMULATIVE:
            if self._latest is not None:
                prepend(self._latest, item)
            self._latest = item
        return item


def wake_all(streams: list[Stream]) -> None:
    """Wakes the readers of streams of one event loop, in it."""
    for stream in streams:
        stream.wake()


def prepend(earlier: RequestOutput, later: RequestOutput) -> None:
    """Puts what an output has before what the next one has new."""
    for before, after in zip(earlier.outputs, later.outputs, strict=True):
        for key in ("text", "token_ids", "logprobs"):
            if after[key] is not None:
                after[key] = before[key] + after[key]
    later.text, later.token_ids = later.outputs[0].text, later.outputs[0].token_ids
