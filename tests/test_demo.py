"""The demo checkpoint answers all of its questions exactly: end to end, on every backend."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from engines import Trace, check_idle

import nanovllm.demo
from nanovllm import LLM, SamplingParams

DEMO = Path(nanovllm.demo.__file__).parent
LINES = [json.loads(line) for line in (DEMO / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
EOS_TOKEN_ID = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
GREEDY = SamplingParams(temperature=0, max_tokens=256)
IN_8_BITS = [{"quantization": "fp8", "kv_cache_dtype": "fp8"}, {"quantization": "int8"}]
needs_flash_attn = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")


def check_answers(lines: list[dict] = LINES, **options) -> Trace:
    """Every answer is exact, to the last character and the EOS behind it."""
    with LLM(str(DEMO), max_model_len=1024, **options) as llm:
        trace = Trace(llm)
        conversations = [[{"role": "user", "content": line["question"]}] for line in lines]
        results = llm.chat(conversations, GREEDY, use_tqdm=False)
        check_idle(llm)
        wrong = [line["question"] for line, result in zip(lines, results, strict=True)
                 if (result["text"], result["finish_reason"]) != (line["answer"], "stop")]  # fmt: skip
        assert not wrong
        for line, result in zip(lines, results, strict=True):
            assert result["token_ids"] == [*llm.tokenizer.encode(line["answer"]), EOS_TOKEN_ID]
    return trace


def test_there_is_enough_to_answer():
    assert len(LINES) >= 200
    assert {"introduce yourself", "list all prime numbers within 100"} <= {line["question"] for line in LINES}


def test_it_is_small():
    assert sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file()) < 8_000_000


def test_on_the_cpu():
    check_answers(device="cpu")


def test_on_the_cpu_in_float32_without_async_scheduling():
    check_answers(LINES[:80], device="cpu", dtype="float32", async_scheduling=False, kvcache_block_size=64)


def test_on_the_cpu_with_little_of_everything():
    """Small blocks, a small budget and few blocks: the answers stay."""
    trace = check_answers(
        LINES[:40],
        device="cpu",
        dtype="float32",
        kvcache_block_size=16,
        max_num_batched_tokens=48,
        max_num_seqs=20,
        num_kvcache_blocks=64,
    )
    assert trace.num_chunks > 0 and trace.num_preemptions > 0


def test_on_two_ranks_of_the_cpu():
    check_answers(LINES[:40], device="cpu", dtype="float32", tensor_parallel_size=2, kvcache_block_size=64)


@pytest.mark.gpu
@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("backend", [pytest.param("flash_attn", marks=needs_flash_attn), "triton", "torch"])
def test_on_a_gpu(backend, enforce_eager, async_scheduling):
    check_answers(
        device="cuda",
        dtype="bfloat16",
        attention_backend=backend,
        enforce_eager=enforce_eager,
        async_scheduling=async_scheduling,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_on_a_gpu_in_other_dtypes(backend, dtype):
    check_answers(device="cuda", dtype=dtype, attention_backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "block_size"), [pytest.param("flash_attn", 256, marks=needs_flash_attn), ("triton", 16)]
)
def test_on_a_gpu_with_little_of_everything(backend, block_size):
    trace = check_answers(
        device="cuda",
        attention_backend=backend,
        kvcache_block_size=block_size,
        max_num_batched_tokens=100,
        max_num_seqs=40,
        num_kvcache_blocks=128 if block_size == 16 else 20,
    )
    assert trace.num_chunks > 0
    assert trace.num_preemptions > 0 or block_size == 256  # no answer outgrows a block of 256


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("options", IN_8_BITS, ids=str)
def test_on_a_gpu_in_8_bits(options, enforce_eager):
    """Which moves its logits by less than its answers lead."""
    check_answers(device="cuda", enforce_eager=enforce_eager, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("num_gpus", [2, 4])
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("backend", [pytest.param("flash_attn", marks=needs_flash_attn), "triton", "torch"])
def test_on_several_gpus(backend, enforce_eager, num_gpus):
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    options = {"attention_backend": backend, "enforce_eager": enforce_eager, "tensor_parallel_size": num_gpus}
    check_answers(device="cuda", dtype="bfloat16", **options)
