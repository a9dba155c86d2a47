"""Prompts from any iterator: the results of `generate`, as they finish, with nothing kept but what is ahead."""

from __future__ import annotations

import gc
import itertools
import signal
import threading
import tracemalloc

import numpy as np
import pytest
from checkpoints import mixed_prompts, random_prompt
from engines import GREEDY, Trace, check_idle, engine, expected, generate, tokens

from nanovllm import SamplingParams
from nanovllm.batch.iterate import LOOK_AHEAD
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestOutput
from nanovllm.requests.request import Request

SHORT = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture
def llm(checkpoint):
    with engine(checkpoint("qwen3").path, max_num_seqs=4) as llm:
        yield llm
        if llm.failure is None:
            check_idle(llm)
            assert not llm.turns.asked


def ordered(pairs) -> list[dict]:
    """The results in the order of their prompts, each of which must have one."""
    results = {}
    for index, result in pairs:
        assert index not in results
        results[index] = result
    assert list(sorted(results)) == list(range(len(results)))
    return [results[index] for index in range(len(results))]


class Counted:
    """An iterator of prompts that counts how many were drawn."""

    def __init__(self, prompts) -> None:
        self.prompts = iter(prompts)
        self.num_drawn = 0

    def __iter__(self):
        return self

    def __next__(self):
        prompt = next(self.prompts)
        self.num_drawn += 1
        return prompt


# ---- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"async_scheduling": False}, {"num_kvcache_blocks": 19}], ids=str)
def test_greedy_tokens(checkpoint, options):
    checkpoint, prompts = checkpoint("qwen3"), mixed_prompts()
    with engine(checkpoint.path, max_num_seqs=5, **options) as llm:
        trace = Trace(llm)
        results = ordered(llm.generate_iter((list(prompt) for prompt in prompts), GREEDY))
        check_idle(llm)
        assert tokens(results) == expected(checkpoint, prompts)
        assert trace.most_seqs > 2 and ("num_kvcache_blocks" in options) == (trace.num_preemptions > 0)


def test_parameters_of_each_prompt(llm):
    """Draws too are those of `generate`."""
    prompts = [random_prompt(seed, 9) for seed in range(20)]
    params = [SamplingParams(seed=seed, max_tokens=1 + seed % 7, n=1 + seed % 2) for seed in range(20)]
    want = [[sample.token_ids for sample in result.outputs] for result in generate(llm, prompts, params)]
    results = ordered(llm.generate_iter(iter(prompts), iter(params)))
    assert [[sample.token_ids for sample in result.outputs] for result in results] == want


def test_prompts_of_every_form(llm):
    forms = [[5, 6], (5, 6), np.array([5, 6]), {"prompt_token_ids": [5, 6], "prompt": "kept"}]
    results = ordered(llm.generate_iter(forms, [GREEDY] * 4))
    assert len({tuple(result.token_ids) for result in results}) == 1 and results[3].prompt == "kept"
    assert ordered(llm.generate_iter([])) == []
    assert len(ordered(llm.generate_iter([[5, 6]]))) == 1, "the model's defaults"


def test_results_come_as_they_finish(llm):
    params = [ENDLESS, SHORT, SHORT, SHORT, SHORT]
    order = [index for index, _ in llm.generate_iter([[seed] for seed in range(2, 7)], params)]
    assert order[-1] == 0 and sorted(order) == list(range(5))


# ---- memory --------------------------------------------------------------------------------------------------------


def test_prompts_are_drawn_as_they_are_needed(llm):
    most = LOOK_AHEAD * llm.config.max_num_seqs
    prompts = Counted([2 + number % 90] for number in itertools.count())
    results = llm.generate_iter(prompts, SHORT)
    assert prompts.num_drawn == 0
    num_ahead = []
    for num_results, _ in enumerate(itertools.islice(results, 200), start=1):
        num_ahead.append(prompts.num_drawn - num_results)
        assert len(llm.requests) <= most
    assert max(num_ahead) == most - 1 and num_ahead.count(most - 1) > 20
    results.close()


def test_nothing_is_kept_of_what_was_yielded(llm):
    """What there is after 300 prompts is all that there is after 900."""

    def count_objects() -> int:
        gc.collect()
        return sum(type(thing) in (Request, Sequence, RequestOutput) for thing in gc.get_objects())

    results = llm.generate_iter(([2 + number % 90] * 100 for number in itertools.count()), SHORT)
    counts, sizes = [], []
    tracemalloc.start()
    try:
        for number, _ in enumerate(itertools.islice(results, 900), start=1):
            if number % 300 == 0:
                counts.append(count_objects())
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    results.close()
    assert max(counts) <= 3 * LOOK_AHEAD * llm.config.max_num_seqs
    assert sizes[-1] - sizes[0] < 100_000, sizes  # a prompt's ids alone take 800 bytes


# ---- ends ----------------------------------------------------------------------------------------------------------


def test_closing_aborts_what_runs(llm):
    prompts = Counted([seed] for seed in range(2, 90))
    results = llm.generate_iter(prompts, ENDLESS)
    next(results)
    assert llm.requests
    results.close()
    check_idle(llm)
    assert prompts.num_drawn < 20
    for _ in llm.generate_iter(([seed] for seed in range(2, 90)), ENDLESS):
        break  # the generator is collected at once
    check_idle(llm)
    assert tokens(generate(llm, [(5, 6)], SHORT)) == tokens(ordered(llm.generate_iter([[5, 6]], SHORT)))


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ([10**6], ValueError, "prompt 23: a prompt's token ids must be between"),
        (None, TypeError, "prompt 23: a prompt must be a string or a list"),
        ([], ValueError, "prompt 23: a prompt must have tokens"),
        ([5] * 300, ValueError, "prompt 23: a prompt must have fewer tokens than max_model_len=300"),
        (5, TypeError, "prompt 23: a prompt must be"),
    ],
    ids=str,
)
def test_a_bad_prompt_is_named_behind_the_results_before_it(llm, bad, error, match):
    prompts = Counted([*([2 + seed] for seed in range(23)), bad, [7]])
    indices = []
    with pytest.raises(error, match=match):
        for index, _ in llm.generate_iter(prompts, SHORT):
            indices.append(index)
    assert sorted(indices) == list(range(23)) and prompts.num_drawn == 24


def test_bad_parameters_of_one_prompt(llm):
    params = [SHORT, SHORT, SamplingParams(logprobs=20), "greedy"]
    results = llm.generate_iter([[5]] * 4, params)
    assert len([next(results) for _ in range(3)]) == 3
    with pytest.raises(TypeError, match="prompt 3: sampling_params must be SamplingParams, got 'greedy'"):
        next(results)


def test_an_iterator_that_fails(llm):
    def prompts():
        yield [5]
        yield [6]
        raise LookupError("the database is gone")

    indices = []
    with pytest.raises(LookupError, match="the database is gone"):
        for index, _ in llm.generate_iter(prompts(), SHORT):
            indices.append(index)
    assert sorted(indices) == [0, 1]


@pytest.mark.parametrize(
    ("num_prompts", "num_params", "match"), [(3, 2, "sampling_params has only 2"), (2, 3, "prompts has only 2")]
)
def test_as_many_parameters_as_prompts(llm, num_prompts, num_params, match):
    indices = []
    with pytest.raises(ValueError, match=match):
        for index, _ in llm.generate_iter(iter([[5]] * num_prompts), iter([SHORT] * num_params)):
            indices.append(index)
    assert sorted(indices) == [0, 1]


@pytest.mark.parametrize("prompts", ["text", {"prompt": "text"}, 5, None], ids=str)
def test_what_is_no_iterable_of_prompts(llm, prompts):
    with pytest.raises(TypeError, match="prompts must be an iterable of prompts"):
        llm.generate_iter(prompts)


def test_bad_parameters_are_refused_at_once(llm):
    with pytest.raises(TypeError, match="sampling_params must be SamplingParams or an iterable"):
        llm.generate_iter([[5]], 5)
    bad = SamplingParams()
    bad.top_p = 2.0
    with pytest.raises(ValueError, match="top_p"):
        llm.generate_iter([[5]], bad)


def test_a_closed_engine(llm):
    results = llm.generate_iter(([seed] for seed in range(2, 90)), ENDLESS)
    next(results)
    llm.close()
    with pytest.raises(RuntimeError, match="it was closed"):
        list(results)
    with pytest.raises(RuntimeError, match="it was closed"):
        llm.generate_iter([[5]])


def test_a_request_that_is_aborted_by_another_thread(llm):
    results = llm.generate_iter([[5], [6]], [SHORT, ENDLESS])
    assert next(results)[0] == 0
    thread = threading.Thread(target=llm.abort_request, args=(next(iter(llm.requests)),))
    thread.start()
    index, result = next(results)
    thread.join()
    assert index == 1 and result.finish_reason == "abort"
    assert next(results, None) is None


def test_ctrl_c(llm):
    """It ends the iteration, and leaves nothing."""

    def prompts():
        yield from ([seed] for seed in range(2, 12))
        signal.raise_signal(signal.SIGINT)
        yield [5]

    results = llm.generate_iter(prompts(), SHORT)
    with pytest.raises(KeyboardInterrupt):
        list(results)
    check_idle(llm)
