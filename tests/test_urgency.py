"""Priorities and deadlines of requests: who goes first, and who must end."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from checkpoints import mixed_prompts, random_prompt
from engines import GREEDY, Trace, check_idle, engine, expected, tokens
from integrity import check_integrity

from nanovllm import LLM, SamplingParams
from nanovllm.requests import intake
from nanovllm.sampling_params import RequestOutputKind

SHORT = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
PROMPT = list(random_prompt(4, 20))


class Clock:
    """The time of deadlines, which stands still."""

    def __init__(self) -> None:
        self.now = 100.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(intake, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def llm(checkpoint):
    with engine(checkpoint("qwen3").path, scheduling_policy="priority") as llm:
        yield llm
        check_idle(llm)


def finish_order(llm: LLM) -> list[str]:
    order = []
    while not llm.is_finished():
        order += [result.request_id for result in llm.step() if result.finished]
    return order


# ---- priorities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 40, "max_num_seqs": 7}], ids=str)
@pytest.mark.parametrize("priority", [[index % 3 for index in range(12)], list(range(12, 0, -1))], ids=str)
def test_greedy_tokens(checkpoint, priority, options, async_scheduling):
    """Urgent requests come while others run, and take their blocks; the tokens are those of transformers."""
    checkpoint, prompts = checkpoint("qwen3"), mixed_prompts()
    options |= {"num_kvcache_blocks": 19, "async_scheduling": async_scheduling, "scheduling_policy": "priority"}
    with engine(checkpoint.path, **options) as llm:
        trace = Trace(llm)
        results = llm.generate([list(prompt) for prompt in prompts], GREEDY, use_tqdm=False, priority=priority)
        check_idle(llm)
        assert tokens(results) == expected(checkpoint, prompts) and trace.num_preemptions > 0
        llm.reset_prefix_cache()
        todo, results, numbers = list(zip(prompts, priority, strict=True)), {}, []
        while todo or not llm.is_finished():
            if todo:
                prompt, number = todo.pop(0)
                numbers.append(llm.add_request(list(prompt), GREEDY, priority=number))
            results |= {int(result.request_id): result for result in llm.step()}
            check_integrity(llm.scheduler)
        assert tokens(results[number] for number in numbers) == expected(checkpoint, prompts)
        check_idle(llm)


def test_urgent_requests_go_first(checkpoint):
    with engine(checkpoint("qwen3").path, scheduling_policy="priority", max_num_seqs=1) as llm:
        for name, priority in [("a", 2), ("b", 1), ("c", 0), ("d", 1)]:
            llm.add_request(name, PROMPT, SHORT, priority=priority)
        assert finish_order(llm) == ["c", "b", "d", "a"]
    with engine(checkpoint("qwen3").path, max_num_seqs=1) as llm:
        for name in "abc":
            llm.add_request(name, PROMPT, SHORT, priority=0)
        assert finish_order(llm) == ["a", "b", "c"]


def test_all_samples_of_a_request_have_its_priority(llm):
    llm.add_request(PROMPT, SamplingParams(n=3, max_tokens=2), priority=-7)
    (request,) = llm.requests.values()
    assert [seq.priority for seq in request.seqs] == [-7] * 3
    finish_order(llm)


@pytest.mark.parametrize(
    ("priority", "error", "match"),
    [
        ([1], ValueError, "priority has 1 entries for 2 prompts"),
        (1, TypeError, "priority must be a list with a number for each prompt, got 1"),
        ([1, 0.5], TypeError, "priority must be of type int, got 0.5"),
        ([1, [2]], TypeError, "priority must be of type int"),
        ([0, True], TypeError, "priority must be of type int, got True"),
    ],
    ids=str,
)
def test_bad_priorities(llm, priority, error, match):
    with pytest.raises(error, match=match):
        llm.generate([PROMPT, PROMPT], SHORT, use_tqdm=False, priority=priority)


def test_a_priority_needs_the_policy(checkpoint):
    with engine(checkpoint("qwen3").path) as llm:
        with pytest.raises(ValueError, match=r"priority=2 needs LLM\(..., scheduling_policy='priority'\)"):
            llm.generate([PROMPT, PROMPT], SHORT, use_tqdm=False, priority=[0, 2])
        with pytest.raises(ValueError, match="priority=-1 needs"):
            llm.add_request(PROMPT, SHORT, priority=-1)
        assert len(llm.generate([PROMPT, PROMPT], SHORT, use_tqdm=False, priority=[0, 0])) == 2


def test_no_other_policy(checkpoint):
    with pytest.raises(ValueError, match="scheduling_policy must be one of fcfs, priority, got 'lifo'"):
        engine(checkpoint("qwen3").path, scheduling_policy="lifo")


# ---- deadlines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
def test_a_request_ends_at_its_deadline(checkpoint, clock, async_scheduling):
    """With what there is of it; others do not notice, and it may have been waiting or running."""
    options = {"max_num_seqs": 2, "async_scheduling": async_scheduling}
    with engine(checkpoint("qwen3").path, **options) as llm:
        want = llm.generate([PROMPT], LONG, use_tqdm=False)[0]
        names = {"running": 7.0, "free": None, "waiting": 7.0, "late": 100.0}
        for name, timeout in names.items():
            llm.add_request(name, PROMPT, LONG, timeout=timeout)
        results = {}
        for _ in range(12):
            assert llm.step() == []
        clock.now += 6.9
        assert llm.step() == []
        clock.now += 0.1
        while not llm.is_finished():
            results |= {result.request_id: result for result in llm.step()}
            check_integrity(llm.scheduler)
        reasons = {name: results[name].finish_reason for name in names}
        assert reasons == {"running": "timeout", "free": "length", "waiting": "timeout", "late": "length"}
        cut = results["running"]
        assert cut.finished and 10 <= len(cut.token_ids) < 20 and cut.token_ids == want.token_ids[: len(cut.token_ids)]
        assert cut.metrics.finished_time is not None and results["waiting"].token_ids == []
        assert results["free"].token_ids == results["late"].token_ids == want.token_ids
        check_idle(llm)
        assert llm.generate([PROMPT], LONG, use_tqdm=False)[0].token_ids == want.token_ids


def test_deadlines_of_ended_requests_are_forgotten(llm, clock):
    kept = llm.add_request(PROMPT, LONG, timeout=500)
    for _ in range(1500):
        llm.abort_request(llm.add_request(PROMPT, LONG, timeout=1000))
    llm.step()
    assert len(llm.intake.deadlines) == 1
    clock.now += 501
    results = [result for _ in range(2) for result in llm.step() if result.finished]
    assert [(result.request_id, result.finish_reason) for result in results] == [(str(kept), "timeout")]


def test_deadlines_of_a_call(llm, clock, monkeypatch):
    """`generate` returns what there is; the clock runs with the steps."""
    schedule = llm.scheduler.schedule

    def schedule_and_wait():
        clock.now += 1
        return schedule()

    monkeypatch.setattr(llm.scheduler, "schedule", schedule_and_wait)
    results = llm.generate([PROMPT, PROMPT], [SHORT, LONG], use_tqdm=False, timeout=10)
    assert [result.finish_reason for result in results] == ["length", "timeout"]
    assert len(results[0].token_ids) == 3 and 5 <= len(results[1].token_ids) <= 10
    assert [result.finish_reason for result in llm.generate([PROMPT], LONG, use_tqdm=False, timeout=0)] == ["timeout"]
    results = llm.generate([PROMPT], SamplingParams(n=2, max_tokens=40, ignore_eos=True), use_tqdm=False, timeout=10)
    assert [sample.finish_reason for sample in results[0].outputs] == ["timeout"] * 2


def test_what_is_reported_before_a_deadline(llm, clock):
    """Piece by piece, no token is lost or told twice."""
    want = llm.generate([PROMPT], LONG, use_tqdm=False)[0].token_ids
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    llm.add_request(PROMPT, params, timeout=5)
    parts = []
    for _ in range(8):
        parts += llm.step()
    clock.now += 5
    while not llm.is_finished():
        parts += llm.step()
    token_ids = [token_id for part in parts for token_id in part.token_ids]
    assert [part.finish_reason for part in parts[-2:]] == [None, "timeout"]
    assert token_ids == want[: len(token_ids)] and len(token_ids) >= 6


def test_a_deadline_while_a_grammar_is_compiled(llm, clock, monkeypatch):
    endless = SimpleNamespace(compile=lambda _: Future(), validate=lambda _: None)
    monkeypatch.setitem(vars(llm.intake), "grammars", endless)
    monkeypatch.setattr(intake, "COMPILE_POLL_SECONDS", 0.001)
    monkeypatch.setattr("nanovllm.requests.admission._check_params", lambda params, *_: params)
    llm.add_request(PROMPT, SamplingParams(structured_outputs={"regex": "a"}), timeout=3)
    assert llm.step() == [] and llm.intake.compiling
    clock.now += 3
    (result,) = llm.step()
    assert result.finish_reason == "timeout" and not llm.intake.compiling


@pytest.mark.parametrize(
    ("timeout", "error"), [(-1, ValueError), (float("nan"), ValueError), ("1", TypeError), (True, TypeError)]
)
def test_bad_deadlines(llm, timeout, error):
    with pytest.raises(error, match="timeout must be"):
        llm.generate([PROMPT], SHORT, use_tqdm=False, timeout=timeout)
    with pytest.raises(error, match="timeout must be"):
        llm.add_request(PROMPT, SHORT, timeout=timeout)
