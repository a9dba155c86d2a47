"""An engine for coroutines: calls that can be awaited, of an engine that steps in a process of its own.

A thread reads what the engine sends, and wakes those whom it concerns; so no event loop ever waits for a step. Nothing
here knows of HTTP.
"""

import asyncio
import atexit
import functools
import itertools
import os
import pickle
import threading
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from nanovllm.async_engine.engine_process import start_engine
from nanovllm.async_engine.stream import Stream, wake_all
from nanovllm.chat.template import ChatTemplate
from nanovllm.engine.scheduler import Scheduler
from nanovllm.inputs import Prompt
from nanovllm.outputs import RequestOutput
from nanovllm.reports.metrics import Metric
from nanovllm.requests.admission import CheckedRequest
from nanovllm.requests.intake import Intake
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.text.tokenizer import load_tokenizer

CLOSED = "it was closed"
CLOSE_SECONDS = 10.0  # that an engine may take for its last step and its end


class AsyncLLM:
    """An engine for any number of concurrent calls, of one event loop or several.

        async with AsyncLLM("Qwen/Qwen3-0.6B") as llm:
            async for output in llm.generate("introduce yourself", SamplingParams(max_tokens=100)):
                print(output.text)

    A call that reads slowly finds what came meanwhile in one output, and delays no other. Where the engine fails or is
    closed, all calls end with a RuntimeError that says why.

    The engine has a process of its own, which imports nothing of the caller's: a script needs no main guard. It ends
    with this process, however that ends.

    Attributes:
        config: the engine's options, resolved.
        tokenizer: the model's, None without one.
        default_sampling_params: the parameters that are used where none are given.
        failure: why the engine has failed, or CLOSED; None while it lives.
        streams: what the unfinished calls are yet to read, by their numbers.
        process: that of the engine.
        thread: what hears of the engine; it ends with it.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        """Starts an engine; arguments and errors are those of LLM."""
        self.failure: str | None = None
        self.streams: dict[int, Stream] = {}
        self._numbers: dict[str, int] = {}  # of the unfinished calls, by the id of their request
        self._next_number = itertools.count()
        self._asked: deque[Future[list[Metric]]] = deque()  # for metrics
        self._guard = threading.Lock()  # of all that is sent, and of whether it still concerns someone
        self._caller = os.getpid()
        self._connection, self.process, facts = start_engine(model, options)
        self.config, self.default_sampling_params, eos_token_ids = facts
        self.tokenizer = load_tokenizer(self.config.tokenizer)
        # It checks requests, and queues none.
        scheduler = Scheduler(self.config, 1, eos_token_ids)
        self._intake = Intake(self.config, self.tokenizer, self.default_sampling_params, scheduler)
        self.thread = threading.Thread(target=self._listen, daemon=True, name="nanovllm-engine")
        self.thread.start()
        atexit.register(self.close)

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        """What renders conversations, for models with a tokenizer. Made when it is first asked for."""
        return ChatTemplate.from_folder(self.config.tokenizer)

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
        params = self.default_sampling_params if sampling_params is None else sampling_params
        request_id = uuid.uuid4().hex if request_id is None else request_id
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, got {request_id!r}")
        request_id = str.__str__(request_id)  # no class of the caller's, which the engine's process may not know
        number = next(self._next_number)
        if self._numbers.setdefault(request_id, number) != number:
            raise ValueError(f"request_id must be of no unfinished request, got {request_id!r}")
        is_typed = isinstance(params, SamplingParams)  # else it will be refused
        stream = self.streams[number] = Stream(params.output_kind if is_typed else RequestOutputKind.FINAL_ONLY)
        try:
            self.check_health()

            def submit() -> None:
                checked = self._intake.check_one(prompt, params, priority, timeout)
                if stream.kind is RequestOutputKind.CUMULATIVE:
                    checked.params.output_kind = RequestOutputKind.DELTA
                self._submit(number, request_id, stream, checked)

            await asyncio.to_thread(submit)  # as a long prompt takes long to tokenise
            output = None
            while output is None or not output.finished:
                output = await stream.read()
                yield output
        finally:
            with self._guard:
                del self.streams[number], self._numbers[request_id]
                self._send("drop", request_id)

    async def abort(self, request_id: str) -> None:
        """Ends a request, whose call gets what there is of it, with the `finish_reason` "abort"."""
        with self._guard:
            stream = self.streams.get(self._numbers.get(request_id, -1))
            if stream is not None:
                stream.is_aborted = True
                self._send("abort", request_id)

    def get_metrics(self) -> list[Metric]:
        """What the engine has done so far, as `LLM.get_metrics`, once a step has ended. Any thread may wait for it."""
        with self._guard:
            self.check_health()
            self._asked.append(Future())
            asked = self._asked[-1]
            self._send("tell_metrics")
        return asked.result()

    def check_health(self) -> None:
        """Raises RuntimeError, with the cause, if the engine has failed, is closed, or is another process's."""
        if os.getpid() != self._caller:
            raise RuntimeError("an AsyncLLM cannot be used in a fork of its process; make another one there")
        if self.failure is not None:
            raise self._death()

    def close(self) -> None:
        """Ends the engine, and with a RuntimeError every call that waits. Can be called again, and from any thread."""
        if os.getpid() != self._caller:
            return  # in a fork: the engine is not its own
        with self._guard:
            self.failure = self.failure or CLOSED
            self._send("close")
        self.thread.join(CLOSE_SECONDS)
        self.process.kill()  # if it hangs
        self.thread.join()
        atexit.unregister(self.close)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)

    def _death(self) -> RuntimeError:
        return RuntimeError(f"the engine is dead: {self.failure}")

    def _submit(self, number: int, request_id: str, stream: Stream, checked: CheckedRequest) -> None:
        """Has a request queued, unless its call has ended meanwhile."""
        packed = pickle.dumps(checked._replace(prompt=None), pickle.HIGHEST_PROTOCOL)  # only the tokens are computed
        with self._guard:
            if number in self.streams:
                stream.checked = checked
                self._send("submit", number, request_id, packed, stream.arrival_time)
                if stream.is_aborted:
                    self._send("abort", request_id)

    def _send(self, *message: Any) -> None:
        """Asks the engine for something; in vain if it has ended, of which `_listen` will tell."""
        with suppress(OSError):
            self._connection.send(message)

    # ---- in the thread ------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Does what the engine says, until it ends."""
        with suppress(EOFError, OSError):
            while True:
                name, argument = self._connection.recv()
                getattr(self, name)(argument)
        with self._guard:
            self._connection.close()
        self.fail(f"its process ended with exit code {self.process.wait()}")

    def hand_out(self, items: Iterable[tuple[int, RequestOutput | RuntimeError]]) -> None:
        """Gives outputs, or why there will be no more, to calls by their numbers."""
        # One message to a loop: each costs a system call, within which another thread may take the interpreter.
        woken: dict[asyncio.AbstractEventLoop, list[Stream]] = defaultdict(list)
        for number, item in items:
            stream = self.streams.get(number)
            if stream is not None and stream.put(item):  # else its call has ended, or has yet to read
                woken[stream.loop].append(stream)
        for loop, streams in woken.items():
            with suppress(RuntimeError):  # the loop has ended, and its calls with it
                loop.call_soon_threadsafe(wake_all, streams)

    def take_metrics(self, metrics: list[Metric]) -> None:
        """Gives the engine's metrics to who has asked first."""
        self._asked.popleft().set_result(metrics)

    def fail(self, reason: str) -> None:
        """Ends all calls, as the engine has failed. Only the first reason counts."""
        with self._guard:
            self.failure = self.failure or reason
        # A call that begins behind this finds `failure` set.
        self.hand_out((number, self._death()) for number in list(self.streams))
        while self._asked:
            self._asked.popleft().set_exception(self._death())
