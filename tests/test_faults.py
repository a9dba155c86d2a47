"""Ranks that fail, callers that go, Ctrl-C, many engines: an engine ends at once, says why and leaves nothing."""

from __future__ import annotations

import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoints import random_prompt
from engines import check_idle
from faults import FaultyRank, assert_nothing_left, children, cpu_seconds, processes, traces, wait_until
from integrity import check_integrity

from nanovllm import LLM, SamplingParams
from nanovllm.checkpoint import loader
from nanovllm.engine import llm_engine, model_runner
from nanovllm.parallel import ranks as worker
from nanovllm.reports import progress
from nanovllm.sampling_params import RequestOutputKind

pytestmark = pytest.mark.timeout(90)

END_SECONDS = 5  # from a rank's end to that of the engine
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=450, ignore_eos=True)
PROMPTS = [list(random_prompt(length, length)) for length in (3, 40, 17)]


def make(path: str, ranks: int = 2, **options) -> LLM:
    options = {"max_model_len": 512, "max_num_seqs": 128, "kvcache_block_size": 16} | options
    return LLM(path, device="cpu", tensor_parallel_size=ranks, **options)


def tokens(llm: LLM, prompts=PROMPTS, params=GREEDY) -> list[list[int]]:
    results = llm.generate(prompts, params, use_tqdm=False)
    check_idle(llm)
    return [result["token_ids"] for result in results]


@pytest.fixture(scope="module")
def path(checkpoint):
    return checkpoint("qwen3").path


@pytest.fixture(scope="module")
def want(path):
    """The tokens of PROMPTS, from one rank."""
    with make(path, ranks=1) as llm:
        return tokens(llm)


@pytest.fixture(scope="module")
def pair(path):
    """An engine of two ranks, for tests that leave it whole."""
    with make(path) as llm:
        yield llm


@pytest.fixture
def leaves_nothing(path):
    """After the test there is no process, thread, pipe, port or shared memory more than before."""
    with make(path, ranks=1) as llm:  # whatever Python and torch start once
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    del llm
    dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    gc.collect()
    before = traces()
    yield before
    gc.collect()
    assert_nothing_left(before)


def assert_dead(llm: LLM, reason: str) -> None:
    """Every call says so, and why."""
    calls = (llm.step, lambda: llm.generate(PROMPTS), lambda: llm.add_request([3]), lambda: llm.stream("x"))
    for call in (*calls, llm.reset_prefix_cache, lambda: llm.abort_request(0), lambda: llm.chat([])):
        with pytest.raises(RuntimeError, match="the engine is dead") as raised:
            call()
        assert reason in str(raised.value)
    llm.close()


REASONS = {
    "kill": "rank 1 ended with exit code -9",
    "exit": "rank 1 ended with exit code 3",
    "exception": "rank 1 failed",
    "memory": "rank 1 failed: out of GPU memory; lower gpu_memory_utilization, max_num_batched_tokens or max_num_seqs",
}


def assert_reason(error: BaseException, kind: str) -> None:
    assert REASONS[kind] in str(error)
    if kind == "exception":  # with its traceback
        assert "ZeroDivisionError: on purpose" in str(error)
        assert "faults.py" in str(error)


# ---- ranks that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "kind"),
    [
        ("start", "exit"),
        ("start", "kill"),
        ("loading", "exception"),
        ("loading", "kill"),
        ("joining", "exception"),
        ("joining", "kill"),
        ("allocation", "memory"),
        ("allocation", "kill"),
    ],
)
def test_a_rank_fails_at_start_up(leaves_nothing, path, monkeypatch, tmp_path, moment, kind):
    fault = FaultyRank(moment, kind, tmp_path)
    monkeypatch.setattr(worker, "run_rank", fault)
    with pytest.raises(RuntimeError) as raised:
        make(path)
    assert fault.seconds_ago < END_SECONDS
    assert_reason(raised.value, kind)
    assert children() == leaves_nothing["processes"]
    del raised


@pytest.mark.parametrize("kind", ["exception", "kill"])
@pytest.mark.parametrize("moment", ["prefill", "decode"])
def test_a_rank_fails_in_a_step(leaves_nothing, path, monkeypatch, tmp_path, moment, kind):
    fault = FaultyRank(moment, kind, tmp_path)
    monkeypatch.setattr(worker, "run_rank", fault)
    llm = make(path)
    with pytest.raises(RuntimeError) as raised:
        llm.generate(PROMPTS, ENDLESS, use_tqdm=False)
    assert fault.seconds_ago < END_SECONDS
    assert_reason(raised.value, kind)
    assert children() == leaves_nothing["processes"]  # while the object is still there
    assert_dead(llm, REASONS[kind])


def test_a_rank_is_killed_when_idle(leaves_nothing, path, want):
    llm = make(path)
    assert tokens(llm) == want
    os.kill(llm.ranks.processes[0].pid, signal.SIGKILL)
    time.sleep(0.5)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 ended with exit code -9"):
        llm.add_request([3])
    assert time.monotonic() - start < 1
    assert_dead(llm, REASONS["kill"])


def test_the_rank_that_failed_is_named_not_its_neighbours(leaves_nothing, checkpoint, monkeypatch, tmp_path):
    fault = FaultyRank("decode", "kill", tmp_path, rank=2)
    monkeypatch.setattr(worker, "run_rank", fault)
    with (
        make(checkpoint("mistral").path, ranks=4) as llm,
        pytest.raises(RuntimeError, match="rank 2 ended with exit code -9"),
    ):
        llm.generate(PROMPTS, ENDLESS, use_tqdm=False)
    assert fault.seconds_ago < END_SECONDS


def test_a_rank_fails_while_rank_0_loads_for_long(leaves_nothing, path, monkeypatch, tmp_path):
    class SlowTargets(dict):
        num_passes = 0

        def items(self):
            self.num_passes += 1
            for item in super().items():
                time.sleep(2.0 * (self.num_passes == 2))  # the pass that copies: more than 40 s
                yield item

    fault = FaultyRank("loading", "exception", tmp_path)
    monkeypatch.setattr(worker, "run_rank", fault)
    targets = loader.checkpoint_targets
    monkeypatch.setattr(loader, "checkpoint_targets", lambda *args: SlowTargets(targets(*args)))
    with pytest.raises(RuntimeError, match="rank 1 failed"):
        make(path)
    assert fault.seconds_ago < END_SECONDS


def test_rank_0_fails(leaves_nothing, path, monkeypatch):
    """While rank 1 waits for it, in a step and at start-up."""
    llm = make(path)

    def fail(*args):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(llm.ranks.runner, "sampler", fail)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"the engine is dead: rank 0 failed: .*on purpose"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert time.monotonic() - start < END_SECONDS
    assert_dead(llm, "on purpose")
    monkeypatch.setattr(llm_engine, "Scheduler", fail)
    with pytest.raises(RuntimeError, match=r"rank 0 failed.*on purpose"):
        make(path)


def test_a_bad_checkpoint_is_the_users_error(leaves_nothing, path, monkeypatch, tmp_path):
    for file in Path(path).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 20000 if file.suffix == ".safetensors" else None])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        make(str(tmp_path))


@pytest.mark.parametrize("method", ["__init__", "allocate_kv_cache", "run"])
def test_out_of_memory_names_the_option(path, monkeypatch, method):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    llm = make(path, ranks=1) if method == "run" else None
    monkeypatch.setattr(model_runner.ModelRunner, method, fail)
    with pytest.raises(RuntimeError, match=r"out of GPU memory; lower .*max_num_batched_tokens"):
        llm = llm or make(path, ranks=1)
        llm.generate(PROMPTS, use_tqdm=False)
    if llm is not None:
        assert_dead(llm, "out of GPU memory")


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------


def interrupt_after(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_in_generate(request, path, want, ranks):
    llm = request.getfixturevalue("pair") if ranks == 2 else make(path, ranks=1)
    for seconds in (0.01, 0.1, 0.5):
        timer = interrupt_after(seconds)
        with pytest.raises(KeyboardInterrupt):
            while True:
                llm.generate(PROMPTS, ENDLESS, use_tqdm=False)
        timer.join()
        check_idle(llm)
    # What a call did not bring is none of its business.
    kept = llm.add_request(PROMPTS[0], replace(GREEDY, output_kind=RequestOutputKind.FINAL_ONLY))
    interrupt_after(0.1)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, ENDLESS, use_tqdm=False)
    check_integrity(llm.scheduler)
    assert list(llm.requests) + list(llm.requests.results) == [kept]
    while not (results := llm.step()):
        pass
    assert [(int(result["request_id"]), result["token_ids"]) for result in results] == [(kept, want[0])]
    assert tokens(llm) == want
    if ranks == 1:
        llm.close()


def test_an_impatient_user_ends_a_step(leaves_nothing, path, monkeypatch):
    """A second Ctrl-C within a step breaks it, and with it the engine."""
    llm = make(path, ranks=1)

    def interrupt_twice(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not broken")

    monkeypatch.setattr(llm.ranks.runner, "run", interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert_dead(llm, "KeyboardInterrupt")


@pytest.mark.parametrize("seconds", [0.02, 0.5])
def test_ctrl_c_at_start_up(leaves_nothing, path, seconds):
    timer = interrupt_after(seconds)
    with pytest.raises(KeyboardInterrupt):
        make(path)
    timer.join()
    assert children() == leaves_nothing["processes"]


def test_an_exception_in_generate_that_is_not_the_engines(path, want, monkeypatch):
    class BrokenBar(progress.tqdm):
        def update(self, n=1):
            raise LookupError("no terminal")

    with make(path, ranks=1) as llm:
        monkeypatch.setattr(progress, "tqdm", BrokenBar)
        with pytest.raises(LookupError, match="no terminal"):
            llm.generate(PROMPTS, [GREEDY, ENDLESS, GREEDY], use_tqdm=True)
        check_idle(llm)
        monkeypatch.undo()
        assert tokens(llm) == want


# ---- ends and beginnings -------------------------------------------------------------------------------------------


def end_by_close(llm: LLM) -> None:
    llm.close()
    llm.close()
    assert not llm.ranks.processes


def end_by_leaving_a_block(llm: LLM) -> None:
    with llm:
        pass


def end_by_an_error(llm: LLM) -> None:
    llm.scheduler.postprocess = None
    with pytest.raises(RuntimeError, match="the engine is dead"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)


def end_by_dropping(llm: LLM) -> None:
    llm.add_request(PROMPTS[0], ENDLESS)
    llm.step()


ENDS = [end_by_close, end_by_leaving_a_block, end_by_an_error, end_by_dropping]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "number"), [(1, 12), (2, 4)])
def test_engines_made_and_dropped(leaves_nothing, path, want, ranks, number):
    for i in range(number):
        llm = make(path, ranks)
        assert tokens(llm) == want
        ENDS[i % len(ENDS)](llm)
        llm = None
        gc.collect()
        if i == 0:
            time.sleep(1)
            left = traces()
        assert_nothing_left(left)


def test_two_engines_in_two_threads(leaves_nothing, path, want):
    """Each made, used and closed in a thread of its own, at the same time."""
    got: dict[int, list] = {}

    def live(number: int) -> None:
        with make(path, async_scheduling=bool(number)) as llm:
            got[number] = [tokens(llm) for _ in range(10)]

    threads = [threading.Thread(target=live, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {0: [want] * 10, 1: [want] * 10}


def test_idle_ranks_do_not_compute(pair):
    pair.generate(PROMPTS, GREEDY, use_tqdm=False)
    pids = [os.getpid(), *(process.pid for process in pair.ranks.processes)]
    time.sleep(0.3)
    before = [cpu_seconds(pid) for pid in pids]
    time.sleep(2)
    assert [cpu_seconds(pid) - seconds < 0.1 for pid, seconds in zip(pids, before, strict=True)] == [True, True]


def test_messages(pair, path, monkeypatch):
    """A step of many prompts takes more than a pipe holds; a step of decodes takes little, however long they are."""
    sizes, dumps = [], pickle.dumps

    def recording(value, **options):
        message = dumps(value, **options)
        sizes.append(len(message))
        return message

    prompts = [list(random_prompt(seed, 400)) for seed in range(60)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with make(path, ranks=1) as llm:
        alone = tokens(llm, prompts, params)
    monkeypatch.setattr(worker.pickle, "dumps", recording)
    assert tokens(pair, prompts, params) == alone
    assert max(sizes) > 2**17
    assert max(sizes[-20:]) < 2000  # 60 rows take a block every 16 steps


# ---- scripts -------------------------------------------------------------------------------------------------------

SCRIPT = """
    import os, sys, threading, time
    from nanovllm import LLM, SamplingParams

    def make():
        return LLM({path!r}, device="cpu", tensor_parallel_size=2, max_model_len=512, kvcache_block_size=16)

    def run(llm, max_tokens):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        return [result["token_ids"] for result in llm.generate({prompts!r}, params, use_tqdm=False)]
"""


@pytest.fixture
def start(path, tmp_path):
    """Starts a script behind SCRIPT as a process group of its own; all of it is killed in the end."""
    started: list[subprocess.Popen] = []

    def start(main: str) -> subprocess.Popen:
        file = tmp_path / f"script{len(started)}.py"
        file.write_text(textwrap.dedent(SCRIPT.format(path=path, prompts=PROMPTS)) + textwrap.dedent(main))
        started.append(
            subprocess.Popen(
                [sys.executable, file],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(Path(llm_engine.__file__).parents[2]), "OMP_NUM_THREADS": "1"},
            )
        )
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def alive(pids: list[int]) -> list[int]:
    running = processes()
    return [pid for pid in pids if pid in running]


def test_callers_that_are_killed(start, want):
    """Two of them side by side, one idle and one in a step."""
    main = """
        if __name__ == "__main__":
            llm = make()
            if {fork}:  # a copy of the caller that holds all its pipes
                if os.fork() == 0:
                    time.sleep(40)
                    os._exit(0)
            print(run(llm, 8), flush=True)
            print(*(process.pid for process in llm.ranks.processes), flush=True)
            while {busy}:
                run(llm, 450)
            time.sleep(60)
    """
    callers = [start(main.format(busy=busy, fork=not busy)) for busy in (True, False)]
    ranks = []
    for caller in callers:
        assert caller.stdout.readline() == f"{want}\n"
        ranks += [int(pid) for pid in caller.stdout.readline().split()]
    assert len(alive(ranks)) == 2
    for caller in callers:
        os.kill(caller.pid, signal.SIGKILL)
    assert wait_until(lambda: not alive(ranks), 10)


def test_exit_without_close(start, want):
    caller = start("""
        def live():
            global llm  # never closed; made in a thread
            llm = make()
            print(run(llm, 8), *(process.pid for process in llm.ranks.processes))

        if __name__ == "__main__":
            thread = threading.Thread(target=live)
            thread.start()
            thread.join()
            other = make()
            print(other.ranks.processes[0].pid)
            raise SystemExit("good bye")
    """)
    out, err = caller.communicate(timeout=60)
    assert caller.returncode == 1
    assert out.startswith(str(want))
    assert not alive([int(pid) for pid in out[len(str(want)) :].split()])
    # The script's last word is the last word: nothing complains while the interpreter goes.
    assert [line for line in err.splitlines() if not line.startswith("nano-vllm:")] == ["good bye"]


def test_a_script_without_main_guard(start):
    caller = start("llm = make()\n")
    most = 0
    begin = time.monotonic()
    while caller.poll() is None and time.monotonic() - begin < 60:
        running = [pid for pid in processes() if pid == caller.pid or is_in_session(pid, caller.pid)]
        most = max(most, len(running))
        time.sleep(0.1)
    _, err = caller.communicate(timeout=5)
    assert caller.returncode == 1
    assert most <= 3  # the script, its rank, Python's helper
    *_, last = (line for line in err.splitlines() if line.startswith("RuntimeError"))
    assert "rank 1" in last
    assert len(re.findall(r"RuntimeError.*__main__", err)) >= 2  # in the rank's output and in the caller's error


def is_in_session(pid: int, session: int) -> bool:
    try:
        return os.getsid(pid) == session
    except OSError:
        return False


@pytest.mark.parametrize("seconds", [0.3, 1.5])
def test_ctrl_c_in_the_terminal_at_start_up(start, seconds):
    """The terminal sends Ctrl-C to the ranks too: while they import torch, and while rank 0 takes long to load."""
    caller = start("""
        import time
        from nanovllm.parallel import ranks as worker
        load = worker.RankGroup.load
        worker.RankGroup.load = lambda ranks: (time.sleep(5), load(ranks))
        if __name__ == "__main__":
            print(flush=True)
            make()
    """)
    caller.stdout.readline()
    ranks: set[int] = set()
    assert wait_until(lambda: bool(ranks.update(children(caller.pid)) or ranks), 30)
    time.sleep(seconds)
    os.killpg(caller.pid, signal.SIGINT)
    _, err = caller.communicate(timeout=10)
    assert caller.returncode == -signal.SIGINT
    assert wait_until(lambda: not alive(list(ranks)), 5)
    assert err.count("Traceback") == 1, err
    assert err.rstrip().endswith("KeyboardInterrupt")
