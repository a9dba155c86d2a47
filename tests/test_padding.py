"""Steps padded to the shapes of CUDA graphs give the same tokens; launched without graphs, so that a CPU can tell."""

from types import SimpleNamespace

import pytest
from checkpoints import mixed_prompts
from engines import MAX_TOKENS, check_scenario, engine, expected, generate, scenario_options, tokens

from nanovllm import SamplingParams
from nanovllm.engine.step_input import StepShape
from nanovllm.graphs import cuda_graphs


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


@pytest.mark.parametrize("scenario", ["plain", "chunked", "preempted", "few_seqs", "all_at_once"])
def test_steps_with_prompts(checkpoint, shapes, scenario):
    """Whatever decodes and prompts a step has, it is padded when its like comes for the second time."""
    checkpoint, prompts = checkpoint("qwen3"), mixed_prompts()
    with engine(checkpoint.path, **scenario_options(scenario, 16)) as llm:
        graphs, asked, num_replays = llm.ranks.runner.graphs, [], 0
        padded_shape, replay = graphs.padded_shape, graphs.replay

        def recorded_shape(shape):
            asked.append(shape)
            return padded_shape(shape)

        def counted_replay(padded, forward):
            nonlocal num_replays
            num_replays += padded.num_prompts > 0
            replay(padded, forward)

        graphs.padded_shape, graphs.replay = recorded_shape, counted_replay
        for _ in range(2):
            llm.reset_prefix_cache()
            assert tokens(generate(llm, prompts)) == expected(checkpoint, prompts)
    with_prompts = [shape for shape in asked if shape.num_prompts]
    captured = {shape for shape in shapes if shape.num_prompts}
    assert captured and num_replays >= len(with_prompts) / 2 - len(captured)
    assert all(shape.num_decodes in (0, 3, 7, 8, 16) for shape in captured)
    assert all(shape.num_prompts in (1, 3, 4, 7, 16) for shape in captured)
    if scenario in ("preempted", "few_seqs", "all_at_once"):
        assert any(shape.num_decodes and shape.num_prompts for shape in captured)
        assert not captured <= set(with_prompts), "none was padded"


def test_large_steps_are_launched_as_they_are(checkpoint, monkeypatch):
    """They keep a GPU busy for longer than their launch takes; what has a graph already is padded to it anyway."""
    with engine(checkpoint("qwen3").path, max_num_seqs=256, max_num_batched_tokens=3000) as llm:
        monkeypatch.setattr(cuda_graphs, "list_graph_shapes", lambda _: [StepShape(0, 1, 64, False)])
        graphs = cuda_graphs.CudaGraphs(llm.config, None)
        graphs.max_rows = cuda_graphs.MAX_WORK / (5 * 10**9)
        llm.config.attention_backend = "flash_attn"
        few_graphs = cuda_graphs.CudaGraphs(llm.config, None)
    assert graphs.token_sizes == [64, 768, 1024, 1536, 2048, 3000]
    graphs.captured[StepShape(0, 1, 1536, False)] = None
    for shape, padded in (
        (StepShape(0, 1, 5, False), StepShape(0, 1, 64, False)),
        (StepShape(0, 1, 1100, False), StepShape(0, 1, 1536, False)),  # more than 1,200 rows, but it is there
        (StepShape(0, 2, 1100, False), None),
        (StepShape(0, 2, 700, True), StepShape(0, 4, 768, True)),
        (StepShape(30, 17, 1000, False), StepShape(32, 64, 1024, False)),
        (StepShape(129, 17, 1000, False), None),
        (StepShape(129, 17, 700, False), StepShape(256, 64, 768, False)),
    ):
        assert graphs.padded_shape(shape) == (padded if padded in graphs.captured else None)
        assert graphs.padded_shape(shape) == padded
    assert few_graphs.with_known_rows(StepShape(3, 2, 5, False)) == StepShape(3, 2, 5, False)
    for shape in (StepShape(1, 1, 5, False), StepShape(0, 2, 5, False), StepShape(0, 1, 65, False)):
        assert [few_graphs.padded_shape(shape) for _ in range(2)] == [None, None]
    assert few_graphs.padded_shape(StepShape(0, 1, 5, False)) is None
    assert few_graphs.padded_shape(StepShape(0, 1, 6, False)) == StepShape(0, 1, 64, False)


def test_what_is_captured():
    """Sizes ascend to just the most that may run; the torch backend's prompts have no graph, and a CPU has none."""
    facts = {"device": "cuda", "enforce_eager": False, "attention_backend": "torch", "speculation": None}

    def captured(**changes):
        return cuda_graphs.list_graph_shapes(SimpleNamespace(**facts | {"max_num_seqs": 227} | changes))

    assert [shape.num_decodes for shape in captured()][-4:] == [192, 208, 216, 227]
    assert [shape.num_decodes for shape in captured(max_num_seqs=5)] == [1, 2, 4, 5]
    assert not any(shape.num_prompts for shape in captured())
    prompts = [shape for shape in captured(attention_backend="triton") if shape.num_prompts]
    assert prompts == [StepShape(0, 1, num_tokens, False) for num_tokens in cuda_graphs.GRAPH_TOKENS]
    assert captured(device="cpu") == captured(enforce_eager=True) == []


def test_short_prompts(checkpoint, shapes):
    """A prompt alone is padded, with what a cached prefix leaves of it."""
    checkpoint, prompts = checkpoint("qwen3"), mixed_prompts()
    with engine(checkpoint.path, max_num_batched_tokens=300) as llm:
        for prompt in prompts:
            assert tokens(generate(llm, [prompt])) == [checkpoint.greedy(prompt, MAX_TOKENS)]
    assert {shape.num_tokens for shape in shapes if shape.num_prompts} == {8, 32, 64, 300}


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


def test_rows_that_are_sampled_from_in_large_steps(checkpoint, shapes, monkeypatch):
    """They are as many as in a captured step of decodes: libraries have loaded the kernels for these."""
    checkpoint, prompts, sampled = checkpoint("qwen3"), mixed_prompts(), []
    with engine(checkpoint.path, max_num_seqs=16) as llm:
        runner = llm.ranks.runner
        runner.graphs.max_rows = 0  # no step with prompts is worth a graph
        sample = runner.sample

        def recorded_sample(logits, step, shape):
            sampled.append((shape, len(logits)))
            sample(logits, step, shape)

        monkeypatch.setattr(runner, "sample", recorded_sample)
        asks = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, prompt_logprobs=0)
        assert tokens(generate(llm, prompts)) == expected(checkpoint, prompts)
        assert tokens(generate(llm, prompts, asks)) == expected(checkpoint, prompts)
        known = runner.graphs.known_rows
    assert known == [1, 2, 4, 8, 16]
    with_prompts = [num_rows for shape, num_rows in sampled if shape.num_prompts]
    assert with_prompts == [16, 16], "all prompts at once, of either call"
