"""Engine options as vLLM spells them: honoured, passed over where they ask for nothing, or refused with the reason."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import CONFIGS, MAX_POSITIONS, SHAPE, random_prompt
from engines import GREEDY, check_idle, engine, generate
from huggingface_hub.utils import filter_repo_objects
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import nanovllm.demo
from nanovllm import LLM, EngineArgs, SamplingParams
from nanovllm.checkpoint.model_config import ModelConfig
from nanovllm.checkpoint.rope import Rope
from nanovllm.compat.engine_options import OTHER_NAMES, translate
from nanovllm.compat.vllm_options import ACCEPTED
from nanovllm.config import Config
from nanovllm.kernels import quantized_weight
from nanovllm.memory.num_blocks import CPU_KVCACHE_BYTES, num_fitting_blocks_on_cpu
from nanovllm.options import choices
from nanovllm.sampling.defaults import default_sampling_params
from nanovllm.text.tokenizer import load_tokenizer

DEMO = str(Path(nanovllm.demo.__file__).parent)
PROMPT = random_prompt(5, 40)


class Other:
    """A value that no option takes."""

    def __repr__(self) -> str:
        return "Other()"


@pytest.fixture
def config(checkpoint):
    """A Config of the Qwen3 checkpoint, made as LLM makes it."""

    def make(model: str = checkpoint("qwen3").path, **options) -> Config:
        return Config.create(model, {"device": "cpu"} | options)

    return make


@pytest.fixture
def folder(tmp_path):
    """A model folder without weights, of which files can be written."""

    def make(generation: object = None, **changes) -> str:
        facts = CONFIGS["qwen3"]().to_dict() | {"architectures": ["Qwen3ForCausalLM"]} | changes
        (tmp_path / "config.json").write_text(json.dumps(facts))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return str(tmp_path)

    return make


# ---- names and values of vLLM ---------------------------------------------------------------------------------------

ASK_FOR_NOTHING = {
    "trust_remote_code": False,
    "tokenizer_mode": "auto",
    "swap_space": 4,
    "cpu_offload_gb": 0,
    "enable_chunked_prefill": True,
    "disable_log_stats": True,
    "quantization": None,
    "disable_custom_all_reduce": True,
    "max_seq_len_to_capture": 8192,
    "data_parallel_size": 1,
    "enable_lora": False,
    "max_lora_rank": 16,
    "limit_mm_per_prompt": {"image": 0, "video": 0},
    "kv_cache_dtype_skip_layers": [],
    "calculate_kv_scales": False,
    "speculative_config": None,
    "distributed_executor_backend": "mp",
    "enable_expert_parallel": False,
    "compilation_config": None,
    "task": "generate",
    "runner": "generate",
    "convert": "none",
    "guided_decoding_backend": "xgrammar",
    "ignore_patterns": ["original/**/*"],
    "scheduling_policy": "fcfs",
    "long_prefill_token_threshold": 0,
    "served_model_name": "model",
}
ASK_FOR_SOMETHING = [
    ("trust_remote_code", True, "no code of a checkpoint"),
    ("tokenizer_mode", "slow", "tokenizers package"),
    ("tokenizer_mode", "mistral", "tokenizers package"),
    ("swap_space", -1, "at least 0"),
    ("swap_space", True, "at least 0"),
    ("cpu_offload_gb", 4, "stay on their device"),
    ("cpu_offload_gb", False, "stay on their device"),
    ("enable_chunked_prefill", False, "in chunks"),
    ("disable_log_stats", "no", "logged"),
    ("quantization_config", {"global_scheme": "fp8_per_tensor"}, "config.json says how"),
    ("quantization_param_path", "scales.json", "no file of their own"),
    ("prefill_context_parallel_size", 2, "tensor_parallel_size and pipeline_parallel_size"),
    ("data_parallel_size", 2, "replica"),
    ("enable_lora", True, "LoRA"),
    ("limit_mm_per_prompt", {"image": 1}, "images"),
    ("calculate_kv_scales", True, "scales of the checkpoint"),
    ("speculative_model", "[ngram]", "speculative_config"),
    ("distributed_executor_backend", "ray", "one host"),
    ("enable_expert_parallel", True, "experts"),
    ("compilation_config", 3, "kernels"),
    ("compilation_config", {"mode": 3}, "kernels"),
    ("task", "embed", "only text"),
    ("runner", "pooling", "only text"),
    ("logprobs_mode", "processed_logprobs", "model's own logits"),
    ("enable_sleep_mode", True, "stay on their device"),
    ("rope_scaling", {"rope_type": "yarn"}, "hf_overrides"),
    ("override_generation_config", {"temperature": 0.5}, "generation_config"),
    ("kv_cache_memory_bytes", 2**30, "num_kvcache_blocks"),
    ("kv_transfer_config", Other(), "handed"),
]


def test_what_asks_for_nothing_is_passed_over(config):
    assert config(**ASK_FOR_NOTHING) == config()
    for value in (0, 0.5, 4, None):
        assert config(swap_space=value) == config()


@pytest.mark.parametrize(("name", "value", "reason"), ASK_FOR_SOMETHING, ids=str)
def test_what_is_not_here_is_refused_with_a_reason(config, name, value, reason):
    with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(value))} is not supported: .*{reason}"):
        config(**{name: value})


def test_every_option_of_the_table():
    """Each refuses what it does not know by name and value, and has a reason; none is one of ours."""
    ours = Config.__dataclass_fields__
    assert not ACCEPTED.keys() & (ours.keys() | OTHER_NAMES.keys())
    for name, (values, reason) in ACCEPTED.items():
        assert len(reason) > 20, name
        for value in values:
            if not callable(value):
                assert translate({name: value}, ours) == {}
        if values != (object,):
            with pytest.raises(ValueError, match=rf"^{name}=Other\(\) is not supported: {re.escape(reason)}$"):
                translate({name: Other()}, ours)


def test_long_values_are_cut_short(config):
    with pytest.raises(ValueError) as caught:
        config(tokenizer_mode="x" * 10_000)
    assert len(str(caught.value)) < 400


def test_other_names(config):
    assert config(block_size=32) == config(kvcache_block_size=32)
    assert config(num_gpu_blocks_override=40) == config(num_kvcache_blocks=40)
    assert config(block_size=None, num_gpu_blocks_override=None) == config()
    with pytest.raises(ValueError, match="kvcache_block_size must be a power of two, got 48"):
        config(block_size=48)


def test_one_option_by_two_names(checkpoint):
    with pytest.raises(ValueError, match="block_size=16 and kvcache_block_size=32 are two names"):
        LLM(checkpoint("qwen3").path, device="cpu", block_size=16, kvcache_block_size=32)
    with LLM(checkpoint("qwen3").path, device="cpu", block_size=16, max_model_len=64) as llm:
        assert llm.config.kvcache_block_size == 16


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("tensor_paralel_size", "tensor_parallel_size"),
        ("max_num_sequences", "max_num_seqs"),
        ("num_gpu_block_override", "num_gpu_blocks_override"),
        ("quantisation", "quantization"),
        ("frobnicate", None),
        ("temperature", None),
        ("x", None),
    ],
)
def test_unknown_options(config, name, suggestion):
    with pytest.raises(TypeError) as caught:
        config(**{name: 1})
    ending = f"; did you mean {suggestion!r}?" if suggestion else ""
    assert str(caught.value) == f"unknown option {name!r}{ending}"


def test_none_is_the_default(config):
    names = ("max_num_batched_tokens", "max_num_seqs", "enforce_eager", "enable_prefix_caching", "async_scheduling")
    assert config(**dict.fromkeys((*names, "seed", "attention_backend", "kv_cache_dtype"))) == config()
    assert (config(seed=None).seed, config(enable_prefix_caching=None).enable_prefix_caching) == (0, True)
    with pytest.raises(TypeError, match=r"tensor_parallel_size.*None"):
        config(tensor_parallel_size=None)


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ("half", "float16"),
        ("float", "float32"),
        (torch.bfloat16, "bfloat16"),
        (torch.half, "float16"),
        (torch.float32, "float32"),
        ("auto", "float32"),
    ],
    ids=str,
)
def test_spellings_of_dtypes(config, given, resolved):
    made = config(dtype=given)
    assert (made.dtype, made.torch_dtype) == (resolved, getattr(torch, resolved))


@pytest.mark.parametrize("value", ["double", torch.int8, torch.float64, 16, None, ["half"]], ids=str)
def test_other_dtypes(config, value):
    with pytest.raises(ValueError, match=r"dtype must be one of auto, float32.*got .*"):
        config(dtype=value)


def test_load_formats(checkpoint, folder, config):
    assert config(load_format="safetensors").load_format == "safetensors"
    with engine(checkpoint("qwen3").path, load_format="safetensors") as llm:
        assert generate(llm, [PROMPT])[0]["token_ids"] == checkpoint("qwen3").greedy(PROMPT, GREEDY.max_tokens)[0]
    for name in ("pt", "bitsandbytes"):
        with pytest.raises(
            ValueError, match=f"load_format must be one of auto, safetensors, gguf, dummy, got '{name}'"
        ):
            config(load_format=name)


def test_vllm_names_of_attention_backends(config):
    with pytest.raises(ValueError, match="attention_backend='flash_attn' needs device='cuda'"):
        config(attention_backend="FLASH_ATTN")
    assert config(attention_backend="TORCH_SDPA") == config(attention_backend="torch")
    with pytest.raises(ValueError, match=r"attention_backend must be one of auto, .*'FLASHINFER'"):
        config(attention_backend="FLASHINFER")


def test_quantization(config, folder):
    """A method's name, which a quantised checkpoint tells by itself, and which may then be given too."""
    assert config().quantization is None
    assert [config(quantization=name).quantization for name in ("fp8", "int8", "int4")] == ["fp8", "int8", "int4"]
    quantised = folder(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    for given in (None, "fp8"):
        made = config(quantised, load_format="dummy", quantization=given)
        assert (made.quantization, type(made.quantization_method).__name__) == ("fp8", "Fp8")


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (8, TypeError, "quantization.*8"),
        (True, TypeError, "quantization.*True"),
        ({"quant_method": "fp8"}, TypeError, "quantization.*quant_method"),
        ("", ValueError, "quantization.*''"),
        (
            "int3",
            ValueError,
            r"quantization='int3'.*only fp8, int8, int4 can be made of a checkpoint without quantization_config",
        ),
    ],
    ids=str,
)
def test_quantizations_that_are_refused(config, value, error, match):
    with pytest.raises(error, match=match):
        config(quantization=value)


@pytest.mark.parametrize(
    ("options", "has_e4m3", "said"),
    [
        ({}, True, None),
        ({"quantization": "fp8"}, True, "weights by fp8"),
        ({"quantization": "fp8"}, False, "weights by fp8 (e4m3 is not computed with before compute capability 8.9: "),
    ],
)
def test_what_is_said_at_start_of_weights(checkpoint, capsys, monkeypatch, options, has_e4m3, said):
    monkeypatch.setattr(quantized_weight, "has_e4m3", lambda device: has_e4m3)
    with engine(checkpoint("qwen3").path, **options):
        pass
    parts = capsys.readouterr().err.split("; ")
    assert parts[0] == "nano-vllm: Qwen3ForCausalLM in float32 (the checkpoint's) on 1 x cpu"
    assert parts[1 if said is None else 2].startswith("attention by torch")
    if said is not None:
        assert parts[1].startswith(said)
        assert has_e4m3 or parts[1].endswith("weights are read in 8 bits and multiplied in float32)")


@pytest.mark.parametrize(
    ("stored", "is_native", "dtype", "reason"),
    [
        ("bfloat16", True, "bfloat16", "this CPU multiplies bfloat16"),
        ("bfloat16", False, "float32", "this CPU has no fast products of bfloat16"),
        ("float16", True, "float32", "this CPU has no fast products of float16"),
        ("float32", True, "float32", "the checkpoint's"),
    ],
)
def test_the_dtype_on_a_cpu(config, folder, monkeypatch, stored, is_native, dtype, reason):
    monkeypatch.setattr(choices, "multiplies_bfloat16", lambda: is_native)
    path = folder(torch_dtype=stored, dtype=stored)
    made = config(path, load_format="dummy", skip_tokenizer_init=True)
    assert (made.dtype, made.dtype_reason) == (dtype, reason)
    made = config(path, load_format="dummy", skip_tokenizer_init=True, dtype="float16")
    assert (made.dtype, made.dtype_reason) == ("float16", "as asked for")


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16",) * 2, ("float16",) * 2, ("float32", "bfloat16")])
def test_the_dtype_on_a_gpu(config, folder, monkeypatch, stored, dtype):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "device": "cuda"}
    path = folder(torch_dtype=stored, dtype=stored)
    made = config(path, **options)
    assert made.dtype == dtype
    assert (made.dtype_reason == "the checkpoint's") == (dtype == stored)
    assert config(path, dtype="float32", **options).dtype == "float32"


def test_a_quantization_that_contradicts_the_checkpoint(config, folder):
    quantised = folder(quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match=r"quantization='bitsandbytes' contradicts quant_method='fp8' .*config\.json"):
        config(quantised, load_format="dummy", quantization="bitsandbytes")
    unknown = folder(quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match=r"quant_method='bitsandbytes' is not supported, only .*fp8.*config\.json"):
        config(unknown, load_format="dummy")


def test_max_logprobs(config):
    assert [config().max_logprobs, config(max_logprobs=-1).max_logprobs] == [20, -1]
    with pytest.raises(ValueError, match=r"max_logprobs.*-1.*-2"):
        config(max_logprobs=-2)
    with pytest.raises(TypeError, match=r"max_logprobs.*None"):
        config(max_logprobs=None)


# ---- lengths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, -1, "auto"], ids=str)
def test_the_length_of_the_model(config, folder, value):
    made = config(max_model_len=value)
    assert (made.max_model_len, made.lowers_max_model_len) == (MAX_POSITIONS, True)
    path = folder(max_position_embeddings=40_960)
    made = config(path, load_format="dummy", max_model_len=value)
    assert (made.max_model_len, made.lowers_max_model_len) == (40_960, True)


def test_a_length_that_is_given(config, folder):
    path = folder(max_position_embeddings=40_960)
    for options, length in (({}, 4096), ({"max_model_len": 5000}, 5000), ({"max_model_len": 50_000}, 40_960)):
        made = config(path, load_format="dummy", **options)
        assert (made.max_model_len, made.lowers_max_model_len) == (length, False)
    for value in ("64", "4k", 64.0, True):
        with pytest.raises(TypeError, match="max_model_len must be of type int"):
            config(max_model_len=value)
    for value in (0, 1, -2):
        with pytest.raises(ValueError, match=f"max_model_len.*at least 2, got {value}"):
            config(max_model_len=value)


def test_the_length_of_a_model_with_a_window(config, folder):
    """Texts may be longer than the window."""
    slides = {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 0, "layer_types": None}
    path = folder(**slides)
    assert config(path, load_format="dummy", max_model_len=None).max_model_len == MAX_POSITIONS


# ---- hf_overrides --------------------------------------------------------------------------------------------------


def test_overridden_keys_are_computed_with(checkpoint):
    qwen3 = checkpoint("qwen3")
    overridden = AutoConfig.from_pretrained(qwen3.path)
    if hasattr(overridden, "rope_parameters"):
        overridden.rope_parameters["rope_theta"] = 50.0
    else:
        overridden.rope_theta = 50.0
    model = AutoModelForCausalLM.from_config(overridden).float().eval()
    model.load_state_dict(qwen3.model.state_dict())
    logits = model(torch.tensor([PROMPT])).logits[0, -1]
    assert int(logits.argmax()) != qwen3.greedy(PROMPT, 1)[0][0]
    with engine(qwen3.path, hf_overrides={"rope_theta": 50.0}) as llm:
        result = generate(llm, [PROMPT], SamplingParams(temperature=0, max_tokens=1))[0]
    assert result["token_ids"] == [int(logits.argmax())]


LLAMA3_NUMBERS = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", **LLAMA3_NUMBERS}


@pytest.mark.parametrize(
    ("raw", "overrides", "facts"),
    [
        ({}, {"max_position_embeddings": 1000}, {"max_position_embeddings": 1000}),
        ({"dtype": "float16"}, {"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float16"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"rope_theta": 5.0}, {"rope_theta": 6}, {"rope": Rope("default", 6)}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
            {"rope_theta": 6},
            {"rope": Rope("default", 6)},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
            {"rope_scaling": LLAMA3},
            {"rope": Rope("llama3", 5, **LLAMA3_NUMBERS)},
        ),
        (
            {"rope_scaling": LLAMA3 | {"rope_theta": 5.0}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            {"rope": Rope("default", 7)},
        ),
        ({"rope_scaling": LLAMA3, "rope_theta": 5.0}, {"rope_scaling": None}, {"rope": Rope("default", 5)}),
        ({"eos_token_id": 1}, {"eos_token_id": [2, 3]}, {"eos_token_ids": {2, 3}}),
        ({"eos_token_id": 1}, {}, {"eos_token_ids": {1}}),
    ],
)
def test_overridden_facts(tmp_path, raw, overrides, facts):
    """A key in one spelling takes the place of the other's."""
    base = SHAPE | {"architectures": ["Qwen2ForCausalLM"]} | raw
    (tmp_path / "config.json").write_text(json.dumps(base))
    read = ModelConfig.from_folder(str(tmp_path), overrides)
    assert {name: getattr(read, name) for name in facts} == facts
    unchanged = ModelConfig.from_folder(str(tmp_path))
    assert all(getattr(read, name) == getattr(unchanged, name) for name in vars(read) if name not in facts)


@pytest.mark.parametrize(
    ("overrides", "error", "match"),
    [
        ({"hidden_act": "gelu"}, ValueError, "hidden_act='gelu'.*hf_overrides.*gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, ValueError, "factor.*'4'.*hf_overrides"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, ValueError, "Classification.*not supported"),
        ({"num_attention_heads": 3}, ValueError, "num_key_value_heads=2 must divide.*hf_overrides"),
        ({"vocab_size": None}, ValueError, "vocab_size.*None.*hf_overrides"),
        (lambda config: config, ValueError, "hf_overrides must be a dict.*function.*config.json is read"),
        ([("a", 1)], TypeError, "hf_overrides must be a dict"),
        ({1: 2}, TypeError, "hf_overrides must be a dict.*1"),
    ],
)
def test_bad_overrides(config, overrides, error, match):
    with pytest.raises(error, match=match):
        config(hf_overrides=overrides)


# ---- folders and the hub -------------------------------------------------------------------------------------------


HUB_FILES = [
    *("config.json", "tokenizer.model", "chat_template.jinja", "model.safetensors.index.json"),
    *("model-00001-of-00001.safetensors", "consolidated.safetensors", "onnx/model.safetensors", "pytorch_model.bin"),
]


@pytest.fixture
def hub(monkeypatch, checkpoint):
    """A hub with the Qwen3 checkpoint and the demo's tokenizer; gives what was asked of it, and which files."""
    asked = []

    def snapshot_download(name, **options):
        patterns = {key: options.pop(key) for key in ("allow_patterns", "ignore_patterns")}
        asked.append((name, list(filter_repo_objects(HUB_FILES, **patterns)), options))
        return {"org/model": checkpoint("qwen3").path, "org/tokenizer": DEMO}[name]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_what_the_hub_is_asked_for(config, hub, tmp_path):
    cache = {"download_dir": tmp_path, "hf_token": "secret"}
    made = config("org/model", revision="v2", tokenizer="org/tokenizer", tokenizer_revision="v3", **cache)
    given = {"cache_dir": tmp_path, "token": "secret"}
    assert [(name, options) for name, _, options in hub] == [
        ("org/model", given | {"revision": "v2"}),
        ("org/tokenizer", given | {"revision": "v3"}),
    ]
    small = ["config.json", "tokenizer.model", "chat_template.jinja", "model.safetensors.index.json"]
    assert hub[0][1] == [*small, "model-00001-of-00001.safetensors"] and hub[1][1] == small
    assert made.tokenizer == DEMO
    assert "secret" not in repr(made)
    pickle.loads(pickle.dumps(made))  # as it goes to the ranks


def test_the_tokenizer_of_another_revision(config, hub):
    """Without one of its own, the tokenizer is that of the model's revision."""
    config("org/model", revision="v2")
    assert [options["revision"] for _, _, options in hub] == ["v2"]
    with pytest.raises(ValueError, match=r"tokenizer='org/model' has no tokenizer\.json"):
        config("org/model", revision="v2", tokenizer_revision="v3")  # the checkpoint has none
    assert [options["revision"] for _, _, options in hub] == ["v2", "v2", "v3"]


def test_what_the_hub_does_not_give(config, hub):
    with pytest.raises(ValueError, match="model='org/x' of revision='v2' is neither a folder nor a model the hub"):
        config("org/x", revision="v2")
    with pytest.raises(ValueError, match="tokenizer='org/x' is neither"):
        config("org/model", tokenizer="org/x")
    with pytest.raises(ValueError, match="generation_config='org/x' is neither"):
        config("org/model", generation_config="org/x")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"revision": 7}, "^revision must be a string, got 7"),
        ({"tokenizer": DEMO, "tokenizer_revision": 7}, "tokenizer_revision must be a string, got 7"),
        ({"download_dir": 7}, "download_dir must be a folder, got 7"),
        ({"hf_token": b"secret"}, "hf_token must be a string or a bool, got a bytes$"),
        ({"tokenizer": 7}, "tokenizer must be a folder or a hub name, got 7"),
        ({"tokenizer": ""}, "tokenizer must be a folder or a hub name, got ''"),
        ({"generation_config": 7}, "generation_config must be a folder or a hub name, got 7"),
        ({"skip_tokenizer_init": None}, "skip_tokenizer_init must be of type bool, got None"),
    ],
    ids=str,
)
def test_names_of_other_types(config, options, match):
    with pytest.raises(TypeError, match=match):
        config(**options)


def test_a_folder_without_config_json_is_named_by_its_option(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^hf_config_path='.*empty' has no config\.json"):
        config(hf_config_path=str(tmp_path / "empty"))


def test_a_folder_is_of_any_revision(config):
    assert config(revision="v2", download_dir="cache", hf_token=True).model == config().model


# ---- tokenizers ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_of_another_folder(checkpoint):
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(checkpoint("qwen3").path, device="cpu", max_model_len=128, tokenizer=Path(DEMO)) as llm:
        assert llm.config.tokenizer == DEMO
        result = llm.generate("a b", greedy, use_tqdm=False)[0]
    tokenizer = load_tokenizer(DEMO)
    token_ids, _ = checkpoint("qwen3").greedy(tuple(tokenizer.encode("a b")), 4, True)
    assert (result["token_ids"], result["text"]) == (token_ids, tokenizer.decode(token_ids).rstrip("\ufffd"))


def test_no_tokenizer():
    with LLM(DEMO, device="cpu", max_model_len=128, kvcache_block_size=16, skip_tokenizer_init=True) as llm:
        assert llm.config.tokenizer is None and llm.tokenizer is None
        with pytest.raises(ValueError, match=r"token ids.*'How"):
            llm.generate("How are you?", use_tqdm=False)
        result = llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)[0]
        assert len(result["token_ids"]) == 4 and result["text"] == ""


def test_the_models_own_tokenizer(config, checkpoint):
    assert config().tokenizer == config().model
    assert load_tokenizer(config().tokenizer) is None and load_tokenizer(None) is None
    with pytest.raises(ValueError, match=r"tokenizer=.* has no tokenizer\.json or tokenizer_config\.json"):
        config(tokenizer=checkpoint("qwen3").path)


# ---- generation_config ---------------------------------------------------------------------------------------------

RECOMMENDED = {
    "do_sample": False,
    "repetition_penalty": 1.1,
    "temperature": 0.6,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.1,
    "max_new_tokens": 7,
    "max_length": 20,
    "bos_token_id": 0,
}


def test_recommended_parameters(config, folder):
    path = folder(RECOMMENDED)
    params, taken, file = default_sampling_params(config(path, load_format="dummy"))
    assert taken == {
        "repetition_penalty": 1.1,
        "temperature": 0.6,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.1,
        "max_tokens": 7,
    }
    assert params == SamplingParams(**taken)
    assert file == str(Path(path, "generation_config.json"))


@pytest.mark.parametrize(
    "generation", [None, {}, {"eos_token_id": 1, "do_sample": True}, {"temperature": None}], ids=str
)
def test_nothing_is_recommended(config, folder, generation):
    params, taken, _ = default_sampling_params(config(folder(generation), load_format="dummy"))
    assert taken == {} and params == SamplingParams()


def test_whose_recommendation_counts(config, folder, tmp_path):
    """Of what ends a text, the model's file counts unless there is another one."""
    path = folder(RECOMMENDED | {"eos_token_id": 5}, eos_token_id=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "generation_config.json").write_text('{"temperature": 0.1, "eos_token_id": [6]}')
    made = config(path, load_format="dummy", generation_config=tmp_path / "other")
    assert default_sampling_params(made).taken == {"temperature": 0.1}
    assert made.model_config.eos_token_ids == {1, 6}
    for value in ("vllm", None):
        made = config(path, load_format="dummy", generation_config=value)
        assert made.generation_config == "vllm"
        assert default_sampling_params(made)[:2] == (SamplingParams(), {})
        assert made.model_config.eos_token_ids == {1, 5}
    shutil.rmtree(tmp_path / "other")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"generation_config=.*other'.* has no generation_config\.json"):
        config(path, load_format="dummy", generation_config=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("top_p", 0),
        ("top_k", 1.5),
        ("min_p", "a"),
        ("max_new_tokens", 0),
        ("repetition_penalty", 0),
    ],
)
def test_bad_recommendations(config, folder, key, value):
    made = config(folder({key: value}), load_format="dummy")
    name = "max_tokens" if key == "max_new_tokens" else key
    with pytest.raises(ValueError, match=rf"{name}.*{value}.*generation_config\.json"):
        default_sampling_params(made)


# ---- in an engine -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_bytes", "num_blocks"), [(1, 3 * 4), (CPU_KVCACHE_BYTES // 7, 7), (CPU_KVCACHE_BYTES, 3)]
)
def test_the_cache_on_a_cpu(block_bytes, num_blocks):
    """Not more than all sequences can fill, nor than its share of the memory, but enough for one."""
    config = SimpleNamespace(max_blocks_per_seq=3, max_num_seqs=4)
    assert num_fitting_blocks_on_cpu(config, block_bytes) == num_blocks


def test_the_models_length_is_lowered_to_what_the_cache_holds(checkpoint, capsys):
    with engine(checkpoint("qwen3").path, max_model_len=-1, num_kvcache_blocks=4) as llm:
        assert llm.config.max_model_len == 64 and "max_model_len=64" in capsys.readouterr().err
        assert len(llm.generate([[5] * 60], SamplingParams(max_tokens=None, ignore_eos=True), False)[0].token_ids) == 4
        with pytest.raises(ValueError, match="fewer tokens than max_model_len=64, got 64"):
            llm.generate([[5] * 64], use_tqdm=False)
    with engine(checkpoint("qwen3").path, max_model_len=None) as llm:
        assert llm.config.max_model_len == 512


def test_default_parameters_are_the_models(checkpoint, tmp_path, capsys):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.0, "max_new_tokens": 3, "top_k": 7}')
    with engine(checkpoint("qwen3").path, generation_config=str(tmp_path)) as llm:
        said = capsys.readouterr().err
        assert f"default sampling parameters of {tmp_path}" in said and "'top_k': 7" in said
        assert len(llm.generate([[5, 6, 7]], use_tqdm=False)[0].token_ids) <= 3
        llm.get_default_sampling_params().max_tokens = 9  # of a copy
        assert llm.get_default_sampling_params().max_tokens == 3


def test_engine_args_are_attributes(checkpoint):
    args = EngineArgs(checkpoint("qwen3").path, device="cpu", max_model_len=64)
    args.max_num_seqs = 2
    assert (args.max_model_len, vars(args)["max_num_seqs"]) == (64, 2)
    with LLM.from_engine_args(args) as llm:
        assert type(llm) is LLM
        assert (llm.config.max_model_len, llm.config.max_num_seqs) == (64, 2)
    args.max_modellen = 9
    with pytest.raises(TypeError, match="unknown option 'max_modellen'; did you mean 'max_model_len'"):
        LLM(**vars(args))


def test_a_bar_of_ones_own(checkpoint):
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **options) -> None:
            bars.append(self)
            super().__init__(*args, **options | {"disable": True})

        def update(self, n: int = 1) -> None:
            self.done = getattr(self, "done", 0) + n

    with engine(checkpoint("qwen3").path) as llm:
        llm.generate([[5, 6, 7]] * 3, SamplingParams(max_tokens=2), use_tqdm=Bar)
        with pytest.raises(TypeError, match=r"use_tqdm must be a bool or what makes a bar, got \[\[7\]\]"):
            llm.generate([[5, 6, 7]], GREEDY, [[7]])  # where prompt_token_ids stood in older scripts
        check_idle(llm)
    assert [bar.done for bar in bars] == [3]
