"""What a request's parameters do, alone and mixed with others, held against their definitions on transformers' logits.

Scenarios are those of tests/engines.py: whole prompts, chunks, preemption, few rows; prefix hits come by themselves.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from checkpoints import EOS_TOKEN_IDS, mixed_prompts, random_prompt
from engines import SCENARIOS, Trace, check_idle, engine, generate, scenario_options
from sampling_oracle import check_prompt, check_sample, complete, random_params

from nanovllm import LLM, SamplingParams
from nanovllm.outputs import RequestError

PROMPT = random_prompt(5, 40)
OPTIONS = {
    "presence": {"presence_penalty": 1.9},
    "presence_reward": {"presence_penalty": -1.5},
    "frequency": {"frequency_penalty": 1.2},
    "repetition": {"repetition_penalty": 1.8},
    "repetition_reward": {"repetition_penalty": 0.6},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": list(range(0, 320, 3))},
    "bias": {"logit_bias": {7: 40.0, 8: 39.5, 9: -100}},
    "bias_and_presence": {"logit_bias": {i: 30.0 for i in range(100, 112)}, "presence_penalty": 2.0},
    "allowed": {"allowed_token_ids": list(range(50, 90))},
    "stop_token": {"stop_token_ids": list(range(100, 200))},
    "all": {
        "presence_penalty": 0.8,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.3,
        "min_tokens": 5,
        "logit_bias": {60: 5.0, 301: 9.0},
        "allowed_token_ids": list(range(2, 320, 2)),
        "top_k": 12,
    },
}


@pytest.fixture(scope="module")
def llm(checkpoint):
    with engine(checkpoint("qwen3").path) as llm:
        yield llm


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", OPTIONS)
def test_alone(llm, checkpoint, name, temperature):
    params = SamplingParams(temperature=temperature, seed=11, max_tokens=14, **OPTIONS[name])
    (result,) = generate(llm, [PROMPT], params)
    check_sample(result.outputs[0], checkpoint("qwen3"), PROMPT, params)
    if temperature == 0:  # the option does something
        plain = SamplingParams(temperature=0, max_tokens=14)
        assert generate(llm, [PROMPT], plain)[0].token_ids != result.token_ids


def mixed_requests(seed: int) -> tuple[list[tuple[int, ...]], list[SamplingParams]]:
    """The prompts of the equality tests, with parameters that differ from each other."""
    rng, prompts = random.Random(seed), mixed_prompts()
    return prompts, [random_params(rng) for _ in prompts]


@pytest.mark.parametrize(
    "async_scheduling", [pytest.param(True, id="async"), pytest.param(False, id="sync", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_mixed(checkpoint, scenario, async_scheduling):
    prompts, params = mixed_requests(len(scenario))
    checkpoint = checkpoint("qwen3")
    with engine(checkpoint.path, async_scheduling=async_scheduling, **scenario_options(scenario, 16)) as llm:
        trace = Trace(llm)
        results = generate(llm, prompts, params)
    for result, prompt, param in zip(results, prompts, params, strict=True):
        check_sample(result.outputs[0], checkpoint, prompt, param)
        check_prompt(result, checkpoint, prompt, param)
    if scenario != "plain":
        assert SCENARIOS[scenario](trace) or scenario == "chunked"


def test_on_two_ranks(checkpoint):
    prompts, params = mixed_requests(3)
    checkpoint = checkpoint("qwen3")
    with engine(checkpoint.path, tensor_parallel_size=2, max_num_batched_tokens=64) as llm:
        results = generate(llm, prompts, params)
    for result, prompt, param in zip(results, prompts, params, strict=True):
        check_sample(result.outputs[0], checkpoint, prompt, param)
        check_prompt(result, checkpoint, prompt, param)


def test_prompt_logprobs_in_spite_of_a_hit(llm, checkpoint):
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3)
    for _ in range(2):
        (result,) = generate(llm, [PROMPT], params)
        assert result.num_cached_tokens == 0
        check_prompt(result, checkpoint("qwen3"), PROMPT, params)
    assert generate(llm, [PROMPT], SamplingParams(max_tokens=1))[0].num_cached_tokens == 32


def test_whole_vocabulary(checkpoint):
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=-1, prompt_logprobs=-1)
    with engine(checkpoint("qwen3").path, max_logprobs=-1) as llm:
        (result,) = generate(llm, [PROMPT], params)
    want = complete(checkpoint("qwen3"), PROMPT, params)
    for entries, rows in (
        (result.outputs[0].logprobs, want.logprobs),
        (result.prompt_logprobs[1:], want.prompt_logprobs),
    ):
        for entry, logprobs in zip(entries, rows, strict=True):
            assert len(entry) == 320
            assert torch.allclose(torch.tensor([entry[i].logprob for i in range(320)]), logprobs, atol=1e-4)


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_samples_share_the_prompt(checkpoint, enable_prefix_caching):
    checkpoint, prompt = checkpoint("qwen3"), random_prompt(8, 100)
    params = SamplingParams(n=4, seed=5, max_tokens=8, logprobs=1, prompt_logprobs=1, presence_penalty=1.0)
    with engine(checkpoint.path, enable_prefix_caching=enable_prefix_caching) as llm:
        trace = Trace(llm)
        results = generate(llm, [prompt, PROMPT, prompt], [params, params, SamplingParams(max_tokens=2)])
    for result, given in zip(results[:2], (prompt, PROMPT), strict=True):
        assert [sample.index for sample in result.outputs] == [0, 1, 2, 3]
        assert result.text == result.outputs[0].text and result.finished
        for index, sample in enumerate(result.outputs):
            check_sample(sample, checkpoint, given, params, seed=5 + index)
        check_prompt(result, checkpoint, given, params)
        assert len({tuple(sample.token_ids) for sample in result.outputs}) == 4
    # 96 and 32 tokens of the prompts are full blocks, which the three others of each share.
    computed = sum(sum(n for n in batch.num_tokens if n > 1) for batch in trace.batches)
    third = 4 if enable_prefix_caching else 100
    assert computed == (100 + 3 * 4) + (40 + 3 * 8) + third


def test_a_preempted_request_counts_as_before(checkpoint):
    """Penalties of generated tokens outlast the loss of a row."""
    checkpoint, prompts = checkpoint("qwen3"), [random_prompt(i, 100) for i in range(4)]
    params = [
        SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, frequency_penalty=0.3, repetition_penalty=1.1)
        for _ in prompts
    ]
    with engine(checkpoint.path, num_kvcache_blocks=24) as llm:
        trace = Trace(llm)
        results = generate(llm, prompts, params)
    assert trace.num_preemptions > 0
    for result, prompt, param in zip(results, prompts, params, strict=True):
        check_sample(result.outputs[0], checkpoint, prompt, param)


def test_params_are_those_of_the_call(llm):
    """Later assignments do not reach a request, and are checked when used."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, output_kind=SamplingParams().output_kind)
    request_id = llm.add_request(list(PROMPT), params)
    params.max_tokens = 9
    outputs = []
    while not llm.is_finished():
        outputs += llm.step()
    assert outputs[-1].request_id == str(request_id) and len(outputs[-1].token_ids) == 4
    assert len(generate(llm, [PROMPT], params)[0].token_ids) == 9
    params.top_p = 7
    with pytest.raises(ValueError, match="top_p must be between 0 and 1, got 7"):
        llm.generate([list(PROMPT)], params)
    check_idle(llm)


def test_results_as_both_kinds_of_scripts_read_them(llm):
    import json
    import pickle

    params = SamplingParams(n=2, seed=1, max_tokens=5, logprobs=1)
    (result,) = generate(llm, [PROMPT], params)
    assert result["token_ids"] == result.token_ids == result.outputs[0].token_ids
    assert result.prompt_token_ids == list(PROMPT) and result.prompt is None and result.finished
    times = [
        result.metrics[name] for name in ("arrival_time", "first_scheduled_time", "first_token_time", "finished_time")
    ]
    assert times == sorted(times)
    assert pickle.loads(pickle.dumps(result)) == result
    assert json.loads(json.dumps(result))["outputs"][1]["token_ids"] == result.outputs[1].token_ids
    assert repr(result).startswith("RequestOutput(text=")
    with pytest.raises(AttributeError, match="RequestOutput has no 'texts'"):
        _ = result.texts


@pytest.mark.parametrize("kind", ["CUMULATIVE", "DELTA", "FINAL_ONLY"])
def test_what_step_hands_out(llm: LLM, kind):
    from nanovllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0, max_tokens=5, ignore_eos=True, logprobs=0, output_kind=RequestOutputKind[kind]
    )
    (want,) = generate(llm, [PROMPT], params)
    llm.add_request("mine", {"prompt_token_ids": list(PROMPT)}, params)
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
        assert llm.requests.hand_out() == [], "each once"
    assert {output.request_id for output in outputs} == {"mine"}
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    got = [output.outputs[0].token_ids for output in outputs]
    assert (
        got
        == {
            "CUMULATIVE": [want.token_ids[: i + 1] for i in range(5)],
            "DELTA": [[token_id] for token_id in want.token_ids],
            "FINAL_ONLY": [want.token_ids],
        }[kind]
    )
    if kind == "DELTA":
        assert [output.outputs[0].logprobs for output in outputs] == [[entry] for entry in want.outputs[0].logprobs]


def test_ids_of_the_callers(llm):
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    assert llm.add_request("a", list(PROMPT), params) == "a"
    with pytest.raises(ValueError, match="request_id must be of no unfinished request, got 'a'"):
        llm.add_request("a", list(PROMPT), params)
    number = llm.add_request(list(PROMPT), params)
    llm.step()
    llm.abort_request(["a", number, "unknown"])
    assert llm.step() == []
    check_idle(llm)


def test_eos_ends_a_text_unless_told_otherwise(llm, checkpoint):
    bias = {EOS_TOKEN_IDS[2]: 100.0}
    (ended,) = generate(llm, [PROMPT], SamplingParams(temperature=0, max_tokens=5, logit_bias=bias))
    assert (ended.token_ids, ended.finish_reason, ended.outputs[0].stop_reason) == ([EOS_TOKEN_IDS[2]], "stop", None)
    (as_stop,) = generate(
        llm,
        [PROMPT],
        SamplingParams(temperature=0, logit_bias=bias, ignore_eos=True, stop_token_ids=[EOS_TOKEN_IDS[2]]),
    )
    assert as_stop.outputs[0].stop_reason == EOS_TOKEN_IDS[2]


ON_GPUS = {
    "plain": ("plain", {}),
    "preempted": ("preempted", {}),
    "torch": ("plain", {"sampler_backend": "torch"}),
    "two_gpus": ("plain", {"tensor_parallel_size": 2}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPUS)
def test_mixed_on_a_gpu(checkpoint, case):
    """In CUDA graphs, which are captured for the kinds of steps that come, and replayed."""
    scenario, options = ON_GPUS[case]
    if torch.cuda.device_count() < options.get("tensor_parallel_size", 1):
        pytest.skip("needs two GPUs")
    prompts, params = mixed_requests(len(scenario))
    checkpoint, options = checkpoint("qwen3"), scenario_options(scenario, 16) | options
    with engine(checkpoint.path, device="cuda", dtype="float32", **options) as llm:
        results = generate(llm, prompts, params)
        captured = llm.ranks.runner.graphs.captured
        assert any(shape.adjusting and shape.num_logprobs for shape in captured)
        again = generate(llm, prompts, params)
    for result, other, prompt, param in zip(results, again, prompts, params, strict=True):
        check_sample(result.outputs[0], checkpoint, prompt, param, tolerance=2e-3)
        check_prompt(result, checkpoint, prompt, param, tolerance=2e-3)
        assert other.token_ids == result.token_ids


def test_ids_that_look_like_numbers(llm):
    """An id of a caller's is never another request's, whoever else is served."""
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    name = str(llm.num_seqs + 2)
    assert llm.add_request(name, list(PROMPT), params) == name
    generate_params = SamplingParams(max_tokens=1)
    assert len(llm.generate([list(PROMPT)], generate_params, use_tqdm=False)) == 1
    with pytest.raises(ValueError, match="request_id must be of no unfinished request"):
        llm.add_request(list(PROMPT), params)  # which would be known by the same
    with pytest.raises(TypeError, match="request_id must be a string, got 7"):
        llm.add_request(7, list(PROMPT), params)
    llm.abort_request(name)
    assert isinstance(llm.add_request(list(PROMPT), params), int)
    llm.abort_request(llm.num_seqs - 1)
    assert llm.step() == []
    check_idle(llm)


def test_a_failed_sample_fails_its_request(checkpoint, tmp_path):
    """Whichever of its samples failed; there are as many logprobs as tokens."""
    from safetensors.torch import load_file, save_file

    path = checkpoint("qwen2").path
    for file in ("config.json", "generation_config.json"):
        (tmp_path / file).write_bytes((Path(path) / file).read_bytes())
    tensors = load_file(f"{path}/model.safetensors")
    tensors["model.embed_tokens.weight"][7] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    params = SamplingParams(n=3, seed=10, logit_bias={7: 5.0}, max_tokens=2, ignore_eos=True, logprobs=1)
    with engine(str(tmp_path)) as llm, pytest.raises(RequestError, match="request 0 failed") as raised:
        llm.generate([list(random_prompt(1, 40))], params, use_tqdm=False)
    (result,) = raised.value.results
    assert {sample.finish_reason for sample in result.outputs} == {"error", "length"}
    assert all(len(sample.token_ids) == len(sample.logprobs) for sample in result.outputs)
