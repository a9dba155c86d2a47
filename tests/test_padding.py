"""Steps padded to the shapes of CUDA graphs give the same tokens; launched without graphs, so that a CPU can tell."""

import pytest
from checkpoints import mixed_prompts
from engines import check_scenario, engine, generate, tokens

from nanovllm import SamplingParams
from nanovllm.engine import model_runner


@pytest.fixture
def shapes(monkeypatch):
    """Makes runners pad their steps as if they had graphs; collects the padded shapes."""
    seen = set()
    always = property(lambda runner: True, lambda runner, value: None)
    for name in ("has_graphs", "has_prompt_graphs"):
        monkeypatch.setattr(model_runner.ModelRunner, name, always, raising=False)
    monkeypatch.setattr(model_runner.ModelRunner, "_graph", lambda runner, shape: seen.add(shape))
    monkeypatch.setattr(model_runner, "GRAPH_TOKENS", (8, 32, 64))
    return seen


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("scenario", ["chunked", "preempted", "few_seqs", "all_at_once"])
def test_greedy_tokens(checkpoint, shapes, scenario, async_scheduling):
    check_scenario(checkpoint("qwen3"), scenario, 16, async_scheduling=async_scheduling)
    assert {shape.num_tokens for shape in shapes} <= {0, 8, 32, 64}
    assert any(shape.num_decodes and shape.num_prompts for shape in shapes)
    assert {shape.num_decodes for shape in shapes if not shape.num_prompts} <= {1, 2, 3, 4, 7, 8, 16}


def test_draws(checkpoint, shapes):
    """Padding changes neither the rows that are sampled nor their noise."""
    params = SamplingParams(temperature=0.9, top_k=30, seed=4, max_tokens=12, ignore_eos=True)
    with engine(checkpoint("qwen3").path) as llm:
        padded = tokens(generate(llm, mixed_prompts()[:5], params))
        assert {shape.num_decodes for shape in shapes} == {8}  # of five rows
        llm.ranks.runner._padded_shape = lambda shape: None
        llm.reset_prefix_cache()
        assert tokens(generate(llm, mixed_prompts()[:5], params)) == padded
    assert len(shapes) == 1
