"""Rotary embeddings: every kind's frequencies are transformers', what config.json says is read or refused by name."""

from __future__ import annotations

import json
import random
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from checkpoints import MAX_POSITIONS, SHAPE, Checkpoint, random_prompt, with_rope
from engines import engine, generate, tokens
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config, PretrainedConfig, Qwen3Config, modeling_rope_utils
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from nanovllm import SamplingParams
from nanovllm.checkpoint.facts import JsonFacts
from nanovllm.checkpoint.model_config import FAMILIES, ModelConfig, override
from nanovllm.checkpoint.rope import Rope, read_ropes
from nanovllm.config import Config
from nanovllm.layers.rotary_embedding import inverse_frequencies, rotary_table

needs_transformers_5 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 computes some numbers otherwise"
)
SCALED = ["linear", "dynamic", "yarn", "longrope", "llama3"]
KINDS = ["default", *SCALED]
CPU = torch.device("cpu")
ORIGINAL = "original_max_position_embeddings"


def read(raw: dict[str, Any], head_dim: int = 32, max_positions: int = MAX_POSITIONS, **family) -> Rope:
    """The rope of a config.json with these keys."""
    rope, local_rope = read_ropes(JsonFacts("config.json", raw), head_dim, max_positions, **family)
    assert local_rope is None
    return rope


def random_rope(kind: str, seed: int, pairs: int) -> dict[str, Any]:
    """Numbers of a kind; those that may be missing are half of the time."""
    rng = random.Random(f"{kind} {seed}")

    def some(**numbers: Any) -> dict[str, Any]:
        return {name: value for name, value in numbers.items() if rng.random() < 0.5}

    rope = {"rope_type": kind, "rope_theta": 10 ** rng.uniform(2, 7)}
    factor, original = rng.uniform(1, 40), rng.randrange(64, 8192)
    if kind in ("linear", "dynamic"):
        return rope | {"factor": factor}
    if kind == "yarn":
        scales = {"mscale": rng.uniform(0.5, 1.5), "mscale_all_dim": rng.uniform(0.5, 1.5)}
        betas = {"beta_fast": rng.uniform(8, 64), "beta_slow": rng.uniform(0.2, 4)}
        optional = some(attention_factor=rng.uniform(0.5, 2), truncate=rng.random() < 0.5, **scales, **betas)
        if seed == 0:  # no frequency is interpolated in part
            optional |= {"beta_fast": 8.0, "beta_slow": 8.0, "truncate": False}
        return rope | {"factor": factor, ORIGINAL: original} | optional
    if kind == "longrope":
        lists = {name: [rng.uniform(1, 50) for _ in range(pairs)] for name in ("short_factor", "long_factor")}
        return rope | lists | {ORIGINAL: original} | some(factor=factor, attention_factor=rng.uniform(0.5, 2))
    if kind == "llama3":
        low = rng.uniform(0.5, 2)
        high = low + rng.uniform(0.1, 4)
        return rope | {"factor": factor, ORIGINAL: original, "low_freq_factor": low, "high_freq_factor": high}
    return rope


# ---- Tables --------------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers_in_float64(monkeypatch):
    """transformers computes frequencies in float32, which errs by whole turns at far positions; here in float64."""
    names = vars(torch) | {"float": torch.float64, "float32": torch.float64}
    monkeypatch.setattr(modeling_rope_utils, "torch", types.SimpleNamespace(**names))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@needs_transformers_5
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", SCALED)
def test_tables(transformers_in_float64, kind, seed):
    rng = random.Random(seed)
    head_dim, share = rng.choice([32, 64, 80, 128]), rng.choice([1.0, 1.0, 0.5, 0.75])
    rotary_dim, max_positions, most = int(head_dim * share), rng.randrange(256, 16384), rng.randrange(2, 20000)
    given = random_rope(kind, seed, rotary_dim // 2) | {"partial_rotary_factor": share}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=max_positions, rope_parameters=dict(given))
    frequencies, factor = modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](config, CPU, seq_len=most)

    rope = read({"rope_parameters": given}, head_dim, max_positions, share=1.0)
    assert rope.rotary_dim(head_dim) == rotary_dim
    torch.testing.assert_close(inverse_frequencies(rope, head_dim, most), frequencies, rtol=1e-12, atol=0)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
    table = rotary_table(rope, head_dim, most, CPU)
    assert table.shape == (most, rotary_dim) and table.dtype == torch.float32
    positions = torch.randint(most, (100,))
    angles = positions[:, None] * frequencies
    expected = torch.cat([angles.cos(), angles.sin()], dim=-1) * factor
    torch.testing.assert_close(table[positions].to(torch.float64), expected, rtol=0, atol=1e-6)


@needs_transformers_5
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("config_class", "layer", "share"),
    [
        (LlamaConfig, LlamaRotaryEmbedding, 1.0),
        (Qwen3Config, Qwen3RotaryEmbedding, 1.0),
        (Phi3Config, Phi3RotaryEmbedding, 0.75),
    ],
)
def test_tables_are_those_of_a_layer(config_class, layer, share, kind):
    """As far as float32 takes transformers: over the first positions, with the short factors of longrope."""
    if config_class is Phi3Config and kind not in ("default", "longrope"):
        pytest.skip("the family has no such kind")
    given = random_rope(kind, 0, int(32 * share) // 2) | ({"partial_rotary_factor": share} if share < 1 else {})
    shape = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 512}
    outside = {ORIGINAL: given[ORIGINAL]} if config_class is Phi3Config and ORIGINAL in given else {}
    config = config_class(**shape, head_dim=32, rope_parameters=dict(given), **outside)
    positions = torch.arange(60)
    cos, sin = (x[0].chunk(2, dim=-1)[0] for x in layer(config)(torch.empty(0), positions[None]))
    rope = read({"rope_parameters": given, **outside}, max_positions=512, share=share if share < 1 else None)
    torch.testing.assert_close(rotary_table(rope, 32, 60, CPU), torch.cat([cos, sin], dim=-1), rtol=0, atol=3e-5)


def test_a_table_of_far_positions():
    """At position 1,000,000 the angles of a frequency in float32 are hundredths off."""
    table = rotary_table(Rope("default", 1e4), 8, 2**20, CPU)
    angle = torch.tensor(1_000_000, dtype=torch.float64) * 0.1
    assert table[1_000_000, [1, 5]].tolist() == pytest.approx([angle.cos().item(), angle.sin().item()], abs=1e-7)


def test_a_layer_that_does_not_rotate():
    table = rotary_table(None, 16, 5, CPU)
    assert torch.equal(table, torch.cat([torch.ones(5, 8), torch.zeros(5, 8)], dim=-1))


def test_the_length_chooses_dynamic_and_longrope():
    dynamic = read({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, max_positions=100)
    plain = inverse_frequencies(Rope("default", 10000.0), 32, 100)
    assert torch.equal(inverse_frequencies(dynamic, 32, 50), plain)
    assert torch.equal(inverse_frequencies(dynamic, 32, 100), plain)
    assert (inverse_frequencies(dynamic, 32, 101)[1:] < plain[1:]).all()
    lists = {"short_factor": [2.0] * 16, "long_factor": [8.0] * 16}
    longrope = read({"rope_scaling": {"type": "su", ORIGINAL: 100} | lists})
    assert torch.equal(inverse_frequencies(longrope, 32, 100), plain / 2)
    assert torch.equal(inverse_frequencies(longrope, 32, 101), plain / 8)


# ---- config.json ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_both_spellings(kind):
    given = random_rope(kind, 3, 16)
    scaling = {name: value for name, value in given.items() if name not in ("rope_type", "rope_theta")}
    older = {"rope_theta": given["rope_theta"], "rope_scaling": {"type": kind, **scaling}}
    rope = read({"rope_parameters": given})
    assert rope == read(older) == read(older | {"rope_parameters": None}) and rope.kind == kind
    assert hash(rope) == hash(read(older))


def test_the_trained_positions_may_stand_outside():
    lists = {"short_factor": [2.0] * 16, "long_factor": [8.0] * 16}
    inside = {"rope_scaling": {"type": "longrope", ORIGINAL: 128} | lists}
    outside = {"rope_scaling": {"type": "longrope"} | lists, ORIGINAL: 128}
    assert read(inside) == read(outside)
    assert read(inside).attention_factor == pytest.approx((1 + 2 / 7) ** 0.5)  # 512 / 128 = 2 ** 2, of 2 ** 7


@pytest.mark.parametrize("null", ["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"])
def test_a_null_is_as_good_as_no_key(null):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert read({"rope_scaling": yarn | {null: None}}) == read({"rope_scaling": yarn})


def test_one_mscale_alone_does_not_count():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    for scales in ({"mscale": 0.7}, {"mscale_all_dim": 0.7}, {"mscale": 0.7, "mscale_all_dim": 0}):
        assert read({"rope_scaling": yarn | scales}) == read({"rope_scaling": yarn})
    assert read({"rope_scaling": yarn | {"mscale": 0.7, "mscale_all_dim": 0.7}}).attention_factor == 1.0


LINEAR, YARN = {"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}
LONGROPE = {"rope_type": "longrope", ORIGINAL: 64, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


@pytest.mark.parametrize(
    ("rope", "match"),
    [
        ({"rope_type": "ntk"}, "type 'ntk' is not supported, only one of default, linear, dynamic, yarn"),
        ({"type": 3}, "type 3 "),
        ({"type": "su", "rope_type": "yarn"}, "type 'yarn' and 'su'"),
        (LINEAR | {"type": "dynamic"}, "'linear' and 'dynamic'"),
        ({"rope_type": "linear"}, "'linear' has no 'factor'"),
        (LINEAR | {"factor": None}, "factor must be a number above 0.*None"),
        (LINEAR | {"factor": "2"}, "factor.*'2'"),
        (LINEAR | {"factor": True}, "factor.*True"),
        (LINEAR | {"factor": 0}, "factor.*above 0.*got 0"),
        (LINEAR | {"factor": float("nan")}, "factor.*nan"),
        (LINEAR | {"factor": float("inf")}, r"factor.*at most 1e\+38.*inf"),
        (LINEAR | {"rope_theta": float("inf")}, "rope_theta.*inf"),
        (LINEAR | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only 1"),
        ({"rope_type": "dynamic"}, "'dynamic' has no 'factor'"),
        ({"rope_type": "yarn"}, "'yarn' has no 'factor'"),
        (YARN | {"rope_theta": 1.0}, "'yarn' needs a rope_theta above 1, got 1.0"),
        (YARN | {ORIGINAL: -1}, f"{ORIGINAL}.*-1"),
        (YARN | {"beta_fast": 2, "beta_slow": 3}, "beta_fast=2.0.*beta_slow=3.0"),
        (YARN | {"beta_fast": 0}, "beta_fast.*got 0"),
        (YARN | {"truncate": None}, "truncate=None.*true or false"),
        (YARN | {"attention_factor": -0.5}, "attention_factor.*-0.5"),
        (YARN | {"mscale": [1]}, r"mscale.*\[1\]"),
        (YARN | {"mscale": -1.0, "mscale_all_dim": 1.0}, "mscale.*-1.0"),
        ({k: v for k, v in LONGROPE.items() if k != "long_factor"}, "'longrope' has no 'long_factor'"),
        ({k: v for k, v in LONGROPE.items() if k != ORIGINAL}, f"'longrope' has no '{ORIGINAL}'"),
        (LONGROPE | {ORIGINAL: 1}, f"{ORIGINAL} above 1, got 1.0"),
        (LONGROPE | {"short_factor": 2.0}, "16 numbers as short_factor, got 2.0"),
        (LONGROPE | {"short_factor": [1.0] * 15}, "16 numbers as short_factor, got a list of 15"),
        (LONGROPE | {"long_factor": [1.0] * 3 + [None] * 13}, r"long_factor\[3\].*None"),
        (LONGROPE | {"long_factor": [0.0] * 16}, r"long_factor\[0\].*above 0.*0.0"),
        (LONGROPE | {"factor": "4"}, "factor.*'4'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_what_is_refused(key, rope, match):
    with pytest.raises(ValueError, match=rf"{match}.*\(config\.json\)") as error:
        read({key: rope})
    assert key in str(error.value) or "rope_theta" in match or "partial_rotary_factor" in match


@pytest.mark.parametrize(
    ("share", "match"),
    [
        (0, "got 0"),
        ("0.5", "'0.5'"),
        (1.5, "=1.5 .*at most 1"),
        (0.05, "=0.05 .*2 or more"),
        (0.4, "=0.4 .*head_dim=64"),
    ],
)
def test_a_share_that_is_refused(share, match):
    with pytest.raises(ValueError, match=rf"partial_rotary_factor.*{match}.*config\.json"):
        read({"partial_rotary_factor": share}, head_dim=64 if share == 0.4 else 32, share=0.5)


def test_the_share_is_read_where_the_family_has_one():
    inside = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    for raw, share in (
        ({}, 0.5),
        ({"partial_rotary_factor": 0.75}, 0.75),
        ({"partial_rotary_factor": None}, 0.5),
        ({"rope_parameters": inside}, 0.25),
        ({"rope_parameters": inside, "partial_rotary_factor": 0.75}, 0.25),
    ):
        assert read(raw, share=0.5) == Rope("default", 10000.0, share)
    with pytest.raises(ValueError, match="'dynamic' needs more than the 2 dimensions"):
        read({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "partial_rotary_factor": 0.0625}, share=1.0)


# ---- Two ropes in one model ----------------------------------------------------------------------------------------

FULL_ROPE = {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0}
SLIDING_ROPE = {"rope_type": "default", "rope_theta": 300.0}
LINEAR_8 = Rope("linear", 500000.0, factor=8.0, original_max_position_embeddings=512.0)


@pytest.mark.parametrize(
    ("raw", "rope", "local_rope"),
    [
        ({}, Rope("default", 1e6), Rope("default", 1e4)),
        ({"rope_theta": 1e4}, Rope("default", 1e4), None),
        ({"rope_local_base_freq": 300.0}, Rope("default", 1e6), Rope("default", 300.0)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 300.0},
            LINEAR_8,
            Rope("default", 300.0),
        ),
        (
            {"rope_parameters": {"full_attention": FULL_ROPE, "sliding_attention": SLIDING_ROPE}},
            LINEAR_8,
            Rope("default", 300.0),
        ),
        ({"rope_parameters": {"full_attention": FULL_ROPE}}, LINEAR_8, Rope("default", 1e4)),
        (
            {"rope_parameters": {"full_attention": None, "sliding_attention": FULL_ROPE}},
            Rope("default", 1e6),
            LINEAR_8,
        ),
    ],
)
def test_the_rope_of_sliding_layers(raw, rope, local_rope):
    """Both spellings of Gemma 3, whose frequencies transformers 5 gives too."""
    assert read_ropes(JsonFacts("", raw), 32, 512, theta=1e6, has_local_rope=True) == (rope, local_rope)
    if not hasattr(Gemma3TextConfig(), "rope_parameters"):
        return
    raw = json.loads(json.dumps(raw))
    theirs = Gemma3RotaryEmbedding(Gemma3TextConfig(head_dim=32, max_position_embeddings=512, **raw))
    for name, mine in (("full_attention", rope), ("sliding_attention", local_rope or rope)):
        frequencies = getattr(theirs, f"{name}_inv_freq").double()
        torch.testing.assert_close(inverse_frequencies(mine, 32, 512), frequencies, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("overrides", "rope", "local_rope"),
    [
        ({}, LINEAR_8, Rope("default", 300.0)),
        ({"rope_theta": 5.0}, replace(LINEAR_8, theta=5.0), Rope("default", 300.0)),
        ({"rope_local_base_freq": 5.0}, LINEAR_8, Rope("default", 5.0)),
        ({"rope_scaling": {"type": "default"}}, Rope("default", 5e5), Rope("default", 300.0)),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}}, Rope("default", 5e5), Rope("default", 5.0)),
    ],
)
def test_overrides_of_two_ropes(overrides, rope, local_rope):
    raw = {"rope_parameters": {"full_attention": FULL_ROPE, "sliding_attention": SLIDING_ROPE}}
    before = json.dumps(raw)
    facts = JsonFacts("", override(raw, overrides))
    assert read_ropes(facts, 32, 512, theta=1e6, has_local_rope=True) == (rope, local_rope)
    assert json.dumps(raw) == before


@pytest.mark.parametrize(
    ("raw", "has_local_rope", "match"),
    [
        ({"rope_parameters": {"full_attention": FULL_ROPE}}, False, "layer type, here full_attention=.*linear"),
        ({"rope_parameters": {"sliding_attention": None}}, False, "layer type, here sliding_attention=None"),
        ({"rope_parameters": {"other": FULL_ROPE}}, True, "layer type, here other="),
        ({"rope_parameters": {"full_attention": FULL_ROPE, "rope_theta": 5.0}}, True, "layer type, here full_att"),
        ({"rope_parameters": {"full_attention": [1]}}, True, r"rope_parameters's full_attention.*\[1\]"),
        ({"rope_parameters": {"sliding_attention": LINEAR | {"factor": 0}}}, True, "sliding_attention's factor.*0"),
        ({"rope_local_base_freq": -1}, True, "rope_local_base_freq.*-1"),
        ({"rope_parameters": SLIDING_ROPE}, True, "rope_parameters must .*full_attention and sliding_attention.*300"),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {"sliding_attention": SLIDING_ROPE}},
            True,
            "rope_scaling=.*linear.*contradicts rope_parameters.*300",
        ),
    ],
)
def test_ropes_of_layer_types_that_are_refused(raw, has_local_rope, match):
    with pytest.raises(ValueError, match=rf"{match}.*config\.json"):
        read_ropes(JsonFacts("config.json", raw), 32, 512, has_local_rope=has_local_rope)


# ---- Models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "dynamic", "factor": 2.5}, 1280),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, ORIGINAL: 256}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64}, 512),  # 256, but the model says that it has more
        (LONGROPE | {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}, 512),
    ],
)
def test_how_many_positions_a_model_has(tmp_path, monkeypatch, scaling, positions):
    raw = SHAPE | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    options = {"load_format": "dummy", "device": "cpu", "skip_tokenizer_init": True}
    assert Config(str(tmp_path), max_model_len=100_000, **options).max_model_len == positions
    family = FAMILIES["LlamaForCausalLM"]
    monkeypatch.setitem(FAMILIES, "LlamaForCausalLM", replace(family, has_local_rope=True))
    model = ModelConfig.from_folder(str(tmp_path))
    assert model.max_position_embeddings == 512  # Gemma 3's counts the stretched ones
    assert model.rope.kind == scaling["rope_type"] and model.local_rope == Rope("default", 10000.0)


def check_greedy(checkpoint: Checkpoint, lengths: list[int], max_model_len: int) -> None:
    """The engine's tokens after prompts of these lengths are those of transformers."""
    prompts = [random_prompt(length, length) for length in lengths]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    with engine(checkpoint.path, max_model_len=max_model_len) as llm:
        assert llm.config.max_model_len == max_model_len
        results = generate(llm, prompts, params)
    assert tokens(results) == [checkpoint.greedy(prompt, 16, True) for prompt in prompts]


PAIRS = 16
LISTS = {"short_factor": [1 + i / 9 for i in range(PAIRS)], "long_factor": [1 + i for i in range(PAIRS)]}


@pytest.mark.parametrize(
    ("rope", "lengths"),
    [
        ({"rope_type": "linear", "factor": 4.0}, [5, 60, 150, 270]),
        ({"rope_type": "yarn", "factor": 8.0, ORIGINAL: 64}, [5, 60, 150, 270]),
        ({"rope_type": "dynamic", "factor": 8.0}, [5, 60, 150, 270]),
        ({"rope_type": "longrope", ORIGINAL: 400, **LISTS}, [5, 60, 150, 270]),  # short factors for all
        ({"rope_type": "longrope", ORIGINAL: 100, **LISTS}, [101, 150, 270]),  # long factors for all
    ],
    ids=["linear", "yarn", "dynamic", "longrope-short", "longrope-long"],
)
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
def test_greedy_tokens(tmp_path, config_class: type[PretrainedConfig], rope, lengths):
    if rope["rope_type"] == "longrope" and not hasattr(config_class(), "rope_parameters"):
        pytest.skip("transformers 4 has it for Phi-3")
    config = with_rope(config_class, {"rope_theta": 10000.0} | rope, **SHAPE, head_dim=32)
    check_greedy(Checkpoint(config, tmp_path), lengths, 300)


def test_dynamic_beyond_the_trained_positions(tmp_path):
    """transformers keeps the frequencies of the longest text that it has seen, until there comes a short one."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = with_rope(LlamaConfig, rope, **SHAPE | {"max_position_embeddings": 64}, head_dim=32)
    checkpoint = Checkpoint(config, tmp_path)
    checkpoint.model(torch.tensor([random_prompt(0, 200)]))
    check_greedy(checkpoint, [65, 100, 180], 200)


@needs_transformers_5
def test_a_part_of_each_head(tmp_path, monkeypatch):
    """Phi-3's layers are Llama's, but for the rotation and the names of what is fused."""
    lists = {"short_factor": [1.0, 1.5, 2.0, 4.0], "long_factor": [2.0, 4.0, 8.0, 16.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5} | lists
    config = Phi3Config(**SHAPE, pad_token_id=0, rope_parameters=rope, original_max_position_embeddings=100)
    checkpoint = Checkpoint(config, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, dims = load_file(file), {"qkv_proj": (64, 32, 32), "gate_up_proj": (96, 96)}
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name in list(tensors):
        for fused in (fused for fused in parts if fused in name):
            pieces = tensors.pop(name).split(dims[fused])
            names = [name.replace(fused, part) for part in parts[fused]]
            tensors |= {name: piece.contiguous() for name, piece in zip(names, pieces, strict=True)}
    save_file(tensors, file, {"format": "pt"})
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5 is not supported"):
        ModelConfig.from_folder(checkpoint.path)
    family = replace(FAMILIES["LlamaForCausalLM"], partial_rotary_factor=1.0)
    monkeypatch.setitem(FAMILIES, "LlamaForCausalLM", family)
    check_greedy(checkpoint, [101, 150, 270], 300)
