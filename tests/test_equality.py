"""The oracle: greedy tokens are those of transformers, whatever the engine does to compute them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from checkpoints import EOS_TOKEN_IDS, FAMILIES, FIRST_FAMILIES, MAX_POSITIONS, mixed_prompts, random_prompt
from engines import (
    GREEDY,
    MAX_TOKENS,
    SCENARIOS,
    Trace,
    check_idle,
    check_scenario,
    engine,
    expected,
    generate,
    tokens,
)
from integrity import check_integrity

from nanovllm import LLM, SamplingParams
from nanovllm.sampling_params import RequestOutputKind


def matrix() -> list:
    """Every family, block size and way to schedule; slow where others are likely to fail with it."""
    cases = list(product(FAMILIES, [16, 64, 256], [True, False]))
    return [
        pytest.param(
            *(family, block_size, is_async),
            id=f"{family}-{block_size}-{'async' if is_async else 'sync'}",
            marks=() if is_quick(family, block_size, is_async) else pytest.mark.slow,
        )
        for family, block_size, is_async in cases
    ]


def is_quick(family: str, block_size: int, is_async: bool) -> bool:
    return block_size != 64 if family in FIRST_FAMILIES else (block_size, is_async) == (16, True)


@pytest.mark.parametrize(("family", "block_size", "async_scheduling"), matrix())
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_greedy_tokens(checkpoint, family, scenario, block_size, async_scheduling):
    check_scenario(checkpoint(family), scenario, block_size, async_scheduling=async_scheduling)


def test_long_prompts_in_short_steps(checkpoint):
    checkpoint, prompts = checkpoint("qwen3"), mixed_prompts()
    with engine(checkpoint.path, long_prefill_token_threshold=20, num_kvcache_blocks=30) as llm:
        trace = Trace(llm)
        assert tokens(generate(llm, prompts)) == expected(checkpoint, prompts)
    assert trace.num_chunks > 20
    assert max(max(batch.num_tokens) for batch in trace.batches) == 20


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("block_size", [16, 64])
def test_prefixes_of_earlier_calls(checkpoint, block_size, async_scheduling):
    checkpoint, prompts = checkpoint("qwen3"), mixed_prompts()
    with engine(checkpoint.path, kvcache_block_size=block_size, async_scheduling=async_scheduling) as llm:
        generate(llm, prompts)
        results = generate(llm, prompts)
        assert tokens(results) == expected(checkpoint, prompts)
        for prompt, result in zip(prompts, results, strict=True):
            # At least one token is computed, even of a prompt that is cached as a whole.
            assert result["num_cached_tokens"] == (len(prompt) - 1) // block_size * block_size
        llm.reset_prefix_cache()
        results = generate(llm, prompts[:8])
        assert tokens(results) == expected(checkpoint, prompts)[:8]
        assert [result["num_cached_tokens"] for result in results] == [0] * 8


def test_second_turn_hits_the_generated_tokens(checkpoint):
    checkpoint, first = checkpoint("llama"), random_prompt(5, 30)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with engine(checkpoint.path) as llm:
        answer = generate(llm, [first], params)[0]["token_ids"]
        second = (*first, *answer, 9, 10, 11)
        result = generate(llm, [second], params)[0]
    # 30 + 40 tokens, of which the last was never computed.
    assert result["num_cached_tokens"] == 64
    assert result["token_ids"] == checkpoint.greedy(second, 40, True)[0]


def test_without_prefix_caching(checkpoint):
    checkpoint, prompts = checkpoint("qwen2"), mixed_prompts()
    with engine(checkpoint.path, enable_prefix_caching=False, num_kvcache_blocks=19) as llm:
        trace = Trace(llm)
        for _ in range(2):
            results = generate(llm, prompts)
            assert tokens(results) == expected(checkpoint, prompts)
            assert all(result["num_cached_tokens"] == 0 for result in results)
        assert trace.num_preemptions > 0


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
def test_surplus_token_behind_eos_is_dropped(checkpoint, async_scheduling):
    checkpoint, prompts = checkpoint("qwen3"), mixed_prompts()
    stopped = [prompt for prompt in prompts if checkpoint.greedy(prompt, MAX_TOKENS)[1] == "stop"]
    with engine(checkpoint.path, async_scheduling=async_scheduling) as llm:
        trace = Trace(llm)
        results = generate(llm, stopped)
        num_samples = sum(batch.num_samples for batch in trace.batches)
        assert tokens(results) == [checkpoint.greedy(prompt, MAX_TOKENS) for prompt in stopped]
        assert all(result["token_ids"][-1] in EOS_TOKEN_IDS for result in results)
        # The proof that there was something to drop: every request but the last to end sampled one token too many.
        surplus = num_samples - sum(len(result["token_ids"]) for result in results)
        assert surplus >= len(stopped) - 1 if async_scheduling else surplus == 0


def test_ignore_eos_and_stop_token_ids(checkpoint):
    checkpoint, prompts = checkpoint("mistral"), mixed_prompts()
    full = [checkpoint.greedy(prompt, MAX_TOKENS, True)[0] for prompt in prompts]
    with engine(checkpoint.path) as llm:
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
        assert tokens(generate(llm, prompts, params)) == [(ids, "length") for ids in full]
        stops = [ids[9] for ids in full]
        results = generate(
            llm,
            prompts,
            [
                SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, stop_token_ids=[stop])
                for stop in stops
            ],
        )
        for result, ids, stop in zip(results, full, stops, strict=True):
            assert result["token_ids"] == ids[: ids.index(stop) + 1] and result["finish_reason"] == "stop"


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
def test_max_model_len_ends_a_request(checkpoint, async_scheduling):
    checkpoint = checkpoint("llama_bias")
    prompts = [random_prompt(6, 35), random_prompt(7, 63), random_prompt(8, 2)]
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    with engine(checkpoint.path, max_model_len=64, num_kvcache_blocks=9, async_scheduling=async_scheduling) as llm:
        results = generate(llm, prompts, params)
    for prompt, result in zip(prompts, results, strict=True):
        assert result["token_ids"] == checkpoint.greedy(prompt, 64 - len(prompt), True)[0]
        assert result["finish_reason"] == "length"


def test_max_model_len_is_capped_by_the_model(checkpoint):
    with engine(checkpoint("qwen3").path, max_model_len=10**6) as llm:
        assert llm.config.max_model_len == MAX_POSITIONS
        params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
        result = generate(llm, [random_prompt(9, MAX_POSITIONS - 3)], params)[0]
    assert len(result["token_ids"]) == 3 and result["finish_reason"] == "length"


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
def test_abort_in_the_middle(checkpoint, async_scheduling):
    """Aborts a waiting, a partly computed, a decoding and a preempted request; the others do not notice."""
    checkpoint, prompts = checkpoint("qwen3"), mixed_prompts()
    options = {"num_kvcache_blocks": 19, "max_num_batched_tokens": 24, "async_scheduling": async_scheduling}
    params = SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )
    with engine(checkpoint.path, **options) as llm:
        trace = Trace(llm)
        ids = [llm.add_request(list(prompt), params) for prompt in prompts]
        seqs = {request_id: request.seqs[0] for request_id, request in llm.requests.items()}
        results, aborted = {}, {}
        while not llm.is_finished():
            results.update({int(result["request_id"]): result for result in llm.step()})
            for request_id, seq in [(request_id, request.seqs[0]) for request_id, request in llm.requests.items()]:
                kind = (
                    "preempted" if seq.status.name == "WAITING" and seq.num_cached_tokens >= 0
                    else "waiting" if seq.status.name == "WAITING"
                    else "partial" if seq.num_computed_tokens < seq.num_prompt_tokens
                    else "decoding"
                )  # fmt: skip
                if kind not in aborted:
                    aborted[kind] = request_id
                    llm.abort_request(request_id)
                    check_integrity(llm.scheduler)
        assert set(aborted) == {"waiting", "partial", "decoding", "preempted"} and trace.num_preemptions
        assert set(results) == set(ids) - set(aborted.values())
        for request_id, result in results.items():
            assert tokens([result]) == [checkpoint.greedy(prompts[ids.index(request_id)], MAX_TOKENS, True)]
        assert all(seqs[request_id].is_finished for request_id in ids)
        llm.abort_request(ids[0])  # one that has ended, and one that never was: nothing happens
        llm.abort_request(10**6)
        check_idle(llm)
        want = expected(checkpoint, prompts)
        assert tokens(generate(llm, prompts)) == want


SAMPLED = [
    SamplingParams(temperature=0.8, seed=1, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=1.5, top_k=20, top_p=0.9, seed=2, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=1.0, min_p=0.05, seed=2**63, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=2.0, seed=-5, max_tokens=20, ignore_eos=True),
] * 3


def sampled_alone(llm: LLM) -> list[list[int]]:
    """Tokens of the prompts with SAMPLED, one request after the other."""
    return [
        generate(llm, [prompt], params)[0]["token_ids"]
        for prompt, params in zip(mixed_prompts(), SAMPLED, strict=True)
    ]


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
def test_seeded_draws_do_not_depend_on_the_batch(checkpoint, async_scheduling):
    path, prompts = checkpoint("qwen3").path, mixed_prompts()
    with engine(path) as llm:
        alone = sampled_alone(llm)
        assert [result["token_ids"] for result in generate(llm, prompts, SAMPLED)] == alone
        same_prompt = generate(llm, [prompts[0]] * 2, [SAMPLED[0], replace(SAMPLED[0], seed=7)])
        assert same_prompt[0]["token_ids"] == alone[0] != same_prompt[1]["token_ids"]
    with engine(path, num_kvcache_blocks=19, max_num_batched_tokens=40, async_scheduling=async_scheduling) as llm:
        trace = Trace(llm)
        results = generate(llm, prompts[::-1], SAMPLED[::-1])
        assert trace.num_preemptions > 0
        assert [result["token_ids"] for result in results[::-1]] == alone


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "top_k": 20}])
def test_the_coldest_temperature_is_greedy(checkpoint, options):
    """However small, it must not overflow into another token."""
    prompts = mixed_prompts()[:3]
    with engine(checkpoint("qwen3").path) as llm:
        greedy = tokens(generate(llm, prompts, SamplingParams(temperature=0, max_tokens=8)))
        for temperature in (1e-6, 1e-45):
            params = SamplingParams(temperature=temperature, max_tokens=8, **options)
            assert tokens(generate(llm, prompts, params)) == greedy


def test_draws_without_a_seed_follow_the_engine_seed(checkpoint):
    """Two engines of one seed agree, one of another seed does not, and the requests of a list differ."""
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    drawn = []
    for seed in (3, 3, 4):
        with engine(checkpoint("qwen3").path, seed=seed) as llm:
            drawn.append([result["token_ids"] for result in generate(llm, [random_prompt(1, 9)] * 3, params)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({tuple(ids) for ids in drawn[0]}) == 3


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {"num_kvcache_blocks": 19, "max_num_batched_tokens": 40}),
        ("llama_bias", {"num_kvcache_blocks": 6, "kvcache_block_size": 64, "async_scheduling": False}),
        pytest.param("llama", {"num_kvcache_blocks": 3, "kvcache_block_size": 256}, marks=pytest.mark.slow),
        pytest.param("qwen2", {"max_num_batched_tokens": 24, "async_scheduling": False}, marks=pytest.mark.slow),
        pytest.param("mistral", {"max_num_seqs": 3}, marks=pytest.mark.slow),
        # By default tests/test_shared_ranks.py has Gemma 2 on two ranks.
        pytest.param("gemma2", {"max_num_batched_tokens": 24, "async_scheduling": False}, marks=pytest.mark.slow),
        pytest.param("gemma3", {"num_kvcache_blocks": 19, "max_num_batched_tokens": 40}, marks=pytest.mark.slow),
        pytest.param("phi3", {"max_num_batched_tokens": 24}, marks=pytest.mark.slow),
        pytest.param("granite", {"num_kvcache_blocks": 19, "max_num_batched_tokens": 40}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks(checkpoint, family, options):
    checkpoint, prompts = checkpoint(family), mixed_prompts()
    with engine(checkpoint.path) as llm:
        alone = sampled_alone(llm)
    with engine(checkpoint.path, tensor_parallel_size=2, **options) as llm:
        trace = Trace(llm)
        for call in range(2):
            results = generate(llm, prompts)
            assert tokens(results) == expected(checkpoint, prompts)
            assert call == 0 or sum(result["num_cached_tokens"] for result in results) > 0
        assert ("num_kvcache_blocks" in options) == (trace.num_preemptions > 0)
        assert ("max_num_batched_tokens" in options) == (trace.num_chunks > 0)
        assert [result["token_ids"] for result in generate(llm, prompts, SAMPLED)] == alone
        llm.reset_prefix_cache()
        params = replace(GREEDY, output_kind=RequestOutputKind.FINAL_ONLY)
        ids = [llm.add_request(list(prompt), params) for prompt in prompts]
        for _ in range(3):
            llm.step()
        llm.abort_request(ids[0])
        results = {}
        while not llm.is_finished():
            results.update({int(result["request_id"]): result for result in llm.step()})
        check_idle(llm)
        assert tokens(results[request_id] for request_id in ids[1:]) == expected(checkpoint, prompts)[1:]
