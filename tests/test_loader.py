"""Checkpoints: what is read, what is refused and how the refusal says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import random_prompt
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.config import ModelConfig
from nanovllm.layers.rotary_embedding import inverse_frequencies

PROMPT = random_prompt(1, 20)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


class Folder:
    """A copy of a checkpoint that a test may damage."""

    def __init__(self, source: str, path: Path) -> None:
        shutil.copytree(source, path)
        self.path = path
        self.file = path / "model.safetensors"
        self.tensors = load_file(self.file)
        self.config = json.loads((path / "config.json").read_text())

    def save(self) -> None:
        save_file(self.tensors, self.file)

    def save_config(self) -> None:
        (self.path / "config.json").write_text(json.dumps(self.config))

    def load(self, **options) -> LLM:
        return LLM(str(self.path), device="cpu", kvcache_block_size=16, max_model_len=128, **options)

    def greedy(self, **options) -> list[int]:
        with self.load(**options) as llm:
            return llm.generate(list(PROMPT), GREEDY, use_tqdm=False)[0]["token_ids"]

    def refused(self, match: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=match):
            self.load()


@pytest.fixture
def folder(checkpoint, tmp_path):
    return lambda family: Folder(checkpoint(family).path, tmp_path / family)


def expected(checkpoint, family: str) -> list[int]:
    return checkpoint(family).greedy(PROMPT, 12, True)[0]


def test_shards_with_an_index(checkpoint, folder):
    llama = folder("llama")
    names = sorted(llama.tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: llama.tensors[name] for name in part}, llama.path / file)
    llama.file.unlink()
    assert llama.greedy() == expected(checkpoint, "llama"), "without an index, all files of the folder are read"
    # Files that an index does not name are not read.
    (llama.path / "other.safetensors").write_bytes(b"no safetensors")
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (llama.path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert llama.greedy() == expected(checkpoint, "llama")
    (llama.path / "model-2.safetensors").unlink()
    llama.refused("model-2.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.bias",
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor(folder, name):
    qwen2 = folder("qwen2")
    del qwen2.tensors[name]
    qwen2.save()
    qwen2.refused(name)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "x"])
def test_an_unexpected_tensor(folder, name):
    qwen3 = folder("qwen3")
    qwen3.tensors[name] = torch.zeros(4)
    qwen3.save()
    qwen3.refused(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_misshaped_tensor(folder, name):
    qwen3 = folder("qwen3")
    qwen3.tensors[name] = qwen3.tensors[name][:-2].clone()
    qwen3.save()
    qwen3.refused(name)


def test_a_transposed_tensor(folder):
    qwen3 = folder("qwen3")
    name = "model.layers.0.mlp.gate_proj.weight"
    qwen3.tensors[name] = qwen3.tensors[name].T.contiguous()
    qwen3.save()
    qwen3.refused(rf"{name}.*\(64, 96\).*\(96, 64\)")


@pytest.mark.parametrize("share", [0.9, 0.01, 0.0])
def test_a_truncated_file(folder, share):
    qwen3 = folder("qwen3")
    data = qwen3.file.read_bytes()
    qwen3.file.write_bytes(data[: int(len(data) * share)])
    qwen3.refused("model.safetensors")


def test_no_safetensors(folder):
    qwen3 = folder("qwen3")
    qwen3.file.rename(qwen3.path / "pytorch_model.bin")
    qwen3.refused("no safetensors")


def test_tensors_that_repeat_what_the_model_has(checkpoint, folder):
    """A tied head's copy and rotary tables, as some files hold them."""
    qwen3 = folder("qwen3")
    qwen3.tensors["lm_head.weight"] = qwen3.tensors["model.embed_tokens.weight"].clone()
    qwen3.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    qwen3.save()
    assert qwen3.greedy() == expected(checkpoint, "qwen3")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_dtypes(folder, stored, dtype):
    """Weights are cast to the dtype asked for; what was rounded in the file stays rounded."""
    qwen2 = folder("qwen2")
    qwen2.tensors = {name: tensor.to(stored) for name, tensor in qwen2.tensors.items()}
    qwen2.save()
    qwen2.config.pop("dtype", None)
    qwen2.config["torch_dtype"] = str(stored).removeprefix("torch.")
    qwen2.save_config()
    with qwen2.load(dtype=dtype) as llm:
        has_fast_bf16 = torch.cpu._is_amx_tile_supported()
        auto = "bfloat16" if stored == torch.bfloat16 and has_fast_bf16 else "float32"
        assert llm.config.dtype == (auto if dtype == "auto" else dtype)
        weight = llm.ranks.runner.model.model.layers[0].mlp.down_proj.weight
        assert weight.dtype == llm.config.torch_dtype
        assert torch.equal(weight, qwen2.tensors["model.layers.0.mlp.down_proj.weight"].to(weight.dtype))
        assert len(llm.generate(list(PROMPT), GREEDY, use_tqdm=False)[0]["token_ids"]) == 12


def set_rope(config: dict, new_style: bool, theta: float, scaling: dict) -> None:
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        config.pop(key, None)
    if new_style:
        config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"} | scaling
    else:
        config["rope_theta"] = theta
        config["rope_scaling"] = scaling or None


@pytest.mark.parametrize("new_style", [True, False])
def test_both_spellings_of_rope(checkpoint, folder, new_style):
    llama = folder("llama")
    rope = llama.config.get("rope_parameters") or llama.config["rope_scaling"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    set_rope(llama.config, new_style, 10000.0, scaling)
    llama.save_config()
    assert llama.greedy() == expected(checkpoint, "llama")


def test_rope_theta_counts(folder):
    """Old and new style agree for another theta too, and theta changes the tokens."""
    qwen3 = folder("qwen3")
    seen = []
    for new_style, theta in [(True, 100.0), (False, 100.0), (False, 10000.0)]:
        set_rope(qwen3.config, new_style, theta, {})
        qwen3.save_config()
        seen.append(qwen3.greedy())
    assert seen[0] == seen[1] != seen[2]


def test_llama3_scaling_of_each_band(folder):
    """High frequencies stay, low ones are divided by the factor, those between lie between."""
    llama = folder("llama")
    plain = {key: value for key, value in llama.config.items() if key not in ("rope_parameters", "rope_scaling")}
    config = ModelConfig.from_folder(str(llama.path))
    scaled = inverse_frequencies(config)
    llama.config = plain | {"rope_theta": config.rope_theta}
    llama.save_config()
    ratio = scaled / inverse_frequencies(ModelConfig.from_folder(str(llama.path)))
    assert ratio[0] == 1.0 and torch.isclose(ratio[-1], torch.tensor(1 / 8, dtype=ratio.dtype))
    assert ((ratio > 1 / 8) & (ratio < 1)).any() and (ratio.diff() <= 0).all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM.*Qwen2ForCausalLM.*Qwen3For"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"sliding_window": 128, "use_sliding_window": True}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantiz"),
        ({"hidden_size": None}, "hidden_size"),
        ({"head_dim": 512}, "head_dim.*256.*512"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3.*num_attention_heads=4"),
    ],
)
def test_a_config_that_is_not_supported(folder, changes, match):
    qwen3 = folder("qwen3")
    qwen3.config |= changes
    qwen3.save_config()
    qwen3.refused(match)


def test_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        LLM(str(tmp_path), device="cpu")


def test_eos_ids_of_both_files(folder):
    qwen3 = folder("qwen3")
    qwen3.config["eos_token_id"] = [5, 6]
    qwen3.save_config()
    (qwen3.path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert ModelConfig.from_folder(str(qwen3.path)).eos_token_ids == {5, 6, 7}


def test_dummy_weights_need_only_the_config(folder, tmp_path):
    source = folder("llama_bias")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(source.path / "config.json", alone)
    embeddings = []
    for seed in (0, 0, 1):
        with LLM(str(alone), device="cpu", load_format="dummy", seed=seed, max_model_len=64) as llm:
            weights = dict(llm.ranks.runner.model.named_parameters())
            embeddings.append(weights["model.embed_tokens.weight"])
            assert abs(embeddings[-1].std().item() - 0.02) < 0.001
            assert (weights["model.norm.weight"] == 1).all()
            assert (weights["model.layers.0.self_attn.qkv_proj.bias"] == 0).all()
            result = llm.generate(list(PROMPT), GREEDY, use_tqdm=False)[0]
            assert len(result["token_ids"]) == 12 and result["text"] == ""
    assert torch.equal(embeddings[0], embeddings[1]) and not torch.equal(embeddings[0], embeddings[2])
