"""Bad input is refused with argument, value and limit before anything is queued, and leaves no trace."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import VOCAB_SIZE, random_prompt
from engines import check_idle

from nanovllm import LLM, SamplingParams
from nanovllm.sampling_params import RequestOutputKind

PROMPT = list(random_prompt(1, 20))
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
MAX_MODEL_LEN = 64


@pytest.fixture(scope="module")
def llm(checkpoint):
    with LLM(checkpoint("qwen3").path, device="cpu", kvcache_block_size=16, max_model_len=MAX_MODEL_LEN) as llm:
        yield llm


@pytest.fixture
def unharmed(checkpoint, llm):
    """Whatever the test does, the engine answers as before, and nothing is queued."""
    num_requests = llm.num_seqs
    yield llm
    check_idle(llm)
    assert llm.num_seqs == num_requests
    result = llm.generate([PROMPT], GREEDY, use_tqdm=False)[0]
    assert result["token_ids"] == checkpoint("qwen3").greedy(tuple(PROMPT), 8, True)[0]


BAD_PARAMS = [
    ({"max_tokens": 0}, ValueError, "max_tokens.*1.*0"),
    ({"max_tokens": -3}, ValueError, "max_tokens.*1.*-3"),
    ({"max_tokens": 1.5}, TypeError, r"max_tokens.*1\.5"),
    ({"max_tokens": True}, TypeError, "max_tokens.*True"),
    ({"max_tokens": "3"}, TypeError, "max_tokens.*3"),
    ({"temperature": -0.1}, ValueError, r"temperature.*0.*-0\.1"),
    ({"temperature": math.nan}, ValueError, "temperature.*nan"),
    ({"temperature": math.inf}, ValueError, "temperature.*inf"),
    ({"temperature": "hot"}, TypeError, "temperature.*hot"),
    ({"temperature": None}, TypeError, "temperature.*None"),
    ({"top_p": 0.0}, ValueError, "top_p.*0"),
    ({"top_p": -0.5}, ValueError, r"top_p.*-0\.5"),
    ({"top_p": 1.01}, ValueError, r"top_p.*1.*1\.01"),
    ({"top_p": math.nan}, ValueError, "top_p.*nan"),
    ({"min_p": -0.1}, ValueError, r"min_p.*-0\.1"),
    ({"min_p": 1.1}, ValueError, r"min_p.*1\.1"),
    ({"min_p": math.nan}, ValueError, "min_p.*nan"),
    ({"top_k": -2}, ValueError, "top_k.*-1.*-2"),
    ({"top_k": 2.0}, TypeError, r"top_k.*2\.0"),
    ({"seed": 1.5}, TypeError, r"seed.*1\.5"),
    ({"seed": 2**64}, ValueError, f"seed.*{2**64}"),
    ({"ignore_eos": 1}, TypeError, "ignore_eos.*1"),
    ({"stop": ""}, ValueError, "stop"),
    ({"stop": ["a", ""]}, ValueError, "stop"),
    ({"stop": ["a", 7]}, TypeError, "stop.*7"),
    ({"stop": 7}, TypeError, "stop.*7"),
    ({"stop": "a\ud83d"}, ValueError, r"stop.*'a\\ud83d'"),
    ({"bad_words": ["a", "\ud83d"]}, ValueError, r"bad_words.*'\\ud83d'"),
    ({"stop_token_ids": [1, "a"]}, TypeError, "stop_token_ids.*a"),
    ({"stop_token_ids": [-1]}, ValueError, "stop_token_ids.*-1"),
    ({"stop_token_ids": 7}, TypeError, "stop_token_ids.*7"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD_PARAMS, ids=lambda value: str(value)[:30])
def test_bad_sampling_params(options, error, match):
    with pytest.raises(error, match=match):
        SamplingParams(**options)


def test_sampling_params_at_their_limits():
    for options in ({"temperature": 0}, {"top_p": 1}, {"top_p": 1e-6}, {"min_p": 0}, {"min_p": 1}, {"top_k": -1},
                    {"top_k": 0}, {"max_tokens": 1}, {"max_tokens": None}, {"seed": 0}, {"stop": "x"},
                    {"stop_token_ids": [0]}):  # fmt: skip
        SamplingParams(**options)


@pytest.mark.parametrize(("options", "error", "match"), BAD_PARAMS, ids=lambda value: str(value)[:30])
def test_sampling_params_are_checked_again_when_used(unharmed, options, error, match):
    params = SamplingParams(temperature=0)
    for name, value in options.items():
        setattr(params, name, value)
    for call in (
        lambda: unharmed.generate([PROMPT, PROMPT], [GREEDY, params], use_tqdm=False),
        lambda: unharmed.add_request(PROMPT, params),
    ):
        with pytest.raises(error, match=match):
            call()


def test_a_queued_request_keeps_its_sampling_params(checkpoint, llm):
    """Whatever is assigned to them once it is queued."""
    params = replace(GREEDY, output_kind=RequestOutputKind.FINAL_ONLY)
    llm.add_request(PROMPT, params)
    params.temperature, params.max_tokens, params.ignore_eos = 100.0, 1, False
    results = []
    while not llm.is_finished():
        results += llm.step()
    assert [result["token_ids"] for result in results] == [checkpoint("qwen3").greedy(tuple(PROMPT), 8, True)[0]]


BAD_PROMPTS = [
    ([], ValueError, "token"),
    ([1] * MAX_MODEL_LEN, ValueError, f"max_model_len={MAX_MODEL_LEN}.*{MAX_MODEL_LEN}"),
    ([1] * 1000, ValueError, f"max_model_len={MAX_MODEL_LEN}.*1000"),
    ([1, VOCAB_SIZE], ValueError, f"{VOCAB_SIZE - 1}.*{VOCAB_SIZE}"),
    ([1, -1], ValueError, "-1"),
    ([1, 2**70], ValueError, str(2**70)),
    ([1, 2.0], TypeError, r"2\.0"),
    ([1, "a"], TypeError, "'a'"),
    ([1, None], TypeError, "None"),
    ([1, True], TypeError, "True"),
    ([[1, 2]], TypeError, r"\[1, 2\]"),
    (np.array([1.0, 2.0]), TypeError, r"1\.0"),
    ("text", ValueError, "tokenizer.*text"),  # this model has none
    (None, TypeError, "None"),
    (1.5, TypeError, r"1\.5"),
    ({"prompt": "text"}, ValueError, "tokenizer.*text"),
    ({"prompt": [1, 2]}, TypeError, r"prompt.*\[1, 2\]"),
    ({"text": "x"}, TypeError, "prompt.*text"),
]


@pytest.mark.parametrize(("prompt", "error", "match"), BAD_PROMPTS, ids=lambda value: str(value)[:20])
def test_one_bad_prompt_refuses_the_list(unharmed, prompt, error, match):
    with pytest.raises(error, match=match):
        unharmed.generate([PROMPT, prompt, PROMPT], GREEDY, use_tqdm=False)
    with pytest.raises(error, match=match):
        unharmed.add_request(prompt, GREEDY)


@pytest.mark.parametrize("prompts", [None, 7, 1.5, {"prompt": [1, 2]}, iter([[1, 2]])])
def test_prompts_of_another_type(unharmed, prompts):
    with pytest.raises(TypeError, match="prompt"):
        unharmed.generate(prompts, GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ([GREEDY], ValueError, "1.*2"),
        ([GREEDY] * 3, ValueError, "3.*2"),
        ([], ValueError, "0.*2"),
        ([GREEDY, None], TypeError, "sampling_params.*None"),
        ([GREEDY, {"temperature": 0}], TypeError, "sampling_params.*temperature"),
        ({"temperature": 0}, (TypeError, ValueError), "sampling_params"),
        (7, TypeError, "sampling_params.*7"),
    ],
    ids=str,
)
def test_bad_params_for_a_list(unharmed, params, error, match):
    with pytest.raises(error, match=match):
        unharmed.generate([PROMPT, PROMPT], params, use_tqdm=False)


def test_stop_strings_need_a_tokenizer(unharmed):
    with pytest.raises(ValueError, match=r"stop.*tokenizer"):
        unharmed.generate([PROMPT], SamplingParams(stop="x"), use_tqdm=False)
    with pytest.raises(ValueError, match="tokenizer"):
        unharmed.stream(PROMPT)
    with pytest.raises(ValueError, match="tokenizer"):
        unharmed.chat([{"role": "user", "content": "hello"}])


def test_a_refused_call_leaves_queued_requests_alone(checkpoint, llm):
    request_id = llm.add_request(PROMPT, replace(GREEDY, output_kind=RequestOutputKind.FINAL_ONLY))
    llm.step()
    with pytest.raises(ValueError, match="-1"):
        llm.generate([PROMPT, [-1]], GREEDY, use_tqdm=False)
    results = {}
    while not llm.is_finished():
        results.update({int(result["request_id"]): result for result in llm.step()})
    assert list(results) == [request_id]
    assert results[request_id]["token_ids"] == checkpoint("qwen3").greedy(tuple(PROMPT), 8, True)[0]


def test_nothing_in_nothing_out(unharmed):
    assert unharmed.generate([]) == []
    assert unharmed.generate([], []) == []
    assert unharmed.generate(()) == []


@pytest.mark.parametrize(
    "prompts", [PROMPT, tuple(PROMPT), np.array(PROMPT), [PROMPT], (PROMPT,), [np.array(PROMPT)]], ids=type
)
def test_every_form_of_a_prompt(checkpoint, llm, prompts):
    results = llm.generate(prompts, [GREEDY], use_tqdm=False)
    assert [result["token_ids"] for result in results] == [checkpoint("qwen3").greedy(tuple(PROMPT), 8, True)[0]]
    assert all(type(token_id) is int for token_id in results[0]["token_ids"])


def test_the_longest_prompt(llm):
    result = llm.generate([1] * (MAX_MODEL_LEN - 1), SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False)[0]
    assert len(result["token_ids"]) == 1 and result["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_num_batched_tokens": 0}, ValueError, "max_num_batched_tokens.*1.*0"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs.*1.*0"),
        ({"max_num_seqs": 2.5}, TypeError, r"max_num_seqs.*2\.5"),
        ({"max_model_len": 1}, ValueError, "max_model_len.*2.*1"),
        ({"max_model_len": "64"}, TypeError, "max_model_len.*64"),
        ({"gpu_memory_utilization": 0}, ValueError, "gpu_memory_utilization.*0"),
        ({"gpu_memory_utilization": 1.1}, ValueError, r"gpu_memory_utilization.*1.*1\.1"),
        ({"gpu_memory_utilization": math.nan}, ValueError, "gpu_memory_utilization.*nan"),
        ({"tensor_parallel_size": 0}, ValueError, "tensor_parallel_size.*1.*0"),
        ({"tensor_parallel_size": True}, TypeError, "tensor_parallel_size.*True"),
        ({"tensor_parallel_size": 3}, ValueError, "tensor_parallel_size=3.*num_attention_heads=4"),
        (
            {"tensor_parallel_size": 4, "hf_overrides": {"num_attention_heads": 12, "num_key_value_heads": 6}},
            ValueError,
            "tensor_parallel_size=4.*num_key_value_heads=6",
        ),
        ({"kvcache_block_size": 8}, ValueError, "kvcache_block_size.*16.*8"),
        ({"kvcache_block_size": 48}, ValueError, "kvcache_block_size.*power of two.*48"),
        ({"kvcache_block_size": 0}, ValueError, "kvcache_block_size.*16.*0"),
        ({"kvcache_block_size": "16"}, TypeError, "kvcache_block_size.*16"),
        ({"num_kvcache_blocks": 0}, ValueError, "num_kvcache_blocks.*0"),
        ({"num_kvcache_blocks": -2}, ValueError, "num_kvcache_blocks.*-2"),
        ({"enforce_eager": 1}, TypeError, "enforce_eager.*1"),
        ({"enable_prefix_caching": "yes"}, TypeError, "enable_prefix_caching.*yes"),
        ({"async_scheduling": 2}, TypeError, "async_scheduling.*2"),
        ({"dtype": "int8"}, ValueError, "dtype.*float32.*int8"),
        ({"device": "tpu"}, ValueError, "device.*cpu.*tpu"),
        ({"attention_backend": "magic"}, ValueError, "attention_backend.*triton.*magic"),
        ({"attention_backend": "triton"}, ValueError, "attention_backend.*triton.*cuda.*cpu"),
        ({"attention_backend": "flash_attn"}, ValueError, "attention_backend.*flash_attn.*cuda.*cpu"),
        ({"kv_cache_dtype": "int8"}, ValueError, "kv_cache_dtype.*fp8.*int8"),
        ({"kv_cache_dtype": "fp8"}, ValueError, "kv_cache_dtype.*fp8.*attention_backend.*torch.*cuda.*cpu"),
        ({"load_format": "pickle"}, ValueError, "load_format.*dummy.*pickle"),
        ({"seed": -1}, ValueError, "seed.*-1"),
        ({"seed": 2**63}, ValueError, f"seed.*{2**63}"),
        ({"max_num_sequences": 4}, TypeError, "max_num_sequences.*max_num_seqs"),
        ({"block_size": 8}, ValueError, "block_size.*16.*8"),
        ({"kvcache_blocksize": 16}, TypeError, "kvcache_blocksize.*kvcache_block_size"),
        ({"tensor_paralel_size": 2}, TypeError, "tensor_paralel_size.*tensor_parallel_size"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_options(checkpoint, options, error, match):
    with pytest.raises(error, match=match):
        LLM(checkpoint("qwen3").path, **{"device": "cpu"} | options)


def test_more_ranks_than_devices(checkpoint, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2.*1"):
        LLM(checkpoint("qwen3").path, device="cuda", tensor_parallel_size=2)


def test_cuda_without_a_device(checkpoint, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"^device='cuda' needs a CUDA device, torch finds none"):
        LLM(checkpoint("qwen3").path, device="cuda")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kvcache_block_size": 128}, "flash_attn.*kvcache_block_size.*256.*128"),
        ({"dtype": "float32"}, "flash_attn.*dtype.*float32"),
    ],
)
def test_what_flash_attn_needs(checkpoint, monkeypatch, options, match):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ValueError, match=match):
        LLM(checkpoint("qwen3").path, device="cuda", attention_backend="flash_attn", **{"dtype": "float16"} | options)


@pytest.mark.parametrize("model", [None, 7, "", ["a"]], ids=str)
def test_a_model_of_another_type(model):
    with pytest.raises(TypeError, match="model"):
        LLM(model)


def test_a_model_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nobody/nothing"):
        LLM("nobody/nothing", device="cpu")
    with pytest.raises(ValueError, match="missing"):
        LLM(str(tmp_path / "missing"), device="cpu")


@pytest.mark.parametrize("num_blocks", [1, 7])
def test_a_cache_too_small_for_one_request(checkpoint, num_blocks):
    """max_model_len of 120 needs 8 blocks of 16 tokens."""
    options = {"device": "cpu", "kvcache_block_size": 16, "max_model_len": 120}
    with pytest.raises(ValueError, match=f"max_model_len=120.* 8 blocks.* {num_blocks};.*num_kvcache_blocks"):
        LLM(checkpoint("qwen3").path, num_kvcache_blocks=num_blocks, **options)
    with LLM(checkpoint("qwen3").path, num_kvcache_blocks=8, **options) as llm:
        result = llm.generate([1] * 119, SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False)[0]
        assert len(result["token_ids"]) == 1


def test_a_closed_engine(checkpoint):
    llm = LLM(checkpoint("qwen3").path, device="cpu", max_model_len=64)
    request_id = llm.add_request(PROMPT, GREEDY)
    llm.close()
    llm.close()
    for call in (
        lambda: llm.generate([PROMPT]),
        lambda: llm.generate([]),
        lambda: llm.chat([]),
        lambda: llm.stream(PROMPT),
        lambda: llm.add_request(PROMPT),
        lambda: llm.abort_request(request_id),
        llm.step,
        llm.reset_prefix_cache,
    ):
        with pytest.raises(RuntimeError, match="closed"):
            call()
