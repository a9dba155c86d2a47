"""Stages that share out the layers: tokens are those of transformers, and of one rank, whatever the engine does."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, SHAPE, Checkpoint, mixed_prompts, random_prompt
from engines import (
    GREEDY,
    SCENARIOS,
    Trace,
    check_idle,
    check_scenario,
    engine,
    expected,
    generate,
    scenario_options,
    tokens,
)
from safetensors.torch import load_file, save_file
from sampling_oracle import check_prompt, check_sample
from transformers import LlamaConfig

import nanovllm
from nanovllm import LLM, SamplingParams
from nanovllm.trace import Recorder

DEMO = str(Path(nanovllm.__file__).parent / "demo")
ON_GPUS = {"device": "cuda", "dtype": "float32", "num_kvcache_blocks": 300}
PROMPTS = [random_prompt(length, length) for length in (30, 5, 61)]
REQUESTS = {
    "plain": {"temperature": 1.0},
    "filtered": {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"temperature": 0, "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "allowed": {"temperature": 1.0, "allowed_token_ids": [3, 160, 161], "top_p": 0.9},
    "logprobs": {"temperature": 0.7, "logprobs": 5, "prompt_logprobs": 5},
    "samples": {"temperature": 0.9, "n": 3},
}


def stages(size: int, **options) -> dict:
    return {"pipeline_parallel_size": size} | options


@pytest.mark.parametrize(
    ("scenario", "async_scheduling"),
    [
        pytest.param(scenario, is_async, marks=() if scenario == "all_at_once" else pytest.mark.slow)
        for scenario in SCENARIOS
        for is_async in (True, False)
    ],
)
def test_greedy_tokens(checkpoint, scenario, async_scheduling):
    check_scenario(checkpoint("qwen3"), scenario, 16, **stages(2, async_scheduling=async_scheduling))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_every_family(checkpoint, family, num_ranks):
    check_scenario(checkpoint(family), "all_at_once", 16, **stages(2, tensor_parallel_size=num_ranks))


def test_greedy_tokens_of_stages_of_ranks(checkpoint):
    check_scenario(checkpoint("llama_bias"), "all_at_once", 16, **stages(2, tensor_parallel_size=2))


@pytest.mark.parametrize("num_stages", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_layers_that_do_not_divide(checkpoint, num_stages):
    """Four layers with windows of their own; stages without either end, and as many steps in flight as there are."""
    checkpoint, prompts = checkpoint("gemma3"), mixed_prompts()
    with engine(checkpoint.path, **stages(num_stages), **scenario_options("all_at_once", 16)) as llm:
        assert list(llm.ranks.tp.stage.layers) == [3]
        trace, recorder = Trace(llm), Recorder(llm)
        most_in_flight, launch = 0, llm._launch

        def counted_launch():
            nonlocal most_in_flight
            launched = launch()
            most_in_flight = max(most_in_flight, len(llm.in_flight) + (launched is not None))
            return launched

        llm._launch = counted_launch
        results = generate(llm, prompts)
        assert tokens(results) == expected(checkpoint, prompts)
    assert trace.num_preemptions > 0
    recorded = [len(new) for step in recorder.steps for _, new in step.get("tokens", [])]
    assert sum(recorded) == sum(len(result.token_ids) for result in results)
    assert most_in_flight == num_stages


def test_stages_share_out_the_sequences(checkpoint):
    """A sequence is in one of the steps in flight only, and each has its share of them, once all are admitted."""
    checkpoint = checkpoint("qwen3")
    prompts = [random_prompt(seed, 5) for seed in range(9)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with engine(checkpoint.path, **stages(2)) as llm:
        trace = Trace(llm)
        results = generate(llm, prompts, params)
    assert [result["token_ids"] for result in results] == [checkpoint.greedy(p, 12, True)[0] for p in prompts]
    for earlier, later in zip(trace.batches[1:], trace.batches[2:], strict=False):
        assert not {seq.seq_id for seq in earlier.seqs} & {seq.seq_id for seq in later.seqs}
    assert {len(batch.seqs) for batch in trace.batches[1:10]} == {4, 5}


@pytest.mark.parametrize("family", ["qwen3", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_what_requests_may_ask_for(checkpoint, family):
    checkpoint = checkpoint(family)
    cases = [
        (prompt, SamplingParams(seed=index, max_tokens=6, ignore_eos=True, **request))
        for index, request in enumerate(REQUESTS.values())
        for prompt in PROMPTS
    ]
    prompts, params = zip(*cases, strict=True)
    with engine(checkpoint.path, **stages(2), max_num_batched_tokens=50) as llm:
        results = generate(llm, prompts, list(params))
    for result, prompt, param in zip(results, prompts, params, strict=True):
        if param.n == 1:
            check_sample(result.outputs[0], checkpoint, prompt, param)
            check_prompt(result, checkpoint, prompt, param)
    with engine(checkpoint.path, max_num_batched_tokens=50) as llm:
        alone = generate(llm, prompts, list(params))
    assert [[o.token_ids for o in r.outputs] for r in results] == [[o.token_ids for o in r.outputs] for r in alone]


def structured_texts(**options) -> list[str]:
    """What the demo says where structures bind it, and beside these where nothing does."""
    params = [
        SamplingParams(temperature=0, max_tokens=20, structured_outputs={"regex": "[a-c]{4}x"}),
        SamplingParams(temperature=0, max_tokens=8),
        SamplingParams(temperature=0, max_tokens=20, structured_outputs={"choice": ["yes", "never"]}),
    ]
    with engine(DEMO, dtype="float32", **options) as llm:
        results = llm.generate(["What is a block?"] * 3, params, use_tqdm=False)
        check_idle(llm)
    texts = [result["text"] for result in results]
    assert set(texts[0][:4]) <= set("abc") and texts[2] in ("yes", "never")
    return texts


@pytest.mark.slow
def test_structures():
    assert structured_texts() == structured_texts(**stages(2))


@pytest.mark.slow
def test_prefixes_of_earlier_calls(checkpoint):
    checkpoint, prompts = checkpoint("llama"), mixed_prompts()
    with engine(checkpoint.path, **stages(2)) as llm:
        generate(llm, prompts)
        results = generate(llm, prompts)
        assert tokens(results) == expected(checkpoint, prompts)
        assert [result["num_cached_tokens"] for result in results] == [(len(p) - 1) // 16 * 16 for p in prompts]


def test_a_prompt_whose_last_token_comes_alone(checkpoint):
    """It is computed as a decode's, of a token that no stage has drawn."""
    checkpoint, prompts = checkpoint("qwen3"), [random_prompt(length, length) for length in (9, 17, 33)]
    with engine(checkpoint.path, **stages(2), max_num_batched_tokens=8) as llm:
        trace = Trace(llm)
        assert tokens(generate(llm, prompts)) == [checkpoint.greedy(prompt, GREEDY.max_tokens) for prompt in prompts]
    assert any(batch.is_decode(i) and batch.starts[i] == 8 for batch in trace.batches for i in range(len(batch.seqs)))


@pytest.mark.slow
def test_an_aborted_request_leaves_the_others(checkpoint):
    checkpoint, prompts = checkpoint("qwen3"), mixed_prompts()[:6]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with engine(checkpoint.path, **stages(2)) as llm:
        numbers = [llm.add_request(list(prompt), params) for prompt in prompts]
        results = {}
        for index in range(200):
            results |= {result.request_id: result for result in llm.step()}
            if index == 4:
                llm.abort_request(numbers[::2])
            if llm.is_finished():
                break
        check_idle(llm)
    left = [results[str(number)] for number in numbers[1::2]]
    assert [r.outputs[0].token_ids for r in left] == [checkpoint.greedy(p, 20, True)[0] for p in prompts[1::2]]


def test_each_stage_reads_its_own_tensors(checkpoint, tmp_path):
    """And says so if one of them is not the model's; scales of a cache that has none are passed over."""
    checkpoint = checkpoint("qwen2")
    tensors = load_file(f"{checkpoint.path}/model.safetensors")
    for file in ("config.json", "generation_config.json"):
        shutil.copy(f"{checkpoint.path}/{file}", tmp_path)
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with engine(str(tmp_path), **stages(2)) as llm:
        assert tokens(generate(llm, mixed_prompts())) == expected(checkpoint, mixed_prompts())
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected tensor 'model\.layers\.0\.mlp\.extra\.weight'"):
        engine(str(tmp_path), **stages(2))


def check_kill(path: str, **options) -> None:
    """An engine whose other stage is killed says so, soon."""
    with engine(path, **options, **stages(2)) as llm:
        generate(llm, mixed_prompts())
        llm.ranks.processes[0].kill()
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="rank 1 ended with exit code -9"):
            generate(llm, mixed_prompts())
        assert time.monotonic() - start < 10


def test_a_killed_stage_ends_the_engine(checkpoint):
    check_kill(checkpoint("qwen3").path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pipeline_parallel_size": 0}, ValueError, "pipeline_parallel_size must be at least 1, got 0"),
        ({"pipeline_parallel_size": "2"}, TypeError, "pipeline_parallel_size must be of type int.*'2'"),
        ({"pipeline_parallel_size": True}, TypeError, "pipeline_parallel_size must be of type int.*True"),
        (
            {"pipeline_parallel_size": 3},
            ValueError,
            "pipeline_parallel_size must be at most num_hidden_layers=2, got 3",
        ),
        (
            {
                "pipeline_parallel_size": 2,
                "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2},
            },
            ValueError,
            "speculative_config is not supported with pipeline_parallel_size=2",
        ),
    ],
)
def test_refusals(checkpoint, options, error, message):
    with pytest.raises(error, match=message):
        engine(checkpoint("qwen3").path, **options)


@pytest.mark.skipif(torch.cuda.device_count() not in (0, 1), reason="there are as many GPUs")
def test_more_stages_than_gpus(checkpoint):
    with pytest.raises(ValueError, match="tensor_parallel_size=1 times pipeline_parallel_size=2 needs as many CUDA"):
        LLM(checkpoint("qwen3").path, device="cuda", pipeline_parallel_size=2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("scenario", ["plain", "all_at_once"])
def test_greedy_tokens_on_two_gpus(checkpoint, scenario, enforce_eager):
    """Three times, as steps with prompts are captured when their like comes for the second time."""
    checkpoint, prompts = checkpoint("qwen3"), mixed_prompts()
    options = ON_GPUS | stages(2, enforce_eager=enforce_eager) | scenario_options(scenario, 16)
    with engine(checkpoint.path, **options) as llm:
        for _ in range(3):
            llm.reset_prefix_cache()
            assert tokens(generate(llm, prompts)) == expected(checkpoint, prompts)
        assert enforce_eager or any(shape.num_prompts for shape in llm.ranks.runner.graphs.captured)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_what_requests_may_ask_for_on_two_gpus(checkpoint):
    checkpoint = checkpoint("gemma3")
    params = [
        SamplingParams(seed=index, max_tokens=12, ignore_eos=True, **request)
        for index, request in enumerate(REQUESTS.values())
    ]
    prompts = [random_prompt(index, 30 + index) for index in range(len(params))]
    outputs = []
    for size in (1, 2):
        with engine(checkpoint.path, **ON_GPUS, **stages(size)) as llm:
            outputs.append([[o.token_ids for o in r.outputs] for r in generate(llm, prompts, params)])
    assert outputs[0] == outputs[1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_killed_stage_ends_the_engine_on_two_gpus(checkpoint):
    """A GPU that waits for states of the dead one's is freed too."""
    check_kill(checkpoint("qwen3").path, **ON_GPUS)
    with engine(checkpoint("qwen3").path, **ON_GPUS) as llm:
        assert tokens(generate(llm, mixed_prompts())) == expected(checkpoint("qwen3"), mixed_prompts())


def test_a_large_stage_has_its_own_share_of_the_cache(tmp_path):
    """Five layers on two stages: the last one's blocks are smaller, both have as many."""
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": 5}, tie_word_embeddings=True)
    checkpoint = Checkpoint(config, tmp_path, 3)
    with engine(checkpoint.path, **stages(2)) as llm:
        assert list(llm.ranks.tp.stage.layers) == [3, 4]
        prompt = random_prompt(1, 40)
        (result,) = generate(llm, [prompt], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    assert result["token_ids"] == checkpoint.greedy(prompt, 9, True)[0]
