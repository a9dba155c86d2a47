"""An engine for coroutines: a thread that steps while there is work, and calls that can be awaited.

All that touches the engine is done by that thread, between its steps, in the order in which it was asked for; so no
event loop ever waits for a step. Nothing here knows of HTTP.
"""

import asyncio
import atexit
import functools
import os
import queue
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import Any

from nanovllm.inputs import Prompt
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.requests.admission import CheckedRequest
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

IDLE_SECONDS = 1.0  # how soon a rank's death is noticed while there is no work


class Stream:
    """What one call is yet to read: never more than one output, however slowly it reads.

    Attributes:
        loop: the event loop of the call.
        merges: whether outputs hold what is new, so that an unread one must not be replaced by the next.
        arrival_time: when the call was made, in seconds of `time.time`.
        number: the engine's name of the request; None before it is queued.
        is_aborted: whether it is to end as soon as it is queued.
    """

    def __init__(self, merges: bool) -> None:
        self.loop = asyncio.get_running_loop()
        self.merges = merges
        self.arrival_time = time.time()
        self.number: int | None = None
        self.is_aborted = False
        self._guard = threading.Lock()
        self._unread: RequestOutput | RuntimeError | None = None
        self._has_unread = asyncio.Event()

    def put(self, item: RequestOutput | RuntimeError) -> bool:
        """Adds an output, or why there will be none; returns whether the reader is to be woken. In any thread."""
        with self._guard:
            earlier, self._unread = self._unread, item
            if self.merges and isinstance(earlier, RequestOutput) and isinstance(item, RequestOutput):
                prepend(earlier, item)
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
        return item


class AsyncLLM:
    """An engine for any number of concurrent calls, of one event loop or several.

        async with AsyncLLM("Qwen/Qwen3-0.6B") as llm:
            async for output in llm.generate("introduce yourself", SamplingParams(max_tokens=100)):
                print(output.text)

    A call that reads slowly finds what came meanwhile in one output, and delays no other. Where the engine fails or is
    closed, all calls end with a RuntimeError that says why.

    Attributes:
        llm: the engine. Other threads may use it too, but for `add_request` and `step`, whose results are lost.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        """Starts an engine; arguments and errors are those of LLM."""
        self.llm = LLM(model, **options)
        self.streams: dict[str, Stream] = {}  # of unfinished calls, by the id of their request
        self._results: dict[int, RequestOutput] = {}  # of finished requests, until they are handed out
        self._asked: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # what the thread is to do
        self.thread = threading.Thread(target=self._run, daemon=True, name="nanovllm-engine")
        self.thread.start()
        atexit.register(self.close)  # a thread that the interpreter's end finds in a step would crash it

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Completes a prompt; yields outputs, as the parameters' `output_kind` says.

        These are everything so far, or what is new, at most once a step; or the result alone. The last one is
        `finished`. If the iteration ends before, or its task is cancelled, the request is aborted.

        Args:
            prompt: as for `LLM.generate`.
            sampling_params: the model's defaults if None.
            request_id: what `abort` calls it; of no unfinished request. A random one if None.
            priority, timeout: as for `LLM.add_request`.

        Raises:
            TypeError, ValueError: a bad prompt or parameter, or an id in use.
            RuntimeError: the engine has failed or is closed.
        """
        params = self.llm.default_sampling_params if sampling_params is None else sampling_params
        request_id = uuid.uuid4().hex if request_id is None else request_id
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, got {request_id!r}")
        if request_id in self.streams:
            raise ValueError(f"request_id must be of no unfinished request, got {request_id!r}")
        is_delta = isinstance(params, SamplingParams) and params.output_kind is RequestOutputKind.DELTA
        stream = self.streams[request_id] = Stream(merges=is_delta)
        try:
            self.check_health()
            # In a thread of its own, as a long prompt takes long to tokenise.
            checked = await asyncio.to_thread(self.llm.intake.check_one, prompt, params, priority, timeout)
            self._ask(functools.partial(self._submit, request_id, stream, checked))
            output = None
            while output is None or not output.finished:
                output = await stream.read()
                yield output
        finally:
            del self.streams[request_id]
            self._ask(functools.partial(self._drop, stream))

    async def abort(self, request_id: str) -> None:
        """Ends a request, whose call gets what there is of it, with the `finish_reason` "abort"."""
        stream = self.streams.get(request_id)
        if stream is not None:
            self._ask(functools.partial(self._abort, stream))

    def check_health(self) -> None:
        """Raises RuntimeError, with the cause, if the engine has failed or is closed."""
        if self.llm.failure is not None:
            raise self._death()

    def close(self) -> None:
        """Ends the engine, and with a RuntimeError every call that waits. Can be called again, and from any thread."""
        self.llm.close()
        self._ask(lambda: None)
        self.thread.join()
        atexit.unregister(self.close)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)

    def _death(self) -> RuntimeError:
        return RuntimeError(f"the engine is dead: {self.llm.failure}")

    def _ask(self, task: Callable[[], None]) -> None:
        """Has the engine's thread do something before its next step."""
        self._asked.put(task)

    # ---- in the engine's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        """Steps while there is work, until the engine is closed or fails."""
        try:
            while True:
                self._do_asked()
                outputs = self.llm.step()
                while self._results:
                    outputs.append(self._results.popitem()[1])
                self._hand_out((output.request_id, output) for output in outputs)
        except Exception as error:
            self.llm.failure = self.llm.failure or repr(error)
            self.llm.close()
        # A call that begins behind this finds `failure` set.
        self._hand_out((request_id, self._death()) for request_id in list(self.streams))

    def _do_asked(self) -> None:
        """Does what was asked for; waits for something, but not long, where there is nothing else to do."""
        may_wait = self.llm.is_finished() and not self._results
        with suppress(queue.Empty):
            while True:
                self._asked.get(may_wait, IDLE_SECONDS)()
                may_wait = False

    def _submit(self, request_id: str, stream: Stream, checked: CheckedRequest) -> None:
        """Queues a request, unless its call has ended meanwhile."""
        if self.streams.get(request_id) is stream:
            stream.number = self.llm.submit(checked, self._results, request_id)
            self.llm.requests[stream.number].arrival_time = stream.arrival_time
            if stream.is_aborted:
                self._abort(stream)

    def _abort(self, stream: Stream) -> None:
        """Ends a call's request if it is unfinished."""
        stream.is_aborted = True
        if stream.number is not None:
            self.llm.abort_request(stream.number)

    def _drop(self, stream: Stream) -> None:
        """Ends the request of a call that has ended, so that nothing of it reaches a later one of the same id."""
        self._abort(stream)
        self._results.pop(stream.number, None)

    def _hand_out(self, items: Iterable[tuple[str, RequestOutput | RuntimeError]]) -> None:
        """Gives outputs, or why there will be no more, to the calls of the requests named."""
        # One message to a loop: each costs a system call, within which another thread may take the interpreter.
        woken: dict[asyncio.AbstractEventLoop, list[Stream]] = defaultdict(list)
        for request_id, item in items:
            stream = self.streams.get(request_id)
            if stream is None or (stream.number is None and isinstance(item, RequestOutput)):
                continue  # its call has ended, though there may be a new one of the same id
            if stream.put(item):
                woken[stream.loop].append(stream)
        for loop, streams in woken.items():
            with suppress(RuntimeError):  # the loop has ended, and its calls with it
                loop.call_soon_threadsafe(wake_all, streams)


def wake_all(streams: list[Stream]) -> None:
    """Wakes the readers of streams of one event loop, in it."""
    for stream in streams:
        stream.wake()


def prepend(earlier: RequestOutput, later: RequestOutput) -> None:
    """Puts what an unread output has new before what the next one has new."""
    for before, after in zip(earlier.outputs, later.outputs, strict=True):
        for key in ("text", "token_ids", "logprobs"):
            if after[key] is not None:
                after[key] = before[key] + after[key]
    later.text, later.token_ids = later.outputs[0].text, later.outputs[0].token_ids
