"""AsyncLLM: coroutines get what `LLM` gives, in whole or in parts, and leave nothing behind however they end."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from async_engines import WatchedEngine, check_nothing_left, metric, num_unfinished, watched
from faults import FaultyRank, assert_nothing_left, children, processes, traces, wait_until

import nanovllm.demo
from nanovllm import LLM, AsyncLLM, SamplingParams
from nanovllm.async_engine.engine_process import sendable
from nanovllm.async_engine.stream import Stream
from nanovllm.sampling_params import RequestOutputKind

pytestmark = pytest.mark.timeout(120)

DEMO = str(Path(nanovllm.demo.__file__).parent)
PROMPTS = ["introduce yourself", "What is a block table?", "list all prime numbers within 100", "Hello"]
SHORT = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
KINDS = list(RequestOutputKind)


OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 400,
    "max_num_seqs": 16,
}


@pytest.fixture(scope="module")
def engine():
    with watched(DEMO, **OPTIONS) as engine:
        yield engine


@pytest.fixture
def llm(engine):
    """An engine that must have nothing left after the test."""
    yield engine
    check_nothing_left(engine)


@pytest.fixture(scope="module")
def plain():
    """What the answers are to be compared with."""
    with LLM(DEMO, **OPTIONS) as llm:
        yield llm


async def read(llm: AsyncLLM, prompt, params: SamplingParams, request_id: str | None = None, **urgency) -> list:
    return [output async for output in llm.generate(prompt, params, request_id, **urgency)]


async def gather(llm: AsyncLLM, prompts: list, params: SamplingParams) -> list[list]:
    return await asyncio.gather(*(read(llm, prompt, params) for prompt in prompts))


def whole(outputs: list, kind: RequestOutputKind) -> list[tuple]:
    """Each sample's text, tokens and end, of what a call has read."""
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    samples = []
    for index, end in enumerate(outputs[-1].outputs):
        parts = [output.outputs[index] for output in outputs] if kind is RequestOutputKind.DELTA else [end]
        token_ids = [token_id for part in parts for token_id in part.token_ids]
        samples.append(("".join(part.text for part in parts), token_ids, end.finish_reason, end.stop_reason))
    return samples


def logprobs(outputs: list, kind: RequestOutputKind) -> list[float]:
    """All logprobs of what a call has read; they depend a little on what is computed beside them."""
    parts = outputs if kind is RequestOutputKind.DELTA else outputs[-1:]
    samples = [[part.outputs[index] for part in parts] for index in range(len(outputs[-1].outputs))]
    entries = [entry for sample in samples for part in sample for entry in part.logprobs or ()]
    return [entry[token_id].logprob for entry in entries for token_id in sorted(entry)]


# ---- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 3, "n": 3, "logprobs": 2},
        {"temperature": 0, "stop": ["a"], "ignore_eos": True},
        {"seed": 1, "presence_penalty": 1.0, "top_k": 20},
    ],
    ids=str,
)
def test_answers_are_those_of_llm(llm, plain, kind, options):
    params = SamplingParams(max_tokens=40, output_kind=kind, **options)
    results = plain.generate(PROMPTS, params, False)
    got = asyncio.run(gather(llm, PROMPTS, params))
    for outputs, result in zip(got, results, strict=True):
        assert whole(outputs, kind) == whole([result], RequestOutputKind.FINAL_ONLY)
        want = logprobs([result], RequestOutputKind.FINAL_ONLY)
        assert logprobs(outputs, kind) == pytest.approx(want, abs=1e-4)
    if kind is RequestOutputKind.FINAL_ONLY:
        assert [len(outputs) for outputs in got] == [1] * len(PROMPTS)
    else:
        assert max(map(len, got)) > 3, "parts come while the request runs"


def test_more_callers_than_rows(llm, plain):
    want = [result["token_ids"] for result in plain.generate([[i, 5, 6] for i in range(60)], SHORT, False)]
    got = asyncio.run(gather(llm, [[i, 5, 6] for i in range(60)], SHORT))
    assert [outputs[-1].token_ids for outputs in got] == want


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logprobs_of_the_prompt_are_sent_once(llm, plain, monkeypatch, kind):
    """But are there whenever something is read."""
    sent, hand_out = [], llm.hand_out

    def recorded_hand_out(items):
        sent.extend(output["prompt_logprobs"] for _, output in items)
        hand_out(items)

    monkeypatch.setattr(llm, "hand_out", recorded_hand_out)
    params = replace(SHORT, prompt_logprobs=3, output_kind=kind)
    outputs = asyncio.run(read(llm, PROMPTS[0], params))
    (want,) = plain.generate(PROMPTS[0], params, use_tqdm=False)
    assert all(
        [list(entry or ()) for entry in output.prompt_logprobs]
        == [list(entry or ()) for entry in want.prompt_logprobs]
        for output in outputs
    )
    assert len(sent) >= len(outputs) and sum(logprobs is not None for logprobs in sent) == 1


def test_a_result_that_has_come_is_read_though_the_engine_fails(plain):
    async def read_late() -> str:
        stream = Stream(RequestOutputKind.FINAL_ONLY)
        stream.checked = plain.intake.check_one(PROMPTS[0], SHORT)
        (result,) = plain.generate(PROMPTS[0], SHORT, use_tqdm=False)
        assert stream.put(result) and not stream.put(RuntimeError("it was closed"))
        stream.wake()
        return (await stream.read()).finish_reason

    assert asyncio.run(read_late()) == "length"


def test_several_event_loops_and_threads_share_an_engine(llm, plain):
    want = plain.generate(PROMPTS, SHORT, use_tqdm=False)

    async def in_threads() -> list:
        calls = [asyncio.to_thread(lambda: asyncio.run(gather(llm, PROMPTS, SHORT))) for _ in range(3)]
        return await asyncio.gather(*calls, gather(llm, PROMPTS, SHORT))

    texts = [result.text for result in want]
    got = asyncio.run(in_threads())
    assert [[outputs[-1].text for outputs in answers] for answers in got] == [texts] * 4


def test_structured_outputs(llm):
    params = SamplingParams(max_tokens=20, structured_outputs={"choice": ["yes", "no"]})
    (output,) = asyncio.run(read(llm, "well?", params))[-1:]
    assert output.text in ("yes", "no")


def test_mistakes_are_refused(llm):
    async def read_twice():
        async with aclosing(llm.generate("a", ENDLESS, "x")) as outputs:
            await anext(outputs)
            await read(llm, "a", SHORT, "x")

    for prompt, params in [("", SHORT), ([1, -3], SHORT), ("a", SamplingParams(logprobs=500)), ([5] * 9999, SHORT)]:
        with pytest.raises(ValueError):
            asyncio.run(read(llm, prompt, params))
    with pytest.raises(TypeError):
        asyncio.run(read(llm, "a", {"temperature": 0}))
    with pytest.raises(ValueError, match="of no unfinished request"):
        asyncio.run(read_twice())


def test_mistaken_urgency_is_refused(llm):
    async def ask(**options):
        await anext(llm.generate("a", SHORT, **options))

    for options, error in [
        ({"priority": 1}, ValueError),
        ({"priority": "1"}, TypeError),
        ({"timeout": -1}, ValueError),
    ]:
        with pytest.raises(error, match=next(iter(options))):
            asyncio.run(ask(**options))


async def until_unfinished(llm: AsyncLLM, number: int) -> None:
    while await asyncio.to_thread(num_unfinished, llm) < number:
        await asyncio.sleep(0.01)


def test_urgent_requests_go_first():
    ended = []

    async def ask(llm: AsyncLLM, priority: int) -> None:
        await read(llm, [5, 6], SHORT, priority=priority)
        ended.append(priority)

    async def ask_all(llm: AsyncLLM) -> None:
        first = asyncio.create_task(read(llm, [5, 6], ENDLESS, "first"))
        await until_unfinished(llm, 1)  # else another may come before it, as each is checked in a thread
        calls = [asyncio.create_task(ask(llm, priority)) for priority in (3, 1, 2)]
        await until_unfinished(llm, 4)
        await llm.abort("first")
        await asyncio.gather(first, *calls)

    with watched(DEMO, **OPTIONS | {"max_num_seqs": 1, "scheduling_policy": "priority"}) as llm:
        asyncio.run(ask_all(llm))
    assert ended == [1, 2, 3]


# ---- ends ----------------------------------------------------------------------------------------------------------


def num_generated(llm: AsyncLLM) -> float:
    return metric(llm, "generation_tokens")


def read_aborted(llm: AsyncLLM, kind: RequestOutputKind, has_tokens: bool) -> tuple:
    """The only choice of a request that is aborted more than once, and others that are not there; at once or later."""
    params = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True, output_kind=kind)
    before = num_generated(llm)

    async def abort() -> list:
        call = asyncio.create_task(read(llm, "Hello", params, "x"))
        await asyncio.sleep(0)
        while has_tokens and await asyncio.to_thread(num_generated, llm) == before:
            await asyncio.sleep(0.01)
        for request_id in ("x", "x", "unknown"):
            await llm.abort(request_id)
        return await call

    (choice,) = whole(asyncio.run(abort()), kind)
    return choice


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_abort(llm, plain, kind):
    _, token_ids, reason, _ = read_aborted(llm, kind, True)
    (result,) = plain.generate("Hello", SamplingParams(temperature=0, max_tokens=300, ignore_eos=True), False)
    assert reason == "abort" and token_ids and token_ids[:300] == result["token_ids"][: len(token_ids)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_deadline(llm, kind):
    outputs = asyncio.run(read(llm, "a", replace(ENDLESS, output_kind=kind), timeout=0.2))
    assert outputs[-1].finished and outputs[-1].finish_reason == "timeout"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_abort_of_a_request_that_is_not_queued_yet(llm, kind):
    _, _, reason, _ = read_aborted(llm, kind, False)
    assert reason == "abort"


def test_an_id_may_be_used_again_at_once(llm, plain):
    """And nothing of the call that was cancelled reaches the new one."""
    (want,) = plain.generate([[5, 6]], SHORT, use_tqdm=False)
    params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, output_kind=kind) for kind in KINDS]

    async def cancel_and_ask_again() -> None:
        for number in range(60):
            call = asyncio.create_task(read(llm, [number + 2] * 9, params[number % 3], "x"))
            await asyncio.sleep(number % 10 * 0.004)
            call.cancel()
            await asyncio.wait([call])
            kind = KINDS[number // 3 % 3]
            outputs = await read(llm, [5, 6], params[number // 3 % 3], "x")
            ((text, token_ids, *_),) = whole(outputs, kind)
            assert (text, token_ids) == (want.text, want.token_ids)

    asyncio.run(cancel_and_ask_again())


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.05, 0.3])
def test_cancelling_the_task_aborts_the_request(llm, seconds):
    async def cancel() -> None:
        calls = [asyncio.create_task(read(llm, prompt, ENDLESS)) for prompt in PROMPTS]
        other = asyncio.create_task(read(llm, "Hello", SHORT))
        await asyncio.sleep(seconds)
        for call in calls:
            call.cancel()
        assert len((await other)[-1].token_ids) == 12
        done = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(error, asyncio.CancelledError) for error in done)

    asyncio.run(cancel())


def test_breaking_off_aborts_the_request(llm):
    async def break_off() -> None:
        async for output in llm.generate("Hello", ENDLESS):
            assert output.token_ids
            break

    asyncio.run(break_off())


def test_a_slow_reader_delays_nobody_and_loses_nothing(llm, plain):
    params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True, output_kind=RequestOutputKind.DELTA)

    async def race() -> list:
        parts = []
        async with aclosing(llm.generate("Hello", params)) as slow:
            parts.append(await anext(slow))
            await read(llm, "Hello", params)
            while await asyncio.to_thread(num_unfinished, llm):
                await asyncio.sleep(0.01)
            parts += [part async for part in slow]
        return parts

    parts = asyncio.run(race())
    assert len(parts) <= 3, "what was not read is merged"
    (result,) = plain.generate("Hello", params, False)
    assert whole(parts, RequestOutputKind.DELTA) == whole([result], RequestOutputKind.FINAL_ONLY)


# ---- failures ------------------------------------------------------------------------------------------------------


async def errors_of(llm: AsyncLLM, then) -> list[BaseException]:
    calls = [asyncio.create_task(read(llm, prompt, ENDLESS)) for prompt in PROMPTS]
    await asyncio.sleep(0.2)
    await asyncio.to_thread(then)
    errors = await asyncio.gather(*calls, return_exceptions=True)
    return [*errors, *await asyncio.gather(read(llm, "Hello", SHORT), return_exceptions=True)]


def check_dead(errors: list[BaseException], llm: AsyncLLM, cause: str) -> None:
    assert [type(error) for error in errors] == [RuntimeError] * 5
    assert all(cause in str(error) for error in errors)
    for ask in (llm.check_health, llm.get_metrics):
        with pytest.raises(RuntimeError, match=cause):
            ask()
    llm.thread.join(10)
    assert not llm.thread.is_alive() and not llm.streams and llm.process.returncode is not None


def test_closing_ends_all_calls():
    with watched(DEMO, **OPTIONS) as llm:
        check_dead(asyncio.run(errors_of(llm, llm.close)), llm, "it was closed")
        assert llm.process.returncode == 0


def test_a_failing_step_ends_all_calls():
    with watched(DEMO, WatchedEngine(num_steps=50), **OPTIONS) as llm:
        check_dead(asyncio.run(errors_of(llm, lambda: None)), llm, "division by zero")


class Unreadable:
    def __reduce__(self) -> tuple:
        return int, ("x",)


def test_a_message_that_cannot_be_read_ends_all_calls():
    with watched(DEMO, **OPTIONS) as llm:
        check_dead(asyncio.run(errors_of(llm, lambda: llm._send(Unreadable()))), llm, "invalid literal for int")


class UnreadableText(str):
    __reduce__ = Unreadable.__reduce__


def test_a_request_that_cannot_be_read_ends_its_call_alone(llm, plain):
    params = replace(SHORT, stop=[UnreadableText("zzz")])
    with pytest.raises(RuntimeError, match="cannot read the request: ValueError"):
        asyncio.run(read(llm, "Hello", params))
    (want,) = plain.generate(["Hello"], SHORT, use_tqdm=False)
    output = asyncio.run(read(llm, UnreadableText("Hello"), SHORT, UnreadableText("a")))[-1]
    assert (output.prompt, output.request_id, output.text) == ("Hello", "a", want.text)


def test_a_fork_is_refused(llm, monkeypatch):
    monkeypatch.setattr(llm, "_caller", os.getppid())
    with pytest.raises(RuntimeError, match="in a fork"):
        asyncio.run(read(llm, "Hello", SHORT))
    monkeypatch.undo()


def test_a_killed_rank_ends_all_calls(tmp_path):
    engine = WatchedEngine(FaultyRank("decode", "kill", tmp_path))
    with watched(DEMO, engine, **OPTIONS, tensor_parallel_size=2) as llm:
        check_dead(asyncio.run(errors_of(llm, lambda: None)), llm, "rank 1 ended with exit code -9")


def test_a_rank_killed_while_idle_is_noticed():
    with watched(DEMO, **OPTIONS, tensor_parallel_size=2) as llm:
        (rank,) = children(llm.process.pid)
        os.kill(rank, signal.SIGKILL)
        assert wait_until(lambda: llm.failure is not None, 10)
        with pytest.raises(RuntimeError, match="exit code -9"):
            asyncio.run(read(llm, "Hello", SHORT))


def test_a_killed_engine_ends_all_calls_and_its_ranks():
    with watched(DEMO, **OPTIONS, tensor_parallel_size=2) as llm:
        (rank,) = children(llm.process.pid)
        check_dead(asyncio.run(errors_of(llm, llm.process.kill)), llm, "its process ended with exit code -9")
        assert wait_until(lambda: rank not in processes(), 10)


def test_an_engine_that_hangs_is_killed(monkeypatch):
    monkeypatch.setattr("nanovllm.async_engine.async_llm.CLOSE_SECONDS", 0.5)
    with watched(DEMO, **OPTIONS) as llm:
        llm.process.send_signal(signal.SIGSTOP)
        llm.close()
        assert llm.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        (None, {"max_num_seqs": 0}),
        (None, {"foo": 1}),
        (None, {"max_model_len": 600, "num_kvcache_blocks": 2}),
        ("exception", {"tensor_parallel_size": 2}),
    ],
    ids=str,
)
def test_errors_at_the_start_are_those_of_llm(monkeypatch, tmp_path, fault, options):
    before, options = children(), OPTIONS | options
    faulty = FaultyRank("loading", fault, tmp_path) if fault else None
    if faulty:
        monkeypatch.setattr("nanovllm.parallel.ranks.run_rank", faulty)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as want:
        LLM(DEMO, **options)
    with pytest.raises(want.type) as got, watched(DEMO, WatchedEngine(faulty), **options):
        pass
    assert got.type is want.type and str(got.value) == str(want.value)
    assert children() == before


def test_closing_leaves_nothing():
    before = traces()
    for _ in range(2):
        with watched(DEMO, **OPTIONS) as llm:
            asyncio.run(read(llm, "Hello", SHORT))
        assert_nothing_left(before)


def test_ctrl_c_at_the_start():
    before = children()
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        AsyncLLM(DEMO, **OPTIONS)
    assert children() == before


def test_a_process_that_ends_at_the_start(monkeypatch):
    monkeypatch.setattr("nanovllm.async_engine.engine_process.run_engine", print)
    with pytest.raises(RuntimeError, match="exit code 0"):
        AsyncLLM(DEMO, **OPTIONS)


def test_an_error_that_cannot_be_sent_is_told():
    class Picky(Exception):
        def __init__(self, one: str, two: str) -> None:
            super().__init__(one + two)

    assert str(sendable(Picky("a", "b"))) == "Picky: ab"
    assert type(sendable(KeyError("a"))) is KeyError


# Scripts without a main guard, though a rank is started.
BEGINNING = """
import asyncio, os, sys, threading, time
from faults import children
from nanovllm import AsyncLLM, SamplingParams

async def read(max_tokens):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return [output async for output in llm.generate("Hello", params)][-1]

def tell():
    print(llm.process.pid, *children(llm.process.pid), flush=True)

llm = AsyncLLM({model!r}, device="cpu", tensor_parallel_size=2, num_kvcache_blocks=20)
threading.Thread(target=asyncio.run, args=[read(2000)], daemon=True).start()
while not any(metric.value for metric in llm.get_metrics() if metric.name.endswith("generation_tokens")):
    time.sleep(0.02)
"""
INTERRUPTED = """
try:
    tell()
    time.sleep(60)
except KeyboardInterrupt:
    print(len(asyncio.run(read(5)).token_ids), len(llm.streams))
"""
FORKED = """
tell()
if os.fork() == 0:
    sys.exit()
os.wait()
print(len(asyncio.run(read(5)).token_ids), len(llm.streams))
"""


@pytest.mark.parametrize(
    ("end", "number", "returncode", "output"),
    [
        ("tell(); print('end')", None, 0, "end"),
        ("tell(); time.sleep(60)", signal.SIGKILL, -signal.SIGKILL, ""),
        pytest.param(INTERRUPTED, signal.SIGINT, 0, "5 1", marks=pytest.mark.slow),
        pytest.param(FORKED, None, 0, "5 1", marks=pytest.mark.slow),
    ],
    ids=["in the middle of a step", "killed", "interrupted", "forked"],
)
def test_a_program_that_ends_leaves_nothing(tmp_path, end, number, returncode, output):
    """Ctrl-C reaches all processes of a terminal, of which the engine leaves it to the caller's."""
    script = tmp_path / "script.py"
    script.write_text(BEGINNING.format(model=DEMO) + end)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # the script imports `faults`
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        engine, rank = map(int, process.stdout.readline().split())
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        elif number is not None:
            process.send_signal(number)
        assert process.stdout.read().strip() == output
        assert process.wait(30) == returncode
    assert wait_until(lambda: not {engine, rank} & set(processes()), 10)


# ---- many ----------------------------------------------------------------------------------------------------------


async def call_at_random(llm: AsyncLLM, index: int, draw: random.Random) -> str:
    """One call, cancelled at a random moment or not; returns how it ended."""
    kind = draw.choice(KINDS)
    params = SamplingParams(temperature=0, max_tokens=draw.randint(1, 40), ignore_eos=True, output_kind=kind)
    call = asyncio.create_task(read(llm, [index % 7 + 2] * draw.randint(1, 40), params))
    if draw.random() < 0.5:
        await asyncio.sleep(draw.random() * 2)
        call.cancel()
    try:
        ((_, token_ids, reason, _),) = whole(await call, kind)
    except asyncio.CancelledError:
        return "cancelled"
    assert reason == "length" and len(token_ids) == params.max_tokens
    return "finished"


async def call_many(llm: AsyncLLM, number: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return await asyncio.gather(*(call_at_random(llm, index, draw) for index in range(number)))


@pytest.mark.parametrize("number", [200, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_many_requests_half_of_them_cancelled(llm, number):
    ends = asyncio.run(call_many(llm, number, seed=0))
    assert len(ends) == number and ends.count("finished") >= number // 3 and ends.count("cancelled") > 0


@pytest.mark.slow
def test_a_thousand_slow_readers(llm):
    """Who reads on when all have ended finds everything, in one part; others were served meanwhile."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    readers_go_on = asyncio.Event()

    async def read_slowly(index: int) -> list:
        async with aclosing(llm.generate([index % 100 + 2, 5], params)) as outputs:
            parts = [await anext(outputs)]
            await readers_go_on.wait()
            return parts + [part async for part in outputs]

    async def run() -> list:
        calls = [asyncio.create_task(read_slowly(index)) for index in range(1000)]
        assert len((await read(llm, "Hello", SHORT))[-1].token_ids) == 12
        while await asyncio.to_thread(num_unfinished, llm) or len(llm.streams) < 1000:
            await asyncio.sleep(0.05)
        readers_go_on.set()
        return await asyncio.gather(*calls)

    for parts in asyncio.run(run()):
        ((_, token_ids, reason, _),) = whole(parts, RequestOutputKind.DELTA)
        assert len(parts) <= 2 and len(token_ids) == 8 and reason == "length"
