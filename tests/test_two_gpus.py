"""On two GPUs, whatever a request, a script or a server may ask for: as on one GPU, token for token, in float32.

Which families, scenarios and faults there are is in tests/test_gpu.py, stages in tests/test_pipeline.py.
"""

from __future__ import annotations

import threading
from contextlib import closing

import httpx
import pytest
import torch
from checkpoints import mixed_prompts, random_prompt
from engines import GREEDY, engine, expected, generate, tokens
from servers import serving
from test_demo import DEMO, IN_8_BITS, LINES, check_answers
from test_pipeline import REQUESTS, structured_texts
from test_quantized_checkpoints import IN_ANOTHER_ORDER, ROUNDED, check_tokens, quantized  # noqa: F401

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.outputs import RequestOutput

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
ON_TWO = {"device": "cuda", "num_kvcache_blocks": 300, "tensor_parallel_size": 2}
FORMATS = ["awq_rows", "gptq_4_rows", "packed_4_zeros", "packed_8"]


@pytest.fixture(scope="module")
def pair(checkpoint):
    """An engine of two ranks, for tests that leave it whole."""
    with engine(checkpoint("qwen3").path, dtype="float32", **ON_TWO) as llm:
        yield llm


def test_what_requests_may_ask_for(checkpoint, pair):
    params = [
        SamplingParams(seed=index, max_tokens=12, ignore_eos=True, **request)
        for index, request in enumerate(REQUESTS.values())
        for _ in range(3)
    ]
    prompts = [random_prompt(index, 30 + index) for index in range(len(params))]
    with engine(checkpoint("qwen3").path, dtype="float32", **ON_TWO | {"tensor_parallel_size": 1}) as llm:
        alone = generate(llm, prompts, params)
    for result, other in zip(generate(pair, prompts, params), alone, strict=True):
        assert [sample.token_ids for sample in result.outputs] == [sample.token_ids for sample in other.outputs]
        if other.outputs[0].logprobs is not None:
            assert chosen_logprobs(result) == pytest.approx(chosen_logprobs(other), abs=1e-3)


def chosen_logprobs(result: RequestOutput) -> list[float]:
    sample = result.outputs[0]
    return [entry[token].logprob for entry, token in zip(sample.logprobs, sample.token_ids, strict=True)]


def test_threads(checkpoint, pair):
    """Each gets its own, computed in steps that they share."""
    prompts, wrong = mixed_prompts(), []
    want = expected(checkpoint("qwen3"), prompts)

    def complete(index: int) -> None:
        results = pair.generate([list(prompts[i]) for i in range(index, len(prompts), 3)], GREEDY, use_tqdm=False)
        if tokens(results) != want[index::3]:
            wrong.append(index)

    threads = [threading.Thread(target=complete, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong and pair.is_finished()


def test_structures():
    pytest.importorskip("xgrammar")
    assert structured_texts(**ON_TWO | {"tensor_parallel_size": 1}) == structured_texts(**ON_TWO)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_in_few_bits(quantized, name):  # noqa: F811
    assert not name.startswith(ROUNDED) and name not in IN_ANOTHER_ORDER
    check_tokens(quantized(name), dtype="float32", **ON_TWO)


@pytest.mark.parametrize("options", IN_8_BITS, ids=str)
def test_the_demo_in_8_bits(options):
    """Which moves its logits by less than its answers lead."""
    check_answers(LINES[:200], dtype="bfloat16", **ON_TWO, **options)


def test_speculation_on_the_demo():
    config = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    check_answers(LINES[:40], dtype="bfloat16", speculative_config=config, **ON_TWO)


def test_the_server():
    with closing(AsyncLLM(str(DEMO), dtype="float32", max_model_len=1024, **ON_TWO)) as llm, serving(llm) as url:
        answers = [
            httpx.post(
                f"{url}/v1/chat/completions",
                json={"model": "demo", "temperature": 0, "messages": [{"role": "user", "content": line["question"]}]},
                timeout=60,
            ).json()["choices"][0]["message"]["content"]
            for line in LINES[:5]
        ]
    assert answers == [line["answer"] for line in LINES[:5]]
