"""Weights in few bits on CPUs: torch's operators against the numbers of the codes, and plain checkpoints in 8 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import random_prompt
from engines import engine, generate
from kernel_data import rounded
from transformers import AutoModelForCausalLM

from nanovllm import SamplingParams
from nanovllm.kernels.activation import silu_and_mul_torch
from nanovllm.kernels.cpu_products import CpuWeight, for_cpu
from nanovllm.kernels.linear import linear
from nanovllm.kernels.quantized_weight import QuantizedWeight, pack_int4
from nanovllm.kernels.rms_norm import rms_norm_torch

FEATURES, SIZE = 512, 256


def make(kind: str, group: int = SIZE, is_ordered: bool = False) -> QuantizedWeight:
    """A random weight: "int8", "int4", or "zeros" for 4 bits with zeros."""
    torch.manual_seed(0)
    order = torch.randperm(SIZE) if is_ordered else None
    scales = torch.rand(FEATURES, SIZE // group) * 0.02 + 0.01
    if kind == "int8":
        codes = torch.randint(-128, 128, (FEATURES, SIZE), dtype=torch.int8)
        return QuantizedWeight(codes, scales, (1, group), order=order)
    codes = pack_int4(torch.randint(16, (FEATURES, SIZE), dtype=torch.uint8))
    zeros = torch.randint(16, scales.shape, dtype=torch.uint8) if kind == "zeros" else None
    return QuantizedWeight(codes, scales.half(), (1, group), zeros, order)


WEIGHTS = [("int8", SIZE), *((kind, group) for kind in ("int4", "zeros") for group in (32, 64, 128, 256))]


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("is_ordered", [False, True])
@pytest.mark.parametrize(("kind", "group"), WEIGHTS)
def test_products(kind, group, is_ordered, rows):
    """Errors at most 1.2 times those of the plain statement."""
    weight = make(kind, group, is_ordered)
    packed = for_cpu(weight, torch.bfloat16)
    assert isinstance(packed, CpuWeight) and len(packed) == FEATURES
    x = torch.randn(rows, SIZE + 8).bfloat16()[:, :SIZE]
    exact = linear(x.float(), weight)
    ours, plain = (linear(x, each) for each in (packed, weight))
    error, limit = ((y.float() - exact).norm() for y in (ours, plain))
    assert 0 < error <= 1.2 * limit


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_is_fused_in(kind):
    packed = for_cpu(make(kind), torch.bfloat16)
    x, norm, bias = torch.randn(3, SIZE), torch.rand(SIZE) + 0.5, torch.randn(FEATURES)
    x, norm, bias = (tensor.bfloat16() for tensor in (x, norm, bias))
    residual = torch.randn(3, FEATURES // 2).bfloat16()
    expected = residual + silu_and_mul_torch(linear(rms_norm_torch(x, norm, 1e-6), packed) + bias)
    y = linear(x, packed, bias, norm, 1e-6, residual, "silu")
    assert y is residual and torch.equal(y, expected)


@pytest.mark.parametrize(
    "weight",
    [
        QuantizedWeight(torch.zeros(48, 64).to(torch.float8_e4m3fn), torch.ones(48, 1), (1, 64)),
        QuantizedWeight(torch.zeros(48, 64, dtype=torch.int8), torch.ones(48, 2), (1, 32)),
        QuantizedWeight(torch.zeros(40, 32, dtype=torch.uint8), torch.ones(40, 1), (1, 64)),
        QuantizedWeight(torch.zeros(48, 96, dtype=torch.uint8), torch.ones(48, 1), (1, 192)),
    ],
    ids=["e4m3", "groups in 8 bits", "odd rows", "odd groups"],
)
def test_what_the_operators_do_not_take(weight):
    assert for_cpu(weight, torch.bfloat16) is weight


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_other_rows_are_multiplied_by_numbers(kind):
    weight = make(kind)
    assert for_cpu(weight, torch.float32) is weight and for_cpu(weight, torch.float16) is weight


def in_8_bits(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with the numbers that quantization="int8" makes of the layers' weights."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "_proj" in name and parameter.dim() > 1:
            parameter.data = rounded(parameter.data, parameter.size(1), torch.int8)
    return model


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_plain_checkpoints_in_8_bits(checkpoint, num_ranks):
    """In float32 the tokens are those of transformers with the rounded numbers."""
    made, prompts = checkpoint("qwen3"), [random_prompt(seed, 20 + seed) for seed in range(3)]
    model = in_8_bits(AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32))
    want = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None)
        want.append(ids[0, len(prompt) :].tolist())
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    with engine(made.path, quantization="int8", tensor_parallel_size=num_ranks) as llm:
        assert [result["token_ids"] for result in generate(llm, prompts, params)] == want


def test_an_engine_in_bfloat16(checkpoint):
    """Its layers have weights for the operators; logprobs are near those of the numbers."""
    made, prompt = checkpoint("qwen3"), random_prompt(0, 30)
    model = in_8_bits(AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32))
    logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    with engine(made.path, quantization="int8", dtype="bfloat16") as llm:
        for layer in llm.ranks.runner.model.model.layers:
            assert isinstance(layer.mlp.down_proj.weight, CpuWeight)
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (result,) = generate(llm, [prompt], params)
    told = torch.tensor([next(iter(each.values())).logprob for each in result.prompt_logprobs[1:]])
    assert (told - expected).abs().mean() < 0.05 * expected.abs().mean()
