"""Faults for ranks other than 0, and what an engine may leave behind. Imported by ranks, so it imports little."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path

import torch

from nanovllm.engine import model_runner
from nanovllm.parallel import ranks as worker
from nanovllm.weights import load

EXCEPTIONS = {"exception": ZeroDivisionError("on purpose"), "memory": torch.OutOfMemoryError("CUDA out of memory")}


class FaultyRank:
    """Stands in for `run_rank` (it is pickled into the ranks): one rank fails at a moment, or is killed.

    `moment` is "start", "loading", "joining", "allocation", "prefill" or "decode"; `kind` is one of EXCEPTIONS,
    "exit" or "kill". The rank writes the time of its fault to a file.
    """

    def __init__(self, moment: str, kind: str, folder: Path, rank: int = 1) -> None:
        self.moment, self.kind, self.rank = moment, kind, rank
        self.file = folder / "time"

    def __call__(self, config, rank: int, *args: object) -> None:
        if rank == self.rank:
            if self.moment == "start":
                self.fail()
            self.arm()
        worker.run_rank(config, rank, *args)

    def fail(self) -> None:
        self.file.write_text(str(time.time()))
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "exit":
            sys.exit(3)
        raise EXCEPTIONS[self.kind]

    def arm(self) -> None:
        runner, tp = model_runner.ModelRunner, worker.TensorParallel
        if self.moment == "loading":
            load.load_model = self.failing(load.load_model)
        elif self.moment == "joining":
            tp.connect = self.failing(tp.connect)
        elif self.moment == "allocation":
            runner.allocate_kv_cache = self.failing(runner.allocate_kv_cache)
        elif self.moment in ("prefill", "decode"):
            runner.run = self.failing_in_step(runner.run, tp)

    def failing(self, function: Callable) -> Callable:
        def fail(*args: object) -> None:
            self.fail()

        return fail

    def failing_in_step(self, run: Callable, tp: type) -> Callable:
        """In the midst of a step, when the other ranks wait for a sum."""

        def run_and_fail(runner, step):
            if bool(len(step.prompts)) == (self.moment == "prefill"):
                tp.all_reduce = self.failing(tp.all_reduce)
            return run(runner, step)

        return run_and_fail

    @property
    def seconds_ago(self) -> float:
        return time.time() - float(self.file.read_text())


def processes() -> dict[int, int]:
    """The parent of each process that is not a zombie."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue  # it has just ended
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    return parents


def children(pid: int | None = None) -> set[int]:
    """The child processes of a process (this one), Python's own helper left out."""
    pid = pid or os.getpid()
    found = set()
    for child, parent in processes().items():
        if parent == pid:
            try:
                command = Path(f"/proc/{child}/cmdline").read_text()
            except OSError:
                continue
            if "resource_tracker" not in command:
                found.add(child)
    return found


def cpu_seconds(pid: int) -> float:
    """What a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def traces() -> dict[str, object]:
    """What this process has beyond its memory: processes, threads, files, sockets and so ports, shared memory."""
    resource_tracker.ensure_running()
    task, fd = Path("/proc/self/task"), Path("/proc/self/fd")
    links = []
    for entry in fd.iterdir():
        try:
            links.append(os.readlink(entry).split(":")[0])
        except OSError:
            continue  # the one that was open for the listing
    return {
        "processes": children(),
        "threads": len(list(task.iterdir())),
        "files": dict(Counter(links)),
        "shared memory": sorted(os.listdir("/dev/shm")),
    }


def assert_nothing_left(before: dict[str, object]) -> None:
    """Soon, as a thread that was joined is there a little longer."""
    wait_until(lambda: traces() == before, 3)
    assert traces() == before
