"""The engine of an AsyncLLM, in a process of its own: in one process, its steps and an event loop would wait for each
other, as an interpreter runs one thread at a time.

A message is the name of a method of the other side's, with its arguments. The caller names methods of EngineProcess,
the engine those of AsyncLLM that come last, of which `hand_out` comes once a step, for all requests.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from nanovllm.config import Config
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.parallel.ranks import exit_with
from nanovllm.sampling_params import SamplingParams

IDLE_SECONDS = 1.0  # how soon a rank's death is noticed while there is no work


class EngineFacts(NamedTuple):
    """What the caller's process must know of an engine to check requests; the tokens `eos_token_ids` end a text."""

    config: Config
    default_sampling_params: SamplingParams
    eos_token_ids: frozenset[int]


@dataclass
class Call:
    """A call's number, the engine's number of its request, and whether the caller has what was told of the prompt."""

    number: int
    request_number: int
    knows_prompt: bool = False


class EngineProcess:
    """Does what the caller asks for, in that order, and steps while there is work.

    Two threads take and send messages: the caller waits for no step, and no step for a caller that is slow to listen.
    """

    def __init__(self, llm: LLM, connection: Connection) -> None:
        self.llm = llm
        self.connection = connection
        self.calls: dict[str, Call] = {}  # those that have not ended, by the id of their request
        self.results: dict[int, RequestOutput] = {}  # of finished requests, until they are handed out
        self.asked: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()  # None: there will be no more
        self.is_closed = False
        self.speaker = threading.Thread(target=self._speak, daemon=True, name="nanovllm-speak")
        self.speaker.start()
        threading.Thread(target=self._listen, daemon=True, name="nanovllm-listen").start()

    def run(self) -> None:
        """Until it is closed, or the engine fails."""
        try:
            while not self.is_closed:
                outputs = self.llm.step()
                while self.results:
                    outputs.append(self.results.popitem()[1])
                if outputs:
                    self._hand_out(outputs)
                self._do_asked()
        except Exception as error:
            self.answers.put(("fail", self.llm.failure or repr(error)))
        self.answers.put(None)
        self.speaker.join()

    def submit(self, number: int, request_id: str, packed: bytes, arrival_time: float) -> None:
        """Queues a request of the call `number`, a CheckedRequest as pickle packs it."""
        try:
            checked = pickle.loads(packed)
        except Exception as error:  # it has a class that only the caller's script knows: a mistake of that call alone
            reason = RuntimeError(f"the engine's process cannot read the request: {error!r}")
            self.answers.put(("hand_out", [(number, reason)]))
            return
        request_number = self.llm.submit(checked, self.results, request_id)
        self.llm.requests[request_number].arrival_time = arrival_time
        self.calls[request_id] = Call(number, request_number)

    def abort(self, request_id: str) -> None:
        """Ends a request if it is unfinished."""
        if request_id in self.calls:
            self.llm.abort_request(self.calls[request_id].request_number)

    def drop(self, request_id: str) -> None:
        """Ends the request of a call that has ended, so that nothing of it reaches a later one of the same id."""
        self.abort(request_id)
        call = self.calls.pop(request_id, None)
        if call is not None:
            self.results.pop(call.request_number, None)

    def tell_metrics(self) -> None:
        """Sends the engine's metrics."""
        self.answers.put(("take_metrics", self.llm.get_metrics()))

    def close(self) -> None:
        """Has the process end."""
        self.is_closed = True

    def give_up(self, error: Exception) -> None:
        """Ends it by an error."""
        raise error

    def _do_asked(self) -> None:
        """Does what was asked for; waits for something, but not long, where there is nothing else to do."""
        may_wait = self.llm.is_finished() and not self.results
        with suppress(queue.Empty):
            while not self.is_closed:
                name, *arguments = self.asked.get(may_wait, IDLE_SECONDS)
                getattr(self, name)(*arguments)
                may_wait = False

    def _hand_out(self, outputs: list[RequestOutput]) -> None:
        items = []
        for output in outputs:
            call = self.calls.get(output["request_id"])
            if call is not None:
                output["prompt"] = output["prompt_token_ids"] = None  # which the caller has
                if call.knows_prompt:
                    output["prompt_logprobs"] = None
                call.knows_prompt |= len(output["token_ids"]) > 0  # they are complete then
                items.append((call.number, output))
        self.answers.put(("hand_out", items))

    def _speak(self) -> None:
        """Sends what there is to say, in a thread."""
        with suppress(OSError):
            while (answer := self.answers.get()) is not None:
                # By another pickler than `send` has, which takes longer.
                self.connection.send_bytes(pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))

    def _listen(self) -> None:
        """Takes in what is asked for, in a thread."""
        try:
            while True:
                self.asked.put(self.connection.recv())
        except (EOFError, OSError):
            os._exit(1)  # the caller is gone
        except Exception as error:  # what was sent is nothing here
            self.asked.put(("give_up", error))


def run_engine(connection: Connection, model: str | os.PathLike[str], options: dict[str, Any]) -> None:
    """Makes an engine, says what it is or why there is none, and lets it work until it is closed or fails."""
    try:
        llm = LLM(model, **options)
    except Exception as error:
        connection.send(sendable(error))
        return
    with llm:
        connection.send(EngineFacts(llm.config, llm.default_sampling_params, llm.scheduler.eos_token_ids))
        EngineProcess(llm, connection).run()


def sendable(error: Exception) -> Exception:
    """The error, or one that says the same if it cannot be sent."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def main(file: int, caller: int) -> None:
    """The process: does what comes first through the pipe, and ends with the caller's."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which a terminal or a supervisor sends to all: the caller decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=exit_with, args=(caller,), daemon=True).start()
    connection = Connection(file)
    run, num_threads, *arguments = connection.recv()
    torch.set_num_threads(num_threads)
    run(connection, *arguments)


def start_engine(
    model: str | os.PathLike[str], options: dict[str, Any]
) -> tuple[Connection, subprocess.Popen[bytes], EngineFacts]:
    """Starts an engine; returns the pipe to it, its process, and what it is.

    Raises:
        Exception: what LLM raises.
        RuntimeError: the process has ended.
    """
    connection, process = start_process()
    try:
        connection.send((run_engine, torch.get_num_threads(), model, options))
        reply = connection.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError(f"the engine is dead: its process ended with exit code {process.wait()}") from None
    except BaseException:
        process.kill()
        process.wait()
        raise
    if isinstance(reply, Exception):
        process.wait()
        raise reply
    return connection, process, reply


def start_process() -> tuple[Connection, subprocess.Popen[bytes]]:
    """A new interpreter, which does what comes through the pipe, see `main`.

    Not one of multiprocessing's: a fork would not survive CUDA and other threads, and what else that starts imports
    the caller's script, which needs a main guard then.
    """
    ours, theirs = multiprocessing.Pipe()
    code = f"import sys; sys.path[:] = {sys.path!r}; from nanovllm.async_engine.engine_process import main; "
    command = [sys.executable, "-c", f"{code}main({theirs.fileno()}, {os.getpid()})"]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # which the process inherits
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
    return ours, process
