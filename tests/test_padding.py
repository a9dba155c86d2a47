"""Steps padded to the shapes of CUDA graphs give the same tokens; launched without graphs, so that a CPU can tell."""

import pytest
from checkpoints import mixed_prompts
from engines import MAX_TOKENS, check_scenario, engine, generate, tokens

from nanovllm import SamplingParams
from nanovllm.engine import cuda_graphs
from nanovllm.engine.cuda_graphs import StepShape


class Recorded:
    """Stands in for a CUDA graph: runs the step it was captured for."""

    def __init__(self, shape, forward):
        self.replay = lambda: forward(shape)


@pytest.fixture
def shapes(monkeypatch):
    """Makes runners pad their steps as if they had graphs; gives the shapes that were captured."""
    seen = set()

    def list_graph_shapes(config):
        sizes = {min(size, config.max_num_seqs) for size in (1, 2, 4, 8, config.max_num_seqs)}
        decodes = [StepShape(size, 0, 0, False) for size in sorted(sizes)]
        return decodes + [StepShape(0, 1, n, False) for n in (8, 32, 64)]

    def capture(graphs, shape, forward):
        seen.add(shape)
        return Recorded(shape, forward)

    monkeypatch.setattr(cuda_graphs, "list_graph_shapes", list_graph_shapes)
    monkeypatch.setattr(cuda_graphs.CudaGraphs, "_capture", capture)
    return seen


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("scenario", ["chunked", "preempted", "few_seqs", "all_at_once"])
def test_greedy_tokens(checkpoint, shapes, scenario, async_scheduling):
    check_scenario(checkpoint("qwen3"), scenario, 16, async_scheduling=async_scheduling)
    assert any(shape.num_decodes for shape in shapes)


def test_short_prompts(checkpoint, shapes):
    """A prompt alone is padded, with what a cached prefix leaves of it; a longer one is not."""
    checkpoint, prompts = checkpoint("qwen3"), mixed_prompts()
    with engine(checkpoint.path) as llm:
        for prompt in prompts:
            assert tokens(generate(llm, [prompt])) == [checkpoint.greedy(prompt, MAX_TOKENS)]
    assert {shape.num_tokens for shape in shapes if shape.num_prompts} == {8, 32, 64}


def test_draws(checkpoint, shapes):
    """Padding changes neither the rows that are sampled nor their noise."""
    params = SamplingParams(temperature=0.9, top_k=30, seed=4, max_tokens=12, ignore_eos=True)
    with engine(checkpoint("qwen3").path) as llm:
        padded = tokens(generate(llm, mixed_prompts()[:5], params))
        assert {shape.num_decodes for shape in shapes} == {8}  # of five rows
        llm.ranks.runner.graphs.padded_shape = lambda shape: None
        llm.reset_prefix_cache()
        assert tokens(generate(llm, mixed_prompts()[:5], params)) == padded
    assert len(shapes) == 1
