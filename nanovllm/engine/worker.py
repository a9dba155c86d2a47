"""The tensor-parallel ranks: rank 0 in the caller's process, the others in processes of their own.

Rank 0 sends every call to the others through a pipe each, then makes it itself. A pipe keeps messages in order until
they are read, blocks an idle rank without burning a core, and ends when either side dies, so that nothing survives
the caller. A thread watches the processes; a rank that fails ends all of them with one error that says why.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.utils.tensor_parallel import TensorParallel

EXIT_SECONDS = 3.0


class RankState:
    """What the watching thread tells the caller; it must not keep the engine alive."""

    def __init__(self, processes: list[BaseProcess], connections: list[Connection]) -> None:
        self.processes = processes
        self.connections = connections
        self.tp: TensorParallel | None = None
        self.num_ready = 0
        self.failure: str | None = None
        self.is_closing = False
        self.changed = threading.Condition()

    def watch(self) -> None:
        """Until all ranks are gone: takes in what they report, and on the first failure stops all."""
        pending = {connection: rank for rank, connection in enumerate(self.connections, start=1)}
        while pending:
            for connection in wait(list(pending)):
                rank = pending[connection]
                try:
                    report = connection.recv()
                except (EOFError, OSError):
                    del pending[connection]
                    process = self.processes[rank - 1]
                    process.join(EXIT_SECONDS)
                    report = f"rank {rank} ended with exit code {process.exitcode}"
                with self.changed:
                    if report is None:
                        self.num_ready += 1
                    elif self.failure is None and not self.is_closing:
                        self.failure = report
                        self.stop()
                    self.changed.notify_all()

    def stop(self) -> None:
        """Kills the ranks and breaks off collectives that wait for them."""
        for process in self.processes:
            process.kill()
        if self.tp is not None:
            self.tp.abort()


class RankGroup:
    """All ranks of one engine."""

    def __init__(self, config: Config) -> None:
        """Starts the ranks and loads their weights.

        Raises:
            RuntimeError: a rank failed; or the script that makes the engine has no main guard.
        """
        self.config = config
        self.runner: ModelRunner | None = None
        self.state = RankState([], [])
        store = self._spawn() if config.tensor_parallel_size > 1 else None
        try:
            self.tp = make_tensor_parallel(config, 0)
            self.runner = ModelRunner(config, self.tp)
            if store is not None:
                self._connect(store)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *args: Any) -> Any:
        """Calls a method of every rank's ModelRunner; returns rank 0's result.

        Raises:
            RuntimeError: a rank has failed.
        """
        try:
            if self.state.connections:
                message = pickle.dumps((method, args), protocol=pickle.HIGHEST_PROTOCOL)
                for connection in self.state.connections:
                    connection.send_bytes(message)
            return getattr(self.runner, method)(*args)
        except (RuntimeError, OSError) as error:
            self.raise_failure(error)
            raise

    def raise_failure(self, error: BaseException | None = None) -> None:
        """Raises RuntimeError if a rank has failed; after an `error` of rank 0, waits a moment for its cause."""
        state = self.state
        if error is not None and state.connections:
            with state.changed:
                state.changed.wait_for(lambda: state.failure is not None, EXIT_SECONDS)
        if state.failure is not None:
            raise RuntimeError(f"the engine is dead: {state.failure}") from error

    def close(self) -> None:
        """Ends all ranks and frees their memory. Can be called again."""
        state = self.state
        state.is_closing = True
        for connection in state.connections:
            with suppress(OSError):
                connection.send_bytes(pickle.dumps(("exit", ())))
        deadline = time.monotonic() + EXIT_SECONDS
        for process in state.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        state.stop()
        for process in state.processes:
            process.join()
        for connection in state.connections:
            connection.close()
        state.connections, state.processes, state.tp = [], [], None
        if self.runner is not None:
            self.runner.exit()
            self.runner = None

    def _spawn(self) -> dist.TCPStore:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise RuntimeError(
                "tensor_parallel_size > 1 starts processes that import this script again: "
                'make the LLM below `if __name__ == "__main__":`'
            )
        size = self.config.tensor_parallel_size
        store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)  # 0: any free port
        spawn = multiprocessing.get_context("spawn")
        for rank in range(1, size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=run_rank, args=(self.config, rank, store.port, theirs), daemon=True)
            self.state.connections.append(ours)
            self.state.processes.append(process)
            process.start()
            theirs.close()
        threading.Thread(target=self.state.watch, daemon=True, name="nanovllm-watch").start()
        return store

    def _connect(self, store: dist.Store) -> None:
        """Joins the ranks' process group, in a thread: joining cannot be broken off when a rank dies."""
        state = self.state
        with state.changed:
            state.changed.wait_for(lambda: state.failure or state.num_ready == len(state.processes))
        self.raise_failure()

        def connect() -> None:
            self.tp.connect(store)
            with state.changed:
                state.tp = self.tp
                state.changed.notify_all()

        threading.Thread(target=connect, daemon=True).start()
        with state.changed:
            state.changed.wait_for(lambda: state.failure or state.tp is not None)
        self.raise_failure()


def make_tensor_parallel(config: Config, rank: int) -> TensorParallel:
    """The rank's place and device, not connected yet."""
    device = torch.device(config.device, rank if config.device == "cuda" else None)
    return TensorParallel(rank, config.tensor_parallel_size, device, config.torch_dtype)


def run_rank(config: Config, rank: int, port: int, connection: Connection) -> None:
    """The life of a process that is a rank other than 0: obeys calls until told to exit or the caller is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's; the ranks end with it
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        tp = make_tensor_parallel(config, rank)
        if tp.device.type == "cuda":
            torch.cuda.set_device(tp.device)
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.tensor_parallel_size))
        runner = ModelRunner(config, tp)
        connection.send(None)
        tp.connect(dist.TCPStore("127.0.0.1", port, is_master=False))
        while True:
            method, args = pickle.loads(connection.recv_bytes())
            getattr(runner, method)(*args)
            if method == "exit":
                break
    except (EOFError, ConnectionError):
        pass
    except BaseException:
        connection.send(f"rank {rank} failed:\n{traceback.format_exc()}")
    # At once: destructors of a broken process group may wait for ranks that are gone.
    os._exit(0)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
