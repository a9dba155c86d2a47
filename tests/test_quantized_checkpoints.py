"""Checkpoints in few bits: each format gives the tokens of transformers with the numbers that its codes are."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_prompt
from engines import engine, generate
from kernel_data import rounded
from quantized_checkpoints import AWQ_ORDER, FORMATS, QuantizedCheckpoint, words
from safetensors.torch import load_file, save_file
from test_gpu import cast, engine_logits, reference_logits, relative_error

from nanovllm import SamplingParams
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.quantization.awq import unpack_features
from nanovllm.quantization.groups import unpack_words

MAX_TOKENS = 10
PARAMS = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
BASE = random_prompt(0, 60)
PROMPTS = [random_prompt(3, 3), random_prompt(33, 33), BASE, (*BASE[:40], 7, 8)]

# What others differ from in a size or a dtype.
SLOW = ["awq_128", "awq_symmetric", "gptq_4", "gptq_4_v2", "packed_4", "packed_4_rows", "packed_4_weight_order"]
SLOW += ["packed_8", "float_tensor", "float_blocks", "fp8_static", "phi3_awq", "phi3_float_rows"]
ROUNDED = ("int8", "float", "fp8", "phi3_f")  # formats whose rows are rounded too
IN_ANOTHER_ORDER = [name for name in FORMATS if name.endswith("_order") and "weight" not in name]


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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FORMATS]
)
def test_tokens(quantized, name):
    check_tokens(quantized(name))


@pytest.mark.parametrize(
    "name",
    [
        name if name == "packed_4_zeros" else pytest.param(name, marks=pytest.mark.slow)
        for name in FORMATS
        if name not in IN_ANOTHER_ORDER
    ],
)
def test_two_ranks(quantized, name):
    check_tokens(quantized(name), tensor_parallel_size=2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith(ROUNDED) and name not in SLOW])
def test_tokens_on_a_gpu(quantized, name):
    """By the kernels, in float32, with graphs: of formats whose rows stay as they are."""
    check_tokens(quantized(name), device="cuda", dtype="float32", gpu_memory_utilization=0.5)


def round_inputs(model: torch.nn.Module, name: str) -> None:
    """Has transformers' model round what its layers multiply, as the plain statement beside the kernels does."""
    dtype = torch.int8 if name.startswith("int8") else torch.float8_e4m3fn

    def round_input(module: torch.nn.Linear, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        x = args[0].flatten(0, -2)
        group = 128 if "blocks" in name else x.size(1)
        return (rounded(x, group, dtype).view_as(args[0]),)

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in path:
            module.register_forward_pre_hook(round_input)


@pytest.mark.gpu
@pytest.mark.parametrize("num_prompts", [1, 6, 32])
@pytest.mark.parametrize("name", ["int8_rows", "float_rows", "fp8_blocks", "fp8_tensor", "phi3_float_rows"])
def test_logits_on_a_gpu(quantized, name, num_prompts):
    """In bf16, against float32 with the codes' numbers: errors at most 1.2 times those of the plain statement."""
    checkpoint = quantized(name)
    exact, plain = (copy.deepcopy(checkpoint.model).cuda() for _ in range(2))
    round_inputs(cast(plain, torch.bfloat16), name)
    prompts = [random_prompt(seed, 50) for seed in range(num_prompts)]
    logits, generated = engine_logits(checkpoint.path, prompts, attention_backend="triton", num_kvcache_blocks=64)
    ids = torch.cat([torch.tensor(prompts, device="cuda"), generated], dim=1)
    reference = reference_logits(exact, ids)
    error = relative_error(reference_logits(plain, ids), reference)
    assert 1e-4 < error < 0.5
    assert relative_error(logits, reference) <= 1.2 * error


def test_words_of_public_packers():
    """What packers make of given codes, so that the loops of these tests are not held to themselves alone.

    AWQ and GPTQ: the layers WQLinear_GEMM and QuantLinear of auto-round 0.16.1. compressed-tensors: `pack_to_int32` of
    0.20.1. n: features, k: columns.
    """
    n, k = torch.arange(8)[:, None], torch.arange(32)
    codes = (3 * n + 5 * k + n * k) % 16
    qweight = torch.tensor([[1603480672], [421123541], [-744518070], [-1659553857]], dtype=torch.int32)
    assert torch.equal(unpack_features(qweight), codes[:, :4].to(torch.uint8))
    assert torch.equal(words(codes.t(), 4, AWQ_ORDER)[:4], qweight)
    qzeros = torch.tensor([[-1756133822]], dtype=torch.int32)
    assert torch.equal(unpack_features(qzeros), n.to(torch.uint8) + 2)
    of_four_columns = [[1049950800, -1239649576, 1049950800, -1239649576], [-686071917] * 4]
    assert words(codes[:2], 4).tolist() == of_four_columns
    assert torch.equal(unpack_words(torch.tensor(of_four_columns, dtype=torch.int32), 4), codes[:2].to(torch.uint8))
    qzeros = torch.tensor([[1281191536, 135866939, -1262102809, 1887539875]], dtype=torch.int32)
    assert torch.equal(unpack_words(qzeros, 4) + 1, (1 + 7 * k % 15).to(torch.uint8)[None])
    codes = (3 * n + 5 * k + 11 * n * k) % 256
    first_row = [252314880, 857936643, 1463558406, 2069180169, -1620165364, -1014543601, -408921838, 196699925]
    assert words(codes, 8)[:, 0].tolist() == first_row
    codes = torch.tensor([[-8, -7, -6, -5, 0, 1, 2, 7, 3, 4, 5, 6, -1, -2, -3, -4]])
    packed_codes = torch.tensor([[-90689008, 1164438987]], dtype=torch.int32)
    assert torch.equal(unpack_words(packed_codes, 4).int() - 8, codes.int())
    assert unpack_words(torch.tensor([[-8356096]], dtype=torch.int32), 8).tolist() == [[0, 127, 128, 255]]


class Damaged:
    """A copy of a checkpoint with other tensors or another config.json."""

    def __init__(self, checkpoint: QuantizedCheckpoint, folder: Path) -> None:
        self.path = folder / "copy"
        shutil.copytree(checkpoint.path, self.path)
        self.tensors = {name: tensor.clone() for name, tensor in load_file(self.path / "model.safetensors").items()}

    def refused(self, match: str, **options: Any) -> None:
        save_file(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()}, self.path / "model.safetensors"
        )
        with pytest.raises(ValueError, match=match):
            engine(str(self.path), **options).close()


QUERY, UP, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("awq_32", f"{QUERY}.scales"),
        ("awq_32", f"{UP}.qzeros"),
        ("gptq_8", f"{UP}.g_idx"),
        ("packed_4_zeros", f"{QUERY}.weight_zero_point"),
        ("packed_4_zeros", f"{QUERY}.weight_shape"),
        ("int8_rows", f"{UP}.weight_scale"),
        ("int8_tensor", f"{UP}.input_scale"),
        ("fp8_blocks", f"{UP}.weight_scale_inv"),
    ],
)
def test_a_missing_tensor(quantized, tmp_path, name, tensor):
    damaged = Damaged(quantized(name), tmp_path)
    del damaged.tensors[tensor]
    damaged.refused(f"lacks the tensor '{tensor}'")


@pytest.mark.parametrize(
    ("name", "tensor", "change", "match"),
    [
        ("awq_32", f"{UP}.qweight", torch.Tensor.long, "dtype I64, the model needs I32"),
        ("awq_32", f"{UP}.qweight", torch.t, "has shape"),
        ("awq_32", f"{UP}.scales", lambda scales: scales[1:], "has shape"),
        ("int8_rows", f"{UP}.weight", torch.Tensor.float, "dtype F32, the model needs I8"),
        ("fp8_blocks", f"{UP}.weight", torch.Tensor.half, "dtype F16, the model needs F8_E4M3"),
        ("gptq_4_order", f"{UP}.g_idx", lambda groups: groups + 1, "g_idx has groups from 0 to 4, there are 4"),
        ("gptq_4_order", f"{UP}.g_idx", lambda groups: groups - 1, "g_idx has groups from -1"),
        ("gptq_4_order", f"{QUERY}.g_idx", lambda groups: groups.flip(0), "g_idx differs between matrices"),
        (
            "gptq_4_order",
            "model.layers.0.mlp.down_proj.g_idx",
            torch.zeros_like,
            "groups of 0 to 256 columns, not of 32",
        ),
        ("packed_4_zeros", f"{UP}.weight_shape", lambda shape: shape + 1, r"weight_shape is .*257, 129"),
    ],
)
def test_a_damaged_tensor(quantized, tmp_path, name, tensor, change, match):
    damaged = Damaged(quantized(name), tmp_path)
    damaged.tensors[tensor] = change(damaged.tensors[tensor])
    module = tensor.split(".")[2]
    damaged.refused(rf"layers\.{module}.*{match}")


def test_biases_of_zeros(quantized, tmp_path):
    """AutoGPTQ stores them of layers that have none. Others are unexpected."""
    checkpoint = quantized("gptq_4_rows")
    damaged = Damaged(checkpoint, tmp_path)
    damaged.tensors[f"{QUERY}.bias"] = torch.zeros(256, dtype=torch.float16)
    save_file(damaged.tensors, damaged.path / "model.safetensors")
    assert greedy(str(damaged.path)) == checkpoint.greedy(BASE, MAX_TOKENS, True)[0]
    damaged.tensors[f"{QUERY}.bias"][3] = 0.1
    damaged.refused(f"unexpected tensor '{QUERY}.bias'")


def greedy(path: str) -> list[int]:
    with engine(path, max_model_len=128) as llm:
        return generate(llm, [BASE], PARAMS)[0]["token_ids"]


def test_groups_that_were_never_set(quantized, tmp_path):
    """-1 throughout: the columns of a group are neighbours."""
    checkpoint = quantized("packed_4_zeros")
    damaged = Damaged(checkpoint, tmp_path)
    config = json.loads((damaged.path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (damaged.path / "config.json").write_text(json.dumps(config))
    for name in list(damaged.tensors):
        if name.endswith("weight_packed"):
            size = damaged.tensors[name].size(1) * 8
            damaged.tensors[name.replace("packed", "g_idx")] = torch.full((size,), -1, dtype=torch.int32)
    save_file(damaged.tensors, damaged.path / "model.safetensors")
    assert greedy(str(damaged.path)) == checkpoint.greedy(BASE, MAX_TOKENS, True)[0]


@pytest.mark.parametrize(
    ("name", "sizes", "options", "match"),
    [
        ("gptq_4_order", {}, {"tensor_parallel_size": 2}, "o_proj: g_idx sorts the 256 columns.*2 ranks with 128"),
        ("awq_128", {"intermediate_size": 384}, {"tensor_parallel_size": 2}, "down_proj.*cut a block of 128.* 192 of"),
        ("awq_rows", {"head_dim": 24}, {"tensor_parallel_size": 2}, "o_proj.*32 columns on each rank, not 24 of 48"),
        ("fp8_blocks", {"head_dim": 64}, {"tensor_parallel_size": 2}, "would cut a block of 128: a rank's part of we"),
        ("packed_4", {"hidden_size": 160}, {}, "qkv_proj: 160 columns are not of whole groups of 128"),
        (
            "packed_4_rows",
            {"hidden_size": 80},
            {},
            "qkv_proj: 4 bits need a multiple of 32 columns on each rank, not 80",
        ),
        ("packed_4_zeros", {"head_dim": 62}, {}, "qkv_proj: 124 rows are not of whole words of 8"),
        ("gptq_8", {"head_dim": 62, "num_key_value_heads": 1}, {}, "qkv_proj: 62 rows are not of whole words of 4"),
    ],
)
def test_sizes_that_do_not_fit(quantized, tmp_path, name, sizes, options, match):
    """Layers are made before weights are read, so that random ones do."""
    damaged = Damaged(quantized(name), tmp_path)
    config = json.loads((damaged.path / "config.json").read_text())
    (damaged.path / "config.json").write_text(json.dumps(config | sizes))
    damaged.refused(match, load_format="dummy" if sizes else "auto", skip_tokenizer_init=True, **options)


@pytest.mark.parametrize("name", ["awq_32", "gptq_8", "gptq_4_order", "packed_4_zeros", "packed_4_order", "int8_rows"])
def test_dummy_weights(quantized, name):
    """Random codes give numbers about as large as random weights, around 0."""
    with engine(quantized(name).path, load_format="dummy", skip_tokenizer_init=True) as llm:
        weights = weights_of(llm)
    for weight in weights:
        numbers = weight.dequantize(torch.float32)
        assert 0.015 < numbers.std() < 0.025 and numbers.mean().abs() < 0.005
        assert weight.zeros is None and weight.order is None


def weights_of(llm: Any) -> list[QuantizedWeight]:
    modules = llm.ranks.runner.model.modules()
    return [module.weight for module in modules if isinstance(getattr(module, "weight", None), QuantizedWeight)]


def test_the_form_of_weights(quantized):
    """No more bytes than there must be: scales in 16 bits if they are, zeros and an order only if there are."""
    forms = {}
    for name in ("gptq_4_order", "packed_4_rows", "packed_8_zeros", "int8_rows", "naive_weights_only"):
        with engine(quantized(name).path) as llm:
            forms[name] = weights_of(llm)[0]
    order, rows, zeros = forms["gptq_4_order"], forms["packed_4_rows"], forms["packed_8_zeros"]
    assert order.codes.dtype == order.zeros.dtype == torch.uint8 and order.scales.dtype == torch.float16
    assert order.block == (1, 32) and order.order.dtype == torch.int64 and not order.rounds_input
    assert rows.scales.dtype == torch.float32 and rows.zeros is None and rows.order is None
    assert rows.block == (1, 128) == (1, rows.shape[1]) and rows.scales.shape == (768, 1)
    assert zeros.codes.dtype == zeros.zeros.dtype == torch.int8
    assert forms["int8_rows"].rounds_input and not forms["naive_weights_only"].rounds_input
