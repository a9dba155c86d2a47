"""Several threads use one engine at once: each call gets its own answer, and what fails in one harms no other."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress

import pytest
import torch
from engines import Trace
from thread_fuzz import (
    Caller,
    answer_in_threads,
    check_nothing_left,
    draw_calls,
    find_differences,
    make_checkpoint,
    make_engine,
)

from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import ModelRunner, StepOutput
from nanovllm.engine.step_input import StepInput
from nanovllm.parallel.turns import Turns
from nanovllm.reports import progress

pytestmark = pytest.mark.timeout(120)

PROMPT = list(range(5, 25))
ENDLESS = SamplingParams(temperature=0, max_tokens=170, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("threads")
    make_checkpoint(path)
    return str(path)


@pytest.fixture
def llm(folder):
    with make_engine(folder) as llm:
        yield llm
        if llm.failure is None:
            check_nothing_left(llm)


def generate(llm: LLM, params: SamplingParams = SHORT, prompt: list[int] = PROMPT, **options) -> list[int]:
    return llm.generate(prompt, params, use_tqdm=False, **options)[0]["token_ids"]


class Background:
    """A call in a thread of its own: its result, or what it raised."""

    def __init__(self, function, *args) -> None:
        self.function, self.args = function, args
        self.result = self.error = None
        self.seconds = 0.0
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        start = time.monotonic()
        try:
            self.result = self.function(*self.args)
        except BaseException as error:
            self.error = error
        self.seconds = time.monotonic() - start

    def join(self):
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self


def wait_for_requests(llm: LLM, number: int) -> None:
    deadline = time.monotonic() + 20
    while len(llm.requests) < number:
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ---- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "seed"),
    [({}, 0), ({"async_scheduling": False}, 1), ({"tensor_parallel_size": 2}, 2), ({"max_num_batched_tokens": 9}, 3)],
    ids=str,
)
def test_random_calls_of_eight_threads(folder, options, seed):
    calls = draw_calls(8, 8, seed)
    with make_engine(folder, **options) as llm:
        want = [[Caller(llm).make(call) for call in group] for group in calls]
        llm.reset_prefix_cache()
        trace = Trace(llm)
        got = answer_in_threads(llm, calls)
        check_nothing_left(llm)
        assert find_differences(want, got, calls) == []
        assert trace.most_seqs > 4, "requests of several threads are computed together"


def test_asyncio_and_a_pool(llm):
    prompts = [[seed, *PROMPT] for seed in range(2, 18)]
    want = [generate(llm, prompt=prompt) for prompt in prompts]

    async def gather() -> list[list[int]]:
        return await asyncio.gather(*(asyncio.to_thread(generate, llm, SHORT, prompt) for prompt in prompts))

    assert asyncio.run(gather()) == want
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: generate(llm, prompt=prompt), prompts)) == want


def test_a_stream_goes_on_while_another_thread_generates(llm):
    """It does not wait for the other call's end."""
    other = Background(generate, llm, ENDLESS)
    wait_for_requests(llm, 1)
    assert "".join(llm.stream([3, *PROMPT], SHORT)) != ""
    assert other.thread.is_alive()
    assert len(other.join().result) == 170


def test_results_of_generate_are_not_handed_out_by_step(llm):
    other = Background(lambda: [generate(llm) for _ in range(30)])
    handed_out = []
    while other.thread.is_alive():
        handed_out += llm.step()
    assert handed_out == [] and other.join().result == [generate(llm)] * 30


def test_aborting_the_request_of_another_call(llm):
    want = generate(llm, ENDLESS)
    other = Background(lambda: llm.generate(PROMPT, ENDLESS, use_tqdm=False)[0])
    wait_for_requests(llm, 1)
    (request_id,) = llm.requests
    llm.abort_request(request_id)
    result = other.join().result
    assert result["finish_reason"] == "abort" and want[: len(result["token_ids"])] == result["token_ids"]
    stream = llm.stream(PROMPT, ENDLESS)
    taken = [next(stream)]
    llm.abort_request(next(iter(llm.requests)))
    taken += stream
    assert llm.tokenizer.decode(want).startswith("".join(taken))


# ---- failures ------------------------------------------------------------------------------------------------------


def test_an_exception_in_one_thread(llm, monkeypatch):
    class BrokenBar(progress.tqdm):
        def update(self, n=1):
            raise LookupError("no terminal")

    want = generate(llm, ENDLESS)
    monkeypatch.setattr(progress, "tqdm", BrokenBar)
    other = Background(lambda: list(llm.stream(PROMPT, ENDLESS)))
    broken = Background(llm.generate, [PROMPT, PROMPT], [SHORT, ENDLESS])
    assert isinstance(broken.join().error, LookupError)
    assert "".join(other.join().result) == llm.tokenizer.decode(want).rstrip("\ufffd")


@pytest.mark.parametrize("is_breakable", [True, False])
def test_a_second_ctrl_c_takes_effect_where_it_may(is_breakable):
    turns, reached = Turns(), []
    with pytest.raises(KeyboardInterrupt), turns.take():
        signal.raise_signal(signal.SIGINT)
        reached.append("first")
        with turns.breakable() if is_breakable else nullcontext():
            signal.raise_signal(signal.SIGINT)
            reached.append("second")
    assert reached == (["first"] if is_breakable else ["first", "second"])
    assert not turns.is_mine() and not turns.is_breakable


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.05, 0.1])
def test_ctrl_c_in_the_main_thread(llm, seconds):
    """In a step or while waiting for a turn: the other threads' calls go on."""
    want = generate(llm, ENDLESS)
    others = [Background(generate, llm, ENDLESS) for _ in range(3)]
    wait_for_requests(llm, 3)
    timer = threading.Timer(seconds, signal.raise_signal, [signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        while True:
            generate(llm, ENDLESS, [3, *PROMPT])
    timer.join()
    assert [other.join().result for other in others] == [want] * 3


def test_closing_from_another_thread(llm):
    calls = [
        Background(generate, llm, ENDLESS),
        Background(lambda: list(llm.stream(PROMPT, ENDLESS))),
        Background(lambda: [llm.step() for _ in range(10**6)]),
    ]
    wait_for_requests(llm, 2)
    closing = Background(llm.close).join()
    assert closing.error is None and closing.seconds < 5
    for call in calls:
        assert isinstance(call.join().error, RuntimeError) and "it was closed" in str(call.error)
    with pytest.raises(RuntimeError, match="closed"):
        llm.add_request(PROMPT)


def test_a_stream_that_ends_in_the_middle_of_a_step(llm, monkeypatch):
    """As when the garbage collector finds it there: its request is dropped once the step is over."""
    stream = llm.stream([3, *PROMPT], ENDLESS)
    next(stream)
    schedule, held = llm.scheduler.schedule, [stream]
    del stream

    def schedule_and_collect():
        batch = schedule()
        held.clear()
        gc.collect()
        assert len(llm.requests) == 2, "not in the middle of it"
        monkeypatch.undo()
        return batch

    monkeypatch.setattr(llm.scheduler, "schedule", schedule_and_collect)
    assert len(generate(llm)) == 8
    check_nothing_left(llm)


# ---- turns ---------------------------------------------------------------------------------------------------------


def test_what_is_asked_for_is_done_in_a_turn():
    """At once, or at the end of the turn that a thread has, be it another; asking waits for nobody."""
    turns, done = Turns(), []
    turns.ask(lambda: done.append(("at once", turns.is_mine())))
    with pytest.raises(LookupError), turns.take():
        with turns.take():
            turns.ask(lambda: done.append(("at its end", turns.is_mine())))
        assert len(done) == 1
        raise LookupError
    assert done == [("at once", True), ("at its end", True)]
    began, ends = threading.Event(), threading.Event()

    def hold() -> None:
        with turns.take():
            began.set()
            ends.wait(20)

    other = Background(hold)
    assert began.wait(20)
    turns.ask(lambda: done.append(("by another thread", threading.current_thread() is other.thread)))
    assert len(done) == 2
    ends.set()
    other.join()
    assert done[2:] == [("by another thread", True)] and not turns.asked


def test_the_garbage_collector_asks_in_the_middle_of_taking_a_turn(monkeypatch):
    """It ends streams that nobody reads any more, in whatever a thread is doing."""
    turns, done = Turns(), []

    class Guard:
        """Within which it ends one at the beginning, and one at the end."""

        def __init__(self) -> None:
            self.guard, self.num_asked, self.is_asking = turns._guard, 0, False

        def __enter__(self) -> None:
            self.guard.acquire()
            self.ask()

        def __exit__(self, *exception: object) -> None:
            self.ask()
            self.guard.release()

        def ask(self) -> None:
            if not self.is_asking:
                self.is_asking = True
                self.num_asked += 1
                turns.ask(lambda: done.append(turns.is_mine()))
                self.is_asking = False

    def take_turns() -> None:
        for _ in range(200):
            with turns.take():
                pass

    guard = Guard()
    monkeypatch.setattr(turns, "_guard", guard)
    threads = [threading.Thread(target=take_turns, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert done == [True] * guard.num_asked and len(done) >= 4 * 200 * 4 and not turns.asked


def test_turns_come_in_the_order_of_asking():
    turns, order = Turns(), []

    def ask(number: int) -> None:
        with turns.take():
            order.append(number)

    with turns.take():
        threads = []
        for number in range(6):
            threads.append(Background(ask, number))
            while len(turns._waiting) <= number:
                time.sleep(0.001)
        with turns.take():  # asking within one's turn does not wait
            assert turns.is_mine()
        assert turns.is_mine()
    for thread in threads:
        thread.join()
    assert order == list(range(6)) and not turns.is_mine()


def test_a_turn_ends_with_an_exception():
    turns = Turns()
    with pytest.raises(LookupError), turns.take():
        raise LookupError
    assert Background(lambda: turns.take().__enter__()).join().error is None


def test_interrupts_while_waiting_lose_no_turn():
    """At random moments, also when the turn comes."""
    turns = Turns()
    is_over = threading.Event()

    def take_turns() -> None:
        while not is_over.is_set():
            with turns.take():
                time.sleep(0.0002)

    other, num_taken, num_interrupts = Background(take_turns), 0, 0
    end = time.monotonic() + 2
    while time.monotonic() < end:
        timer = threading.Timer(0.0005 * (num_interrupts % 5), signal.raise_signal, [signal.SIGINT])
        with suppress(KeyboardInterrupt):
            timer.start()
            with turns.take():
                num_taken += 1
            timer.join()
            raise AssertionError("not interrupted")
        timer.join()
        num_interrupts += 1
    is_over.set()
    other.join()
    assert num_taken > 0 and num_interrupts > 100
    with turns.take():
        pass


@pytest.mark.parametrize(("num_ranks", "expected"), [(1, 4), (2, 2)])
def test_ranks_share_the_threads_of_torch(folder, monkeypatch, num_ranks, expected):
    """Of a CPU; whoever made the engine has its own back after each step."""
    seen, run = set(), ModelRunner.run

    def counting(self: ModelRunner, step: StepInput) -> StepOutput:
        seen.add(torch.get_num_threads())
        return run(self, step)

    monkeypatch.setattr(ModelRunner, "run", counting)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with make_engine(folder, tensor_parallel_size=num_ranks) as llm:
            llm.generate([PROMPT], SHORT, use_tqdm=False)
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(num_threads)
    assert seen == {expected}
