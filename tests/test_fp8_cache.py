"""A KV cache in FP8: the option, a checkpoint's scales, and whole engines; tests/test_fp8_kernels.py has the kernels.

On a CPU no engine takes the option: here some are made to, with the torch functions beside the kernels. The tests of
an engine on a GPU are in tests/test_gpu.py.
"""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from checkpoints import mixed_prompts
from engines import MAX_TOKENS, SCENARIOS, Trace, engine, generate, scenario_options, tokens
from safetensors.torch import load_file, save_file
from torch import nn

from nanovllm import LLM
from nanovllm.checkpoint.kv_scales import SCALES, set_kv_scales
from nanovllm.checkpoint.loader import model_tensors
from nanovllm.config import FP8, Config
from nanovllm.engine import kv_cache
from nanovllm.kernels.e4m3 import check_e4m3, has_e4m3
from nanovllm.layers.attention import Attention
from nanovllm.options import choices

E4M3 = torch.float8_e4m3fn

# ---- a checkpoint's scales -----------------------------------------------------------------------------------------


class Model(nn.Module):
    """Two layers, and names that are not its own."""

    ignored_tensors = ("vision.",)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(8, "triton", torch.empty(0)) for _ in range(2))

    def scales(self) -> list[tuple[float, float]]:
        return [(layer.k_scale, layer.v_scale) for layer in self.layers]


def find(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return model_tensors(Model(), str(folder))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model.", ""])
@pytest.mark.parametrize("number", range(4))
def test_scales_of_a_checkpoint(tmp_path, number, prefix, dtype, shape):
    k_name, v_name = SCALES[number], SCALES[4 + number]
    tensors = {f"{prefix}layers.1{k_name}": 0.5, f"{prefix}layers.1{v_name}": 0.25}
    tensors |= {f"vision.layers.0{k_name}": 3.0, f"{prefix}layers.0.self_attn.q_scale": 5.0}
    model = Model()
    set_kv_scales(model, find(tmp_path, {name: torch.full(shape, x, dtype=dtype) for name, x in tensors.items()}))
    assert model.scales() == [(1.0, 1.0), (0.5, 0.25)]


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_none(tmp_path, value):
    name = "model.layers.0.self_attn.v_proj.v_scale"
    with pytest.raises(ValueError, match=f"tensor '{name}' must be a scale .* more than 0, got {value}"):
        set_kv_scales(Model(), find(tmp_path, {name: torch.tensor(value)}))
    with pytest.raises(ValueError, match=rf"tensor '{name}' must be one number, .* got shape \[2\]"):
        set_kv_scales(Model(), find(tmp_path, {name: torch.ones(2)}))


def test_other_caches_pass_over_scales(checkpoint, tmp_path):
    """Be they bad ones."""
    folder, prompt = tmp_path / "model", mixed_prompts()[3]
    shutil.copytree(checkpoint("qwen3").path, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | {f"model.layers.1{name}": torch.zeros(()) for name in SCALES}, folder / "model.safetensors")
    with engine(str(folder)) as llm:
        assert tokens(generate(llm, [prompt])) == [checkpoint("qwen3").greedy(prompt, MAX_TOKENS)]


# ---- the option ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "kv_cache_dtype='fp8' needs attention_backend='triton', it is 'torch': triton needs device='cuda'"),
        ({"attention_backend": "torch"}, "kv_cache_dtype='fp8' needs attention_backend='triton', it is 'torch'"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype must be one of auto, .*fp8, fp8_e4m3, got 'fp8_e5m2'"),
        ({"kv_cache_dtype": "float16"}, "kv_cache_dtype='float16' must be 'auto', 'fp8' or .*'float32'"),
    ],
)
def test_what_an_fp8_cache_needs(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        LLM(checkpoint("qwen3").path, **{"device": "cpu", "kv_cache_dtype": "fp8"} | options)


def test_the_dtype_of_the_computation(checkpoint):
    path = checkpoint("qwen3").path
    for value in ("auto", None, "float32"):
        config = Config.create(path, {"device": "cpu", "kv_cache_dtype": value})
        assert (config.kv_cache_dtype, config.torch_kv_cache_dtype) == ("float32", torch.float32)


@pytest.mark.parametrize("value", ["fp8", "fp8_e4m3"])
def test_the_gpu_must_know_fp8(checkpoint, monkeypatch, value):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    path, capability = checkpoint("qwen3").path, [8, 0]
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: tuple(capability))
    config = Config.create(path, {"device": "cuda", "kv_cache_dtype": value})
    assert (config.kv_cache_dtype, config.torch_kv_cache_dtype) == (FP8, E4M3)
    has_e4m3.cache_clear()
    with pytest.raises(
        ValueError, match=r"the cache needs a GPU of compute capability 8\.9 or later, this one has 8\.0"
    ):
        check_e4m3("the cache", torch.device("cuda"))
    capability[1] = 9
    has_e4m3.cache_clear()
    check_e4m3("the cache", torch.device("cuda"))
    has_e4m3.cache_clear()
    with pytest.raises(ValueError, match=r"kv_cache_dtype='fp8.* needs attention_backend='triton', it is 'flash"):
        Config.create(
            path, {"device": "cuda", "kv_cache_dtype": value, "dtype": "float16", "attention_backend": "flash_attn"}
        )


# ---- whole engines -------------------------------------------------------------------------------------------------


@pytest.fixture
def fp8_engine(checkpoint, monkeypatch):
    """An engine on the CPU with the cache in FP8, which it would refuse: "triton" takes the torch functions there."""
    monkeypatch.setattr(choices, "choose_attention", lambda config: ("triton", "as asked for"))
    monkeypatch.setattr(choices, "choose_kv_cache_dtype", lambda config: FP8)
    return lambda **options: engine(checkpoint("qwen3").path, **options)


def test_blocks_take_a_quarter_of_those_in_float32(checkpoint, fp8_engine):
    """The CPU's engines compute in float32."""
    with fp8_engine(num_kvcache_blocks=19) as llm:
        runner = llm.ranks.runner
        quantised = kv_cache.bind_kv_cache(runner.model, llm.config, runner.tp, num_blocks=19)
        layer = next(module for module in runner.model.modules() if isinstance(module, Attention))
        assert layer.k_cache.dtype == layer.v_cache.dtype == E4M3
        llm.config.kv_cache_dtype = "float32"
        assert kv_cache.bind_kv_cache(runner.model, llm.config, runner.tp, num_blocks=19) == 4 * quantised


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
def test_scenarios_and_cached_prefixes(fp8_engine, async_scheduling):
    """Chunks, preemptions and prefixes from the cache change nothing: what is read is the same FP8 numbers."""
    prompts, options = mixed_prompts(), {"async_scheduling": async_scheduling}
    with fp8_engine(**options, enable_prefix_caching=False) as llm:
        expected = tokens(generate(llm, prompts))
    for scenario in ("plain", "all_at_once"):
        with fp8_engine(**options, **scenario_options(scenario, 16)) as llm:
            trace = Trace(llm)
            assert tokens(generate(llm, prompts)) == expected
            assert SCENARIOS[scenario](trace)
            assert tokens(generate(llm, prompts)) == expected
