"""Checkpoints in few bits: each format gives the tokens of transformers with the numbers that its codes are."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONFIGS, random_prompt
from engines import engine, generate
from quantized_checkpoints import (
    CONFIG,
    DYNAMIC,
    STATIC,
    Format,
    QuantizedCheckpoint,
    awq,
    compressed,
    fp8,
    gptq,
    packed,
    unpacked,
)
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from nanovllm import SamplingParams

MAX_TOKENS = 10
PARAMS = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
BASE = random_prompt(0, 60)
PROMPTS = [random_prompt(3, 3), random_prompt(33, 33), BASE, (*BASE[:40], 7, 8)]

TOKEN_GROUP = DYNAMIC | {"strategy": "group", "group_size": 128}
FORMATS = {
    "awq_32": awq(32),
    "awq_128": awq(128, version="GEMM"),
    "awq_rows": awq(-1),
    "awq_symmetric": awq(64, is_symmetric=True),
    "gptq_4": gptq(4, 64),
    "gptq_4_rows": gptq(4, -1),
    "gptq_4_zeros": gptq(4, 32, is_symmetric=False),
    "gptq_4_order": gptq(4, 32, is_symmetric=False, desc_act=True),
    "gptq_4_v2": gptq(4, 128, is_symmetric=False, version="gptq_v2"),
    "gptq_8": gptq(8, 64),
    "gptq_8_order": gptq(8, 32, is_symmetric=False, desc_act=True, version="gptq_v2"),
    "packed_4": packed(4, 128),
    "packed_4_zeros": packed(4, 32, is_symmetric=False, dtype=torch.float16),
    "packed_4_rows": packed(4, -1, dtype=torch.float32),
    "packed_4_order": packed(4, 32, actorder="group"),
    "packed_4_weight_order": packed(4, 64, actorder="weight"),
    "packed_8": packed(8, 32),
    "packed_8_zeros": packed(8, -1, is_symmetric=False),
    "int8_rows": unpacked("int", "channel", DYNAMIC),
    "int8_tensor": unpacked("int", "tensor", STATIC, scale_dtype=torch.bfloat16),
    "float_tensor": unpacked("float", "tensor", STATIC),
    "float_rows": unpacked("float", "channel", DYNAMIC, scale_dtype=torch.bfloat16),
    "float_blocks": unpacked("float", "block", TOKEN_GROUP),
    "naive_weights_only": unpacked("float", "channel", None, name="naive-quantized"),
    "fp8_blocks": fp8(has_blocks=True),
    "fp8_tensor": fp8(has_blocks=False),
    "fp8_static": fp8(has_blocks=False, is_static=True),
}
FIRST = ["awq_32", "gptq_4_zeros", "gptq_4_order", "gptq_8", "packed_4_zeros", "packed_4_order", "packed_8_zeros"]
FIRST += ["int8_rows", "float_tensor", "float_blocks"]


@pytest.fixture(scope="session")
def quantized(tmp_path_factory):
    """The checkpoint of a format, made once."""

    @functools.cache
    def get(name: str) -> QuantizedCheckpoint:
        return QuantizedCheckpoint(FORMATS[name], tmp_path_factory.mktemp(name))

    return get


def check_tokens(checkpoint: QuantizedCheckpoint, **options: Any) -> None:
    """In chunks, then from the cache, the tokens are those of transformers."""
    want = [checkpoint.greedy(prompt, MAX_TOKENS, True)[0] for prompt in PROMPTS]
    with engine(checkpoint.path, max_model_len=128, max_num_batched_tokens=24, **options) as llm:
        for call in range(2):
            results = generate(llm, PROMPTS, PARAMS)
            assert [result["token_ids"] for result in results] == want
            assert call == 0 or results[2]["num_cached_tokens"] == 48


def slow_but(first: list[str], names: list[str]) -> list[Any]:
    return [name if name in first else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow_but(FIRST, list(FORMATS)))
def test_tokens(quantized, name):
    check_tokens(quantized(name))
