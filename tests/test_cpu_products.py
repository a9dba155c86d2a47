"""Weights in few bits on CPUs: torch's operators against the numbers of the codes, and rounded plain weights."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import SHAPE, Checkpoint, random_prompt
from engines import engine, generate
from kernel_data import rounded
from transformers import AutoModelForCausalLM, Qwen3Config

from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.kernels.activation import silu_and_mul_torch
from nanovllm.kernels.cpu_products import CpuWeight, for_cpu, half_logits
from nanovllm.kernels.linear import linear
from nanovllm.kernels.quantized_weight import QuantizedWeight, pack_int4
from nanovllm.kernels.rms_norm import rms_norm_torch
from nanovllm.quantization.int4 import GROUP, round_groups

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
        QuantizedWeight(torch.zeros(48, 72, dtype=torch.int8), torch.ones(48, 1), (1, 72)),
        QuantizedWeight(torch.zeros(40, 32, dtype=torch.uint8), torch.ones(40, 1), (1, 64)),
        QuantizedWeight(torch.zeros(48, 96, dtype=torch.uint8), torch.ones(48, 1), (1, 192)),
    ],
    ids=["e4m3", "groups in 8 bits", "odd columns", "odd rows", "odd groups"],
)
def test_what_the_operators_do_not_take(weight):
    assert for_cpu(weight, torch.bfloat16) is weight


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_other_rows_are_multiplied_by_numbers(kind):
    weight = make(kind)
    assert for_cpu(weight, torch.float32) is weight and for_cpu(weight, torch.float16) is weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [5, 3000])
def test_logits_of_half_types(vocab_size, dtype):
    """The largest are those of products in float32, of which bfloat16 makes ties; others are near them."""
    torch.manual_seed(0)
    x, weight = torch.randn(40, SIZE).to(dtype), torch.randn(vocab_size, SIZE).to(dtype)
    exact, logits = x.float() @ weight.float().t(), half_logits(x, weight)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.argmax(1), exact.argmax(1))
    torch.testing.assert_close(logits.amax(1), exact.amax(1))
    torch.testing.assert_close(logits, exact, atol=0.25, rtol=0.02)


def in_4_bits(numbers: torch.Tensor) -> torch.Tensor:
    """The numbers that quantization="int4" makes of a matrix."""
    codes, scales, zeros = round_groups(numbers)
    return QuantizedWeight(pack_int4(codes), scales, (1, GROUP), zeros).dequantize(numbers.dtype)


def test_rounding_to_4_bits_is_exact():
    """Of numbers that are 16 steps apart at most in each group, whatever the steps are, and where all are alike."""
    codes = torch.randint(16, (64, 8, GROUP))
    codes[..., 0], codes[..., 1] = 0, 15
    numbers = (codes * torch.rand(64, 8, 1) + torch.randn(64, 8, 1)).flatten(1)
    numbers[0], numbers[1] = 0.75, 0
    torch.testing.assert_close(in_4_bits(numbers), numbers, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("degrees", [3.0, 1000.0])
def test_rounding_to_4_bits(degrees):
    """No group has a larger error than by codes from its least to its largest number, and most a smaller one."""
    torch.manual_seed(0)
    numbers = torch.distributions.StudentT(degrees).sample((256, 8 * GROUP))
    groups = numbers.unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=2, keepdim=True)
    scale = (high - low) / 15
    limit = (((groups - low) / scale).round() * scale + low - groups).square().sum(2)
    error = (in_4_bits(numbers).unflatten(1, (-1, GROUP)) - groups).square().sum(2)
    assert (error <= 1.001 * limit).all() and error.sum() < 0.9 * limit.sum()


def test_damaged_weights_in_4_bits():
    """NaN and infinity are not hidden by codes, which have none."""
    numbers = torch.randn(3, 2 * GROUP)
    numbers[0, 5], numbers[1, 40] = torch.nan, torch.inf
    is_bad = ~in_4_bits(numbers).isfinite()
    assert is_bad[0, :GROUP].all() and is_bad[1, GROUP:].all() and is_bad.sum() == 2 * GROUP


ROUNDINGS = {"int8": lambda numbers: rounded(numbers, numbers.size(1), torch.int8), "int4": in_4_bits}


def in_few_bits(model: torch.nn.Module, quantization: str) -> torch.nn.Module:
    """A copy with the numbers that an option makes of the layers' weights."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "_proj" in name and parameter.dim() > 1:
            parameter.data = ROUNDINGS[quantization](parameter.data)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A checkpoint whose rows are of whole groups on two ranks, too."""
    config = Qwen3Config(**SHAPE | {"intermediate_size": 128}, head_dim=32, tie_word_embeddings=True)
    return Checkpoint(config, tmp_path_factory.mktemp("whole groups")).path


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("quantization", ROUNDINGS)
def test_plain_checkpoints(folder, quantization, num_ranks):
    """In float32 the tokens are those of transformers with the rounded numbers."""
    prompts = [random_prompt(seed, 20 + seed) for seed in range(3)]
    model = in_few_bits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), quantization)
    want = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None)
        want.append(ids[0, len(prompt) :].tolist())
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    with engine(folder, quantization=quantization, tensor_parallel_size=num_ranks) as llm:
        assert [result["token_ids"] for result in generate(llm, prompts, params)] == want


@pytest.mark.parametrize("quantization", ROUNDINGS)
def test_an_engine_in_bfloat16(folder, quantization):
    """Its layers have weights for the operators; logprobs are near those of the numbers."""
    prompt = random_prompt(0, 30)
    model = in_few_bits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), quantization)
    logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    with engine(folder, quantization=quantization, dtype="bfloat16") as llm:
        for layer in llm.ranks.runner.model.model.layers:
            assert isinstance(layer.mlp.down_proj.weight, CpuWeight)
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (result,) = generate(llm, [prompt], params)
    told = torch.tensor([next(iter(each.values())).logprob for each in result.prompt_logprobs[1:]])
    assert (told - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_what_is_not_rounded_to_4_bits(checkpoint, monkeypatch):
    """Rows that are not of whole groups, be it on a rank; experts; and anything on a GPU."""
    plain = checkpoint("qwen3").path
    for family, num_ranks, match in (
        ("mistral", 1, r"self_attn\.o_proj: 80 columns are not of whole groups of 32"),
        ("qwen3", 2, r"down_proj: 4 bits need a multiple of 32 columns on each rank, not 48 of 96"),
        ("qwen3_moe", 1, r"experts that are quantised by .* are not supported"),
    ):
        options = {"quantization": "int4", "tensor_parallel_size": num_ranks}
        with pytest.raises(ValueError, match=match), engine(checkpoint(family).path, **options):
            pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"quantization='int4' rounds weights for device='cpu' only, got 'cuda'"):
        Config.create(plain, {"quantization": "int4", "device": "cuda"})
