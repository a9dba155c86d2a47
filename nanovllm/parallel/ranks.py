"""The ranks, of all stages: rank 0 in the caller's process, the others in processes of their own.

Rank 0 sends every call to the others through a pipe each, then makes it itself. A pipe keeps messages in order until
they are read, blocks an idle rank without burning a core, and ends when either side dies. A thread watches the
processes; the first rank that fails ends all of them and leaves behind the reason. The ranks hold nothing that
outlives a process, so they are always ended by SIGKILL, whatever they are doing.

Nothing here knows what the calls do. A single rank takes the same way, without processes, pipes and threads.
"""

import ctypes
import multiprocessing.resource_tracker
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.parallel.tensor_parallel import TensorParallel

CUDA_ERROR_NOT_INITIALIZED = 3  # of the CUDA driver's API
POLL_SECONDS = 2e-5  # how soon a step's end is seen
CAUSE_SECONDS = 3.0  # a rank that failed is heard of by then
MAIN_GUARD = 'a script that makes such an LLM must do so below `if __name__ == "__main__":`'


class RankGroup:
    """All ranks of one engine. Its threads know it but not the engine, so that an engine can be dropped unclosed."""

    def __init__(self, config: Config) -> None:
        """Starts nothing yet."""
        self.config = config
        self.tp = TensorParallel(config, 0)
        self.runner: ModelRunner | None = None
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self.connections: list[Connection] = []
        self.store: dist.TCPStore | None = None  # where the ranks meet
        self.watcher: threading.Thread | None = None
        self.num_ready = 0
        self.failure: str | None = None
        self.mistake = ""  # of the checkpoint or an option, that another rank has found while it loaded
        self.changed = threading.Condition()
        self.caller = os.getpid()
        # On CPUs the ranks share what torch may take; where GPUs compute, a rank's thread only launches.
        self.num_threads = max(1, torch.get_num_threads() // config.num_ranks)

    def spawn(self) -> None:
        """Starts the processes of the ranks, which load their weights.

        Raises:
            RuntimeError: the script that makes the engine has no main guard.
        """
        size = self.config.num_ranks
        if size == 1:
            return
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise RuntimeError(f"{size} ranks are processes that import this script: {MAIN_GUARD}")
        context = multiprocessing.get_context("fork" if can_fork(self.config) else "spawn")
        # Ctrl-C is the caller's; the ranks inherit the mask. The tracker is first, as its start ends a mask.
        multiprocessing.resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            for rank in range(1, size):
                ours, theirs = context.Pipe()
                args = (self.config, rank, self.caller, theirs, self.num_threads)
                process = context.Process(target=run_rank, args=args, daemon=True)
                process.start()
                theirs.close()
                self.processes.append(process)
                self.connections.append(ours)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)  # 0: any free port
        self.watcher = threading.Thread(target=self._watch, daemon=True, name="nanovllm-watch")
        self.watcher.start()
        for connection in self.connections:
            connection.send(self.store.port)

    def load(self) -> None:
        """Loads rank 0's weights, then joins it with the other ranks once they have loaded theirs.

        Raises:
            TypeError, ValueError: the checkpoint, or an option, does not do.
            RuntimeError: a rank has failed.
        """
        with torch.cuda.stream(self.tp.stream):
            self.runner = ModelRunner(self.config, self.tp)
        if not self.processes:
            return
        self._wait(len(self.processes))
        server = self.store  # must not go before the client, which ends with it, is connected
        self.check()
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        del server
        # In a thread: joining takes no interrupt, nor does it end by itself when a rank dies.
        threading.Thread(target=self._join, args=(client,), daemon=True, name="nanovllm-join").start()
        self._wait(len(self.processes) + 1)

    def call(self, method: str, *args: Any) -> Any:
        """Calls a method of every rank's ModelRunner; returns rank 0's result.

        Raises:
            RuntimeError, OSError: a rank has failed, see `cause`.
        """
        self.check()
        if self.connections:
            message = pickle.dumps((method, args), protocol=pickle.HIGHEST_PROTOCOL)
            for connection in self.connections:
                connection.send_bytes(message)
        with torch.cuda.stream(self.tp.stream), self._sharing_threads():
            return getattr(self.runner, method)(*args)

    @contextmanager
    def _sharing_threads(self) -> Iterator[None]:
        """Has this thread, on CPUs, compute with no more threads than the other ranks do."""
        if self.config.device != "cpu" or not self.processes:
            yield
            return
        num_threads = torch.get_num_threads()
        torch.set_num_threads(self.num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)

    def check(self) -> None:
        """Raises RuntimeError if a rank has failed."""
        if self.failure is not None:
            raise RuntimeError("a rank has failed")

    def wait_for(self, event: torch.cuda.Event | None) -> None:
        """Waits for rank 0's GPU to pass an event; there may be none. Raises RuntimeError if a rank has failed."""
        if event is None:
            return
        while self.config.num_ranks > 1 and not event.query():
            self.check()  # a rank that died would leave the others waiting for ever
            time.sleep(POLL_SECONDS)
        event.synchronize()

    def cause(self, error: BaseException) -> str:
        """What was behind an error that rank 0 saw: the first failure of another rank, or the error itself."""
        if self.processes and isinstance(error, (RuntimeError, OSError)):
            with self.changed:
                self.changed.wait_for(lambda: self.failure is not None, CAUSE_SECONDS)
        return self.failure or describe_failure(0, error, repr(error))

    def stop(self, reason: str) -> None:
        """Kills the ranks and breaks off what waits for them. Only the first reason counts."""
        with self.changed:
            if self.failure is None:
                self.failure = reason
                for process in self.processes:
                    process.kill()
                self.tp.abort()
                self.store = None
                self.changed.notify_all()

    def close(self) -> None:
        """Ends the ranks, the watching thread and the process group, and frees their memory. Can be called again."""
        if os.getpid() != self.caller:
            return  # the finalizer of a fork: the ranks are not its own
        self.stop("it was closed")
        # Before all else is waited for: to break off NCCL's collectives takes the end of the graphs that hold them.
        runner, self.runner = self.runner, None
        if runner is not None:
            with suppress(RuntimeError):  # of a GPU that has failed
                runner.exit()
        for process in self.processes:
            process.join()
        if self.watcher not in (None, threading.current_thread()):
            self.watcher.join()
        self.processes, self.connections = [], []
        self.tp.disconnect()

    def _watch(self) -> None:
        """Until all ranks are gone: takes in what they report, and on the first failure stops all."""
        pending = dict(zip(self.connections, enumerate(self.processes, start=1), strict=True))
        while pending:
            reports = []
            for connection in wait(list(pending)):
                try:
                    reports.append(connection.recv())
                except (EOFError, OSError):
                    reports.append((0.0, self._describe_end(*pending.pop(connection)), ""))
            # In the order of time: a rank's end makes the others fail, but they cannot tell before it shows here.
            for _, failure, mistake in sorted(reports):
                if failure:
                    self.mistake = self.mistake or mistake
                    self.stop(failure)
                else:
                    self._count_ready()

    def _join(self, store: dist.Store) -> None:
        """Connects rank 0 with the others, in a thread of its own."""
        try:
            with torch.cuda.stream(self.tp.stream):
                self.tp.connect(store)
            self._count_ready()
        except Exception as error:
            self.stop(self.cause(error))

    def _count_ready(self) -> None:
        """One more rank has loaded its weights, or rank 0 has joined them all."""
        with self.changed:
            self.num_ready += 1
            self.changed.notify_all()

    def _wait(self, num_ready: int) -> None:
        """Until so many are ready, see `_count_ready`. Raises ValueError or RuntimeError if a rank has failed."""
        with self.changed:
            self.changed.wait_for(lambda: self.failure is not None or self.num_ready == num_ready)
        if self.mistake:
            raise ValueError(self.mistake)
        self.check()

    def _describe_end(self, rank: int, process: multiprocessing.process.BaseProcess) -> str:
        """Waits for the end of a rank whose pipe has ended, and says how it came."""
        for other in self.processes:
            if other is not process:
                other.kill()
        process.join(CAUSE_SECONDS - 0.5)  # its pipe ends before it does: it may have much memory to free
        end = f"rank {rank} ended with exit code {process.exitcode}"
        has_exited = process.exitcode is not None and process.exitcode > 0  # by itself: signals are negative
        if has_exited and self.num_ready < len(self.processes):
            end += f"; its own output says why ({MAIN_GUARD})"
        return end


def describe_failure(rank: int, error: BaseException, details: str) -> str:
    """One text that names the rank, its error and the remedy if there is one."""
    if isinstance(error, torch.OutOfMemoryError):
        options = "gpu_memory_utilization, max_num_batched_tokens or max_num_seqs"
        details = f"out of GPU memory; lower {options}: {details}"
    return f"rank {rank} failed: {details}"


def can_fork(config: Config) -> bool:
    """Whether ranks may be forks of this process, which spares them to import torch: that takes longer than the rest.

    CUDA would not survive a fork, nor would locks that other threads hold.
    """
    if config.device == "cpu" or threading.active_count() > 1:
        return False
    code = ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int()))
    return code == CUDA_ERROR_NOT_INITIALIZED


def run_rank(config: Config, rank: int, caller: int, connection: Connection, num_threads: int) -> None:
    """The life of a process that is a rank other than 0: obeys calls until it is killed or the caller is gone."""
    threading.Thread(target=exit_with, args=(caller,), daemon=True).start()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has the caller's handler
    has_loaded = False
    try:
        torch.set_num_threads(1 if config.device == "cuda" else num_threads)  # a fork has not the caller's threads
        if config.device == "cuda":
            torch.cuda.set_device(rank)
        tp = TensorParallel(config, rank)
        torch.cuda.set_stream(tp.stream)
        runner = ModelRunner(config, tp)
        connection.send((0.0, "", ""))
        has_loaded = True
        tp.connect(dist.TCPStore("127.0.0.1", connection.recv(), is_master=False))
        while True:
            method, args = connection.recv()
            getattr(runner, method)(*args)
    except BaseException as error:
        mistake = str(error) if isinstance(error, (TypeError, ValueError)) and not has_loaded else ""
        with suppress(OSError):
            connection.send((time.monotonic(), describe_failure(rank, error, traceback.format_exc()), mistake))
    # At once: destructors of a broken process group may wait for ranks that are gone.
    os._exit(1)


def exit_with(caller: int) -> None:
    """Ends this process when the caller's is gone. A pipe would not tell if the caller has forked."""
    while os.getppid() == caller:
        time.sleep(1)
    os._exit(1)
