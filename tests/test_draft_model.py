"""A model that drafts changes how fast tokens come, never which; and all that it has in the cache is right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from checkpoints import Checkpoint, mixed_prompts, random_prompt
from engines import SCENARIOS, check_scenario, engine, expected, generate, tokens

from nanovllm import SamplingParams
from nanovllm.memory import num_blocks
from nanovllm.speculative import policy

ASYNC = pytest.mark.parametrize(
    "async_scheduling", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["async", "sync"]
)
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


@pytest.fixture
def always(monkeypatch):
    """Checks drafts in every step that may, however few are accepted."""
    monkeypatch.setattr(policy, "pays", lambda records, num_drafts: True)


def drafts_of(checkpoint: Checkpoint, k: int = 4) -> dict:
    return {"model": checkpoint.path, "num_speculative_tokens": k}


def num_refused(results: list) -> int:
    """How many drafts were checked and not accepted, of some that were."""
    num_accepted = sum(result.num_accepted_tokens for result in results)
    assert num_accepted > 0
    return sum(result.num_draft_tokens for result in results) - num_accepted


@ASYNC
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_tokens_are_those_of_transformers(checkpoint, always, scenario, async_scheduling):
    config = drafts_of(checkpoint("llama"))
    check_scenario(checkpoint("qwen3"), scenario, 16, async_scheduling=async_scheduling, speculative_config=config)


@ASYNC
@pytest.mark.parametrize(
    ("k", "options"),
    [
        (4, {}),
        (1, {"num_kvcache_blocks": 19, "max_num_batched_tokens": 24}),
        (9, {"max_num_seqs": 2}),
        (4, {"max_num_batched_tokens": 10}),
    ],
    ids=str,
)
def test_a_models_own_drafts_are_all_accepted(checkpoint, k, options, async_scheduling):
    """So the draft model sees all that is before a token, whatever the scheduler does: greedy, or with one noise."""
    checkpoint, prompts = checkpoint("qwen3"), mixed_prompts()
    params = [LONG, SamplingParams(temperature=0.8, seed=1, max_tokens=60, ignore_eos=True)]
    params = [params[i % 2] for i in range(len(prompts))]
    with engine(checkpoint.path) as llm:
        want = generate(llm, prompts, params)
    with engine(
        checkpoint.path, speculative_config=drafts_of(checkpoint, k), async_scheduling=async_scheduling, **options
    ) as llm:
        for _ in range(2):  # the second time with prefixes from the cache
            results = generate(llm, prompts, params)
            assert tokens(results) == tokens(want)
            assert num_refused(results) == 0


@pytest.mark.parametrize(
    ("family", "drafter"), [("mixtral", "llama"), ("gemma3", "mistral_window"), ("llama", "qwen3_moe")]
)
def test_any_models(checkpoint, always, family, drafter):
    target, prompts = checkpoint(family), mixed_prompts()
    with engine(target.path, speculative_config=drafts_of(checkpoint(drafter))) as llm:
        results = generate(llm, prompts)
    assert tokens(results) == expected(target, prompts)
    assert sum(result.num_draft_tokens for result in results) > 0


@pytest.mark.parametrize("drafter", ["qwen3", "llama"])
def test_two_ranks(checkpoint, always, drafter):
    target, prompts = checkpoint("qwen3"), mixed_prompts()
    with engine(target.path, speculative_config=drafts_of(checkpoint(drafter)), tensor_parallel_size=2) as llm:
        results = generate(llm, prompts)
    assert tokens(results) == expected(target, prompts)
    if drafter == "qwen3":
        assert num_refused(results) == 0


def test_others_beside_it_may_ask_for_more(checkpoint, always):
    """Steps with what is drawn otherwise check no drafts; the draft model follows them all the same."""
    target, prompt = checkpoint("qwen3"), random_prompt(4, 20)
    params = [
        LONG,
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=2, prompt_logprobs=1),
        SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, repetition_penalty=1.3),
    ]
    with engine(target.path) as llm:
        want = generate(llm, [prompt] * 3, params)
    with engine(target.path, speculative_config=drafts_of(target)) as llm:
        results = generate(llm, [prompt] * 3, params)
    assert tokens(results) == tokens(want)
    assert num_refused(results) == 0 and results[0].num_draft_tokens > 20


def test_texts_up_to_the_last_position(checkpoint):
    target, prompt = checkpoint("qwen3"), random_prompt(5, 30)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    with engine(target.path, speculative_config=drafts_of(target, 7), max_model_len=64) as llm:
        (result,) = generate(llm, [prompt], params)
    assert result.token_ids == target.greedy(prompt, 34, True)[0]
    assert num_refused([result]) == 0


def test_the_cache_has_room_for_both(checkpoint, monkeypatch):
    """A block holds the keys and values of both models."""
    target = checkpoint("qwen3")
    monkeypatch.setattr(num_blocks, "CPU_KVCACHE_BYTES", 2**21)
    numbers = []
    for config in (None, drafts_of(target)):
        with engine(target.path, speculative_config=config, max_num_seqs=64) as llm:
            numbers.append(len(llm.scheduler.block_manager.blocks))
            runner = llm.ranks.runner
            models = [runner.model] if config is None else [runner.model, runner.draft_rows.draft_model.model]
            attention = [model.model.layers[0].self_attn.attn for model in models]
    assert numbers[1] == numbers[0] // 2
    # Where decode kernels count their parts there is room for all tokens that a step checks.
    assert {len(layer.semaphores) for layer in attention} == {64 * attention[0].k_cache.size(2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 100}, "must have the tokens of the engine's: its vocab_size is 100, not"),
        ({"hidden_size": 128}, "must be no wider than the engine's: its hidden_size is 128, beyond 64"),
        ({"max_position_embeddings": 200}, "has 200 positions, fewer than max_model_len=300"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "tensor_parallel_size=2 must divide num_attention"),
    ],
    ids=str,
)
def test_what_cannot_draft(checkpoint, tmp_path, changes, message):
    target = checkpoint("qwen3")
    facts = json.loads(Path(target.path, "config.json").read_text(encoding="utf-8")) | changes
    (tmp_path / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    config = {"model": str(tmp_path), "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match=re.escape(message)):
        engine(target.path, speculative_config=config, load_format="dummy", tensor_parallel_size=2)


def test_a_folder_that_is_not_there(checkpoint):
    with pytest.raises(ValueError, match="nowhere"):
        engine(checkpoint("qwen3").path, speculative_config={"model": "/nowhere", "num_speculative_tokens": 2})
