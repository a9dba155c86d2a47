"""Every fact of config.json is settled: honoured, harmless or refused.

The fields are those of transformers' config classes, asked for when the tests run, so that a version that adds one
fails here until the table below says what it is. What is called harmless is shown to be: transformers computes the
same bits with and without it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from checkpoints import LLAMA3_ROPE, SHAPE, random_prompt
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from nanovllm.checkpoint.families import FAMILIES, MULTIPLIERS
from nanovllm.checkpoint.model_config import ModelConfig
from nanovllm.experts.mixture import Mixture
from nanovllm.models import ARCHITECTURES

IS_TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
CONFIG_CLASSES: dict[str, type[PretrainedConfig]] = {
    "Gemma2ForCausalLM": Gemma2Config,
    "Gemma3ForCausalLM": Gemma3TextConfig,
    "GraniteForCausalLM": GraniteConfig,
    "LlamaForCausalLM": LlamaConfig,
    "MistralForCausalLM": MistralConfig,
    "MixtralForCausalLM": MixtralConfig,
    "Olmo2ForCausalLM": Olmo2Config,
    "Phi3ForCausalLM": Phi3Config,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen2MoeForCausalLM": Qwen2MoeConfig,
    "Qwen3ForCausalLM": Qwen3Config,
    "Qwen3MoeForCausalLM": Qwen3MoeConfig,
    "SmolLM3ForCausalLM": SmolLM3Config,
}
ALL = list(CONFIG_CLASSES)
GEMMA2, GEMMA3, GRANITE, LLAMA, MISTRAL, MIXTRAL, OLMO2, PHI3, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, SMOLLM3 = (
    [name] for name in ALL
)
GEMMA = GEMMA2 + GEMMA3
QWEN = QWEN2 + QWEN3
QWEN_MOE = QWEN2_MOE + QWEN3_MOE
MOE = MIXTRAL + QWEN_MOE
# By what the families make of sliding_window.
IN_CACHE = LLAMA + GRANITE + OLMO2
EVERYWHERE = MISTRAL + MIXTRAL + PHI3
IF_ASKED = QWEN + QWEN_MOE + SMOLLM3


def but(*families: list[str]) -> list[str]:
    """All families but some."""
    return [family for family in ALL if all(family not in others for others in families)]


HONOURED, HARMLESS, REFUSED = "honoured", "harmless", "refused"
PROMPT = random_prompt(3, 24)
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1]}
LONGROPE = {"short_factor": [1.5] * 8, "long_factor": [2.0] * 8}
SLIDING = ["sliding_attention"] * SHAPE["num_hidden_layers"]


class Row(NamedTuple):
    """What a value of a field comes to in some families, where the base config is changed to `given` first."""

    field: str
    verdict: str
    value: Any
    families: list[str] = ALL
    given: dict[str, Any] | None = None


ROWS = [
    # Sizes and numbers of the model.
    Row("architectures", REFUSED, ["LlamaModel"]),
    Row("model_type", REFUSED, "gpt2"),
    Row("vocab_size", HONOURED, 328),
    Row("hidden_size", HONOURED, 128),
    Row("intermediate_size", HONOURED, 100),
    Row("num_hidden_layers", HONOURED, 3),
    Row("num_attention_heads", HONOURED, 8),
    Row("num_key_value_heads", HONOURED, 1),
    Row("num_key_value_heads", HONOURED, None),
    Row("head_dim", HONOURED, 8),
    Row("head_dim", HONOURED, None, LLAMA + MISTRAL + MIXTRAL),
    Row("head_dim", REFUSED, None, QWEN3 + GEMMA),  # not its default, and transformers refuses it
    Row("max_position_embeddings", HONOURED, 256),
    Row("rms_norm_eps", HONOURED, 1e-4),
    Row("tie_word_embeddings", HONOURED, True, but(SMOLLM3, GEMMA)),
    Row("tie_word_embeddings", HONOURED, False, SMOLLM3 + GEMMA),
    Row("hidden_act", REFUSED, "gelu", but(GEMMA)),
    Row("hidden_act", HARMLESS, "swish", but(GEMMA)),
    Row("attention_bias", HONOURED, True, IN_CACHE + SMOLLM3 + QWEN3 + QWEN3_MOE + GEMMA),
    Row("attention_bias", HARMLESS, True, MISTRAL + MIXTRAL + PHI3 + QWEN2 + QWEN2_MOE),
    Row("mlp_bias", HONOURED, True, LLAMA + GRANITE + SMOLLM3),
    Row("mlp_bias", HARMLESS, True, but(LLAMA, GRANITE, SMOLLM3)),
    Row("qkv_bias", HONOURED, False, QWEN2_MOE),
    Row("qkv_bias", HARMLESS, False, but(QWEN2_MOE)),
    Row("embedding_multiplier", HONOURED, 2.0, GRANITE),
    Row("residual_multiplier", HONOURED, 2, GRANITE),
    Row("attention_multiplier", HONOURED, 2.0, GRANITE),
    Row("logits_scaling", HONOURED, 2.0, GRANITE),
    Row("logits_scaling", REFUSED, 0, GRANITE),
    Row("logits_scaling", HARMLESS, 2.0, but(GRANITE)),
    Row("hidden_act", HARMLESS, "gelu", GEMMA),
    Row("hidden_activation", REFUSED, "gelu", GEMMA),
    Row("hidden_activation", HARMLESS, "gelu_pytorch_tanh", GEMMA),
    Row("query_pre_attn_scalar", HONOURED, 20, GEMMA),
    Row("query_pre_attn_scalar", HONOURED, 32, GEMMA),
    Row("query_pre_attn_scalar", REFUSED, 0, GEMMA),
    Row("query_pre_attn_scalar", REFUSED, None, GEMMA),
    Row("query_pre_attn_scalar", HARMLESS, 20, but(GEMMA)),
    Row("attn_logit_softcapping", HONOURED, 20.0, GEMMA2),
    Row("attn_logit_softcapping", HONOURED, None, GEMMA2),
    Row("attn_logit_softcapping", REFUSED, -1.0, GEMMA2),
    Row("attn_logit_softcapping", HARMLESS, 0.5, but(GEMMA2)),
    Row("final_logit_softcapping", HONOURED, 20.0, GEMMA),
    Row("final_logit_softcapping", HONOURED, None, GEMMA2),
    Row("final_logit_softcapping", REFUSED, "30", GEMMA),
    Row("final_logit_softcapping", HARMLESS, 20.0, but(GEMMA)),
    # Mixtures of experts.
    Row("num_experts", HONOURED, 5, QWEN_MOE),
    Row("num_local_experts", HONOURED, 5, MIXTRAL),
    Row("num_local_experts", REFUSED, 5, QWEN3_MOE),  # beside num_experts
    Row("num_experts_per_tok", HONOURED, 1, MOE),
    Row("num_experts_per_tok", REFUSED, 9, MOE),
    Row("moe_intermediate_size", HONOURED, 24, QWEN_MOE),
    Row("moe_intermediate_size", HARMLESS, 24, MIXTRAL),
    Row("shared_expert_intermediate_size", HONOURED, 24, QWEN2_MOE),
    Row("shared_expert_intermediate_size", HARMLESS, 24, QWEN3_MOE),
    Row("norm_topk_prob", HONOURED, True, QWEN_MOE),
    Row("norm_topk_prob", HARMLESS, False, MIXTRAL),
    Row("decoder_sparse_step", HONOURED, 2, QWEN_MOE),
    Row("decoder_sparse_step", HARMLESS, 2, but(QWEN_MOE)),
    Row("mlp_only_layers", HONOURED, [1], QWEN_MOE),
    Row("mlp_only_layers", HARMLESS, None, QWEN_MOE),
    Row("mlp_only_layers", HARMLESS, [7], QWEN_MOE),
    Row("mlp_only_layers", REFUSED, 1, QWEN_MOE),
    Row("output_router_logits", HARMLESS, True),
    Row("router_aux_loss_coef", HARMLESS, 0.5, MOE),
    Row("router_jitter_noise", HARMLESS, 0.5, MIXTRAL),
    # Rotary embeddings, in both spellings.
    Row("rope_theta", HONOURED, 500.0),
    Row("rope_scaling", HONOURED, {k: value for k, value in LLAMA3_ROPE.items() if k != "rope_theta"}, but(PHI3)),
    Row("rope_scaling", HARMLESS, {"type": "default"}, ALL if IS_TRANSFORMERS_5 else []),
    Row("rope_scaling", HONOURED, {"type": "linear", "factor": 2.0}),
    Row("rope_scaling", HONOURED, {"rope_type": "dynamic", "factor": 2.0}),
    Row("rope_scaling", REFUSED, {"rope_type": "proportional", "factor": 2.0}),
    Row("rope_parameters", HONOURED, LLAMA3_ROPE, but(PHI3, GEMMA3)),
    Row("rope_parameters", REFUSED, LLAMA3_ROPE, GEMMA3),
    Row("rope_parameters", HONOURED, {"rope_type": "default", "rope_theta": 500.0}, but(GEMMA3)),
    Row("rope_parameters", HARMLESS, DEFAULT_ROPE, but(MIXTRAL, SMOLLM3, GEMMA3)),
    Row("rope_parameters", HARMLESS, DEFAULT_ROPE | {"rope_theta": 1e6}, MIXTRAL),
    Row("rope_parameters", HARMLESS, DEFAULT_ROPE | {"rope_theta": 2e6}, SMOLLM3),
    Row("rope_parameters", HONOURED, {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}, but(PHI3, GEMMA3)),
    Row("rope_parameters", REFUSED, {"rope_type": "yarn", "factor": None, "rope_theta": 10000.0}),
    Row("rope_parameters", REFUSED, {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}, but(GEMMA3)),
    Row("rope_parameters", HONOURED, {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}, GEMMA3),
    Row("rope_local_base_freq", HONOURED, 500.0, GEMMA3),
    Row("rope_local_base_freq", HARMLESS, 500.0, but(GEMMA3)),
    Row("partial_rotary_factor", HONOURED, 0.5, PHI3),
    Row("partial_rotary_factor", REFUSED, 0.5, but(PHI3)),  # 4.51 reads it for the default type, 5 for llama3
    Row("partial_rotary_factor", HARMLESS, 1.0),
    Row("rope_scaling", HONOURED, {"type": "yarn"} | LONGROPE, PHI3),
    Row("rope_scaling", REFUSED, {"type": "yarn", "factor": 2.0}, PHI3),
    Row("original_max_position_embeddings", HONOURED, 64, PHI3, {"rope_scaling": {"type": "su"} | LONGROPE}),
    Row("no_rope_layers", HONOURED, [0, 1], SMOLLM3),
    Row("no_rope_layers", HARMLESS, [1, 1, 0], SMOLLM3),  # which are more than there are layers
    Row("no_rope_layers", REFUSED, [1], SMOLLM3),
    Row("no_rope_layers", REFUSED, [1, 2], SMOLLM3),
    Row("no_rope_layer_interval", HONOURED, 2, SMOLLM3),
    Row("no_rope_layer_interval", HARMLESS, 3, SMOLLM3),
    Row("no_rope_layers", HARMLESS, [0, 1], but(SMOLLM3)),
    # What a token attends to.
    Row("is_causal", REFUSED, False),
    Row("is_causal", HARMLESS, True),
    Row("use_bidirectional_attention", REFUSED, True),
    Row("use_bidirectional_attention", HARMLESS, False, GEMMA),
    Row("sliding_window", HONOURED, 8, IN_CACHE + EVERYWHERE + GEMMA),
    Row("sliding_window", REFUSED, None, GEMMA),
    Row("sliding_window_pattern", HONOURED, 2, GEMMA3),
    Row("sliding_window_pattern", HARMLESS, 1, but(GEMMA3)),
    # A window that is switched off; the mask of 4.51 has it all the same.
    Row("sliding_window", HARMLESS, 8 if IS_TRANSFORMERS_5 else 64, IF_ASKED),
    Row("sliding_window", HARMLESS, None, IN_CACHE + EVERYWHERE),
    Row("sliding_window", HONOURED, 8, QWEN + QWEN_MOE, {"use_sliding_window": True, "max_window_layers": 1}),
    Row("sliding_window", HONOURED, 8, SMOLLM3, {"use_sliding_window": True, "no_rope_layers": [1, 0]}),
    Row("use_sliding_window", HONOURED, True, QWEN + QWEN_MOE, {"sliding_window": 8, "max_window_layers": 1}),
    Row("use_sliding_window", HONOURED, True, SMOLLM3, {"sliding_window": 8, "no_rope_layers": [1, 0]}),
    # 28 layers are before the first, or three before the one without rope.
    Row("use_sliding_window", HARMLESS, True, QWEN + SMOLLM3, {"sliding_window": 64}),
    Row("use_sliding_window", HARMLESS, True, IN_CACHE + EVERYWHERE + GEMMA),
    Row("max_window_layers", HONOURED, 1, QWEN, {"sliding_window": 8, "use_sliding_window": True}),
    Row("max_window_layers", HONOURED, 0, QWEN2_MOE, {"sliding_window": 8, "use_sliding_window": True}),
    Row("max_window_layers", HARMLESS, 0),
    Row(
        "layer_types",
        *(HONOURED, SLIDING, QWEN + QWEN2_MOE + SMOLLM3),
        {"sliding_window": 8, "use_sliding_window": True},
    ),
    Row("layer_types", HONOURED, ["full_attention", "sliding_attention"], MISTRAL, {"sliding_window": 8}),
    Row("layer_types", HONOURED, ["full_attention"] * 2, GEMMA),
    Row("layer_types", HONOURED, ["full_attention", "sliding_attention"], GEMMA),
    Row("layer_types", HARMLESS, ["full_attention"] * 2, but(GEMMA)),
    Row("layer_types", HARMLESS, ["attention", "full_attention"], but(GEMMA) if IS_TRANSFORMERS_5 else []),
    Row("layer_types", REFUSED, SLIDING, ALL, {"sliding_window": None}),
    Row("layer_types", REFUSED, ["full_attention", "linear_attention"]),
    Row("layer_types", REFUSED, ["full_attention"]),
    Row("dual_chunk_attention_config", HONOURED, {"original_max_position_embeddings": 64}, QWEN),
    Row("dual_chunk_attention_config", HARMLESS, {"original_max_position_embeddings": 512}, QWEN),
    Row("dual_chunk_attention_config", HARMLESS, None, QWEN),
    Row("dual_chunk_attention_config", REFUSED, {"chunk_size": 64}, QWEN),
    Row("dual_chunk_attention_config", REFUSED, [64], QWEN),
    Row("attention_chunk_size", REFUSED, 8, IN_CACHE + EVERYWHERE + QWEN3_MOE),
    Row("attention_chunk_size", HARMLESS, 8, QWEN + QWEN2_MOE + SMOLLM3 + GEMMA),
    # The weights.
    Row("dtype", HONOURED, "bfloat16"),
    Row("torch_dtype", HONOURED, "bfloat16"),
    # What it may hold, the method says: see nanovllm/quantization.
    Row("quantization_config", HONOURED, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    Row("quantization_config", REFUSED, "fp8"),
    Row("quantization_config", HARMLESS, None, ALL if IS_TRANSFORMERS_5 else []),
    Row("compression_config", HONOURED, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    Row("compression_config", REFUSED, ["pack-quantized"]),
    Row("pruned_heads", REFUSED, {"0": [1]}),
    Row("pruned_heads", HARMLESS, {}),
    Row("per_layer_config", REFUSED, {"0": {"num_key_value_heads": 4}}),
    Row("kv_sharing_modes", REFUSED, ["store", "reuse"]),
    Row("transformers_weights", REFUSED, "other.safetensors"),
    Row("configuration_files", REFUSED, ["config.4.0.0.json"]),
    # How texts end, and what else is asked for by id.
    Row("eos_token_id", HONOURED, [1, 5]),
    Row("bos_token_id", HARMLESS, 9),
    Row("pad_token_id", HARMLESS, 7),
    Row("sep_token_id", HARMLESS, 7),
    Row("decoder_start_token_id", HARMLESS, 7),
    # Training, other tasks, and what transformers gives back.
    Row("transformers_version", HARMLESS, "4.30.0"),
    Row("initializer_range", HARMLESS, 0.5),
    Row("attention_dropout", HARMLESS, 0.5),
    Row("resid_pdrop", HARMLESS, 0.5),
    Row("embd_pdrop", HARMLESS, 0.5),
    Row("pretraining_tp", HARMLESS, 2),
    Row("use_cache", HARMLESS, False),
    Row("output_hidden_states", HARMLESS, True),
    Row("output_attentions", HARMLESS, True),
    Row("return_dict", HARMLESS, False),
    Row("chunk_size_feed_forward", HARMLESS, 8),
    Row("is_encoder_decoder", HARMLESS, True),
    Row("id2label", HARMLESS, {"0": "a", "1": "b", "2": "c"}),
    Row("label2id", HARMLESS, {"a": 0}),
    Row("num_labels", HARMLESS, 3),
    Row("problem_type", HARMLESS, "regression"),
    Row("torchscript", HARMLESS, True),
    Row("use_bfloat16", HARMLESS, True),
    Row("tf_legacy_loss", HARMLESS, True),
    Row("is_decoder", HARMLESS, True),
    Row("add_cross_attention", HARMLESS, True),
    Row("cross_attention_hidden_size", HARMLESS, 8),
    Row("tie_encoder_decoder", HARMLESS, True),
    Row("finetuning_task", HARMLESS, "a"),
    Row("tokenizer_class", HARMLESS, "LlamaTokenizer"),
    Row("prefix", HARMLESS, "a"),
    Row("task_specific_params", HARMLESS, {"a": {"b": 1}}),
    Row("some_key_of_a_fine_tune", HARMLESS, 1),
]
# How to draw tokens: older versions keep it in config.json, a request of this engine brings its own.
GENERATION = {
    "max_length": 30,
    "min_length": 1,
    "do_sample": True,
    "early_stopping": True,
    "num_beams": 2,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "typical_p": 0.5,
    "repetition_penalty": 2.0,
    "length_penalty": 2.0,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[3]],
    "num_return_sequences": 1,
    "output_scores": True,
    "return_dict_in_generate": True,
    "forced_bos_token_id": 3,
    "forced_eos_token_id": 3,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [3, 0.5],
    "suppress_tokens": [3],
    "begin_suppress_tokens": [3],
}
ROWS += [Row(field, HARMLESS, value) for field, value in GENERATION.items()]
CASES = [(family, row) for family in ALL for row in ROWS if family in row.families]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40}
BASE = {
    family: SHAPE
    | {"architectures": [family], "model_type": FAMILIES[family].model_type, "torch_dtype": "float32"}
    | {"pad_token_id": None}  # others are beyond the vocabulary
    | ({"sliding_window": None} if family in MISTRAL else {})
    | ({"head_dim": 32} if family in LLAMA + MISTRAL + MIXTRAL + QWEN3 + QWEN3_MOE else {})
    | (EXPERTS | {"num_local_experts" if family in MIXTRAL else "num_experts": 4} if family in MOE else {})
    for family in ALL
}
MINIMAL_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def read(folder: Path, config: Any) -> ModelConfig:
    """ModelConfig of a folder with this config.json."""
    text = config if isinstance(config, (str, bytes)) else json.dumps(config)
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return ModelConfig.from_folder(str(folder))


def build(config: dict[str, Any]) -> torch.nn.Module:
    """transformers' model, with random weights."""
    config_class = CONFIG_CLASSES[config["architectures"][0]]
    own = config_class.from_dict(json.loads(json.dumps(config)))
    return AutoModelForCausalLM.from_config(own, attn_implementation="eager").float().eval()


@cache
def weights(family: str) -> dict[str, torch.Tensor]:
    """Random ones for the base config of a family."""
    generator = torch.Generator().manual_seed(0)
    state = build(BASE[family]).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) * 0.2 for name, tensor in sorted(state.items())}


@torch.inference_mode()
def logits(config: dict[str, Any]) -> torch.Tensor:
    """What transformers computes with a config and the weights of its family."""
    model = build(config)
    model.load_state_dict(weights(config["architectures"][0]))
    # By its two parts: transformers 5 fails between them where return_dict is false.
    return model.lm_head(model.model(torch.tensor([PROMPT]))[0])


@cache
def base_logits(family: str) -> torch.Tensor:
    return logits(BASE[family])


def fields_of(config_class: type[PretrainedConfig]) -> set[str]:
    """What a config class knows: a dataclass in transformers 5, a constructor and what it sets before."""
    names = set(config_class().to_dict()) | set(inspect.signature(config_class.__init__).parameters)
    if dataclasses.is_dataclass(config_class):
        names |= {field.name for field in dataclasses.fields(config_class)}
    return {name for name in names if not name.startswith("_")} - {"self", "args", "kwargs"}


@pytest.mark.parametrize("family", ALL)
def test_every_field_is_settled(family):
    unknown = fields_of(CONFIG_CLASSES[family]) - {row.field for row in ROWS if family in row.families}
    assert not unknown, (
        f"transformers {transformers.__version__} has fields of {CONFIG_CLASSES[family].__name__} that the table of "
        f"tests/test_config_facts.py does not settle as honoured, harmless or refused: {sorted(unknown)}"
    )


def test_the_families_are_those_that_have_a_model():
    assert set(FAMILIES) == set(ARCHITECTURES)
    assert {name for name, family in FAMILIES.items() if family.text_key is None} == set(CONFIG_CLASSES)
    for family, config_class in CONFIG_CLASSES.items():
        assert FAMILIES[family].model_type == config_class.model_type


@pytest.mark.parametrize(
    ("family", "row"), CASES, ids=[f"{family[:-11]}-{row.verdict}-{row.field}-{row.value}" for family, row in CASES]
)
def test_facts(tmp_path, family, row):
    base = BASE[family] | (row.given or {})
    changed = base | {row.field: row.value}
    if row.verdict == REFUSED:
        with pytest.raises(ValueError, match=rf"{row.field}.*config\.json"):
            read(tmp_path, changed)
    elif row.verdict == HONOURED:
        assert read(tmp_path, changed) != read(tmp_path, base)
    else:
        assert read(tmp_path, changed) == read(tmp_path, base)
        if IS_TRANSFORMERS_5 or row.field != "torchscript":  # by which 4 unties the head
            assert torch.equal(logits(changed), base_logits(family))


@pytest.mark.skipif(not IS_TRANSFORMERS_5, reason="transformers 4 ignores it")
@torch.inference_mode()
def test_why_a_window_of_llama_counts():
    """transformers 5 gives other tokens with its KV cache than without, so neither can be called right."""
    model = build(BASE["LlamaForCausalLM"] | {"sliding_window": 8})
    model.load_state_dict(weights("LlamaForCausalLM"))
    assert torch.equal(model(torch.tensor([PROMPT])).logits, base_logits("LlamaForCausalLM"))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, whole = (
        model.generate(torch.tensor([PROMPT]), use_cache=use_cache, **options) for use_cache in (True, False)
    )
    assert not torch.equal(cached, whole)


@pytest.mark.parametrize("family", ALL)
def test_defaults_are_those_of_transformers(tmp_path, family):
    minimal = dict(zip(MINIMAL_KEYS, (320, 256, 96, 2, 32), strict=True))
    config = read(tmp_path, minimal | {"architectures": [family]})
    known = CONFIG_CLASSES[family](**minimal)
    for name in (*MINIMAL_KEYS, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(config, name) == getattr(known, name), name
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "qkv_bias"):
        assert getattr(config, name) == getattr(known, name, False), name
    for name in MULTIPLIERS:
        assert getattr(config, name) == getattr(known, name, 1.0), name
    assert config.head_dim == (getattr(known, "head_dim", None) or 8)
    layer_types = ["sliding_attention"] * 2 if family in MISTRAL else getattr(known, "layer_types", None)
    windows = tuple(4096 if layer_type == "sliding_attention" else None for layer_type in layer_types or [None] * 2)
    assert config.layer_windows == windows
    assert (config.mixture is None) == (family not in MOE)
    if config.mixture is not None:
        assert config.mixture == Mixture(
            layers=frozenset({0, 1}),
            num_experts=getattr(known, "num_experts", None) or known.num_local_experts,
            num_experts_per_tok=known.num_experts_per_tok,
            intermediate_size=getattr(known, "moe_intermediate_size", known.intermediate_size),
            shared_intermediate_size=getattr(known, "shared_expert_intermediate_size", 0),
            norm_topk_prob=getattr(known, "norm_topk_prob", True),
        )
    if IS_TRANSFORMERS_5:
        rope = known.rope_parameters
        thetas = {ropes["rope_theta"] for ropes in rope.values()} if family in GEMMA3 else {rope["rope_theta"]}
    else:
        thetas = {known.rope_theta, getattr(known, "rope_local_base_freq", known.rope_theta)}
    assert {config.rope.theta} | ({config.local_rope.theta} if config.local_rope else set()) == thetas
    assert config.rope.kind == "default"
    scalar = getattr(known, "query_pre_attn_scalar", None)
    scale = getattr(known, "attention_multiplier", None)
    assert config.attention_scale == (scalar**-0.5 if scalar else scale)
    assert config.final_logit_softcapping == getattr(known, "final_logit_softcapping", None)
    assert config.attn_logit_softcapping == getattr(known, "attn_logit_softcapping", None)


@pytest.mark.parametrize("family", ALL)
def test_null_heads_are_as_many_as_the_query_heads(tmp_path, family):
    config = BASE[family] | {"num_key_value_heads": None}
    assert read(tmp_path, config).num_key_value_heads == SHAPE["num_attention_heads"]
    if family not in MISTRAL + MIXTRAL + QWEN_MOE + GEMMA:  # whose classes do not know null
        assert CONFIG_CLASSES[family](**config).num_key_value_heads == SHAPE["num_attention_heads"]


def test_no_integer_of_the_class_goes_without_a_default_or_a_refusal(tmp_path):
    for name in MINIMAL_KEYS:
        config = BASE["LlamaForCausalLM"] | {}
        del config[name]
        with pytest.raises(ValueError, match=rf"config\.json has no '{name}'"):
            read(tmp_path, config)


def test_of_two_spellings_of_rope_the_choice_is_that_of_transformers(tmp_path):
    if not IS_TRANSFORMERS_5:
        pytest.skip("transformers 4 knows one spelling")
    base = BASE["LlamaForCausalLM"]
    inner, outer = LLAMA3_ROPE | {"rope_theta": 500.0}, {"rope_type": "default", "rope_theta": 300.0}
    for config in (
        base | {"rope_scaling": inner, "rope_parameters": outer},
        base | {"rope_scaling": {}, "rope_parameters": outer},
        base | {"rope_scaling": inner, "rope_theta": 100.0},
        base | {"rope_parameters": {"rope_type": "default"}, "rope_theta": 100.0},
    ):
        known = LlamaConfig.from_dict(json.loads(json.dumps(config))).rope_parameters
        mine = read(tmp_path, config)
        assert (mine.rope.theta, mine.rope.kind) == (known["rope_theta"], known["rope_type"])


LLAMA3_ROPE_WITHOUT_ORIGINAL = {
    key: value for key, value in LLAMA3_ROPE.items() if key != "original_max_position_embeddings"
}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": None}, "architectures.*None"),
        ({"architectures": []}, r"architectures.*\[\]"),
        ({"architectures": "LlamaForCausalLM"}, "architectures.*LlamaForCausalLM"),
        ({"architectures": [1]}, r"architectures.*\[1\]"),
        ({"model_type": "mistral"}, "model_type='mistral'.*LlamaForCausalLM.*'llama'"),
        ({"vocab_size": "320"}, "vocab_size.*'320'"),
        ({"vocab_size": None}, "vocab_size.*None"),
        ({"hidden_size": 0}, "hidden_size.*0"),
        ({"hidden_size": -64}, "hidden_size.*-64"),
        ({"hidden_size": 64.0}, r"hidden_size.*64\.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers.*True"),
        ({"num_attention_heads": 2**40}, "num_attention_heads.*2147483647.*1099511627776"),
        ({"num_key_value_heads": 0}, "num_key_value_heads.*0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3.*num_attention_heads=4"),
        ({"head_dim": 31}, "head_dim.*even.*31"),
        ({"head_dim": 258}, "head_dim.*256.*258"),
        ({"head_dim": None, "hidden_size": 3}, "head_dim.*0"),
        ({"max_position_embeddings": [512]}, "max_position_embeddings.*512"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps.*'1e-6'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps.*nan"),
        ({"hidden_act": None}, "hidden_act=None"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings.*'false'"),
        ({"attention_bias": 1}, "attention_bias.*1"),
        ({"is_causal": None}, "is_causal=None"),  # transformers 5 takes it for false
        ({"sliding_window": "8"}, "sliding_window.*'8'"),
        ({"sliding_window": 0}, "sliding_window.*0"),
        ({"layer_types": "full_attention"}, "layer_types.*num_hidden_layers=2.*full_attention"),
        ({"layer_types": [1, 2]}, "layer_types.*1"),
        ({"dtype": {"": "float32"}}, "dtype.*float32"),
        ({"eos_token_id": "</s>"}, "eos_token_id.*</s>"),
        ({"eos_token_id": [1, None]}, "eos_token_id.*None"),
        ({"rope_theta": "1e4"}, "rope_theta.*'1e4'"),
        ({"rope_theta": 0}, "rope_theta.*0"),
        ({"rope_theta": None}, "rope_theta.*None"),
        ({"rope_scaling": "linear"}, "rope_scaling.*'linear'"),
        ({"rope_scaling": [1]}, r"rope_scaling.*\[1\]"),
        ({"rope_scaling": {"type": None}}, "rope_scaling.*None"),
        ({"rope_scaling": {"type": ["llama3"]}}, "rope_scaling.*llama3"),
        ({"rope_scaling": LLAMA3_ROPE | {"type": "default"}}, "rope_scaling.*'llama3' and 'default'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.*'factor'"),
        ({"rope_parameters": LLAMA3_ROPE_WITHOUT_ORIGINAL}, "rope_parameters.*original_max_position_embeddings"),
        ({"rope_parameters": LLAMA3_ROPE | {"factor": "8.0"}}, r"rope_parameters.*factor.*'8\.0'"),
        ({"rope_parameters": LLAMA3_ROPE | {"factor": None}}, "rope_parameters.*factor.*None"),
        ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "high_freq_factor.*low_freq_factor"),
        ({"rope_parameters": LLAMA3_ROPE | {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
        (
            {"rope_parameters": LLAMA3_ROPE, "original_max_position_embeddings": 128},
            "original_max_position_embeddings=128.*64",
        ),
    ],
)
def test_a_value_that_is_refused(tmp_path, changes, match):
    with pytest.raises(ValueError, match=rf"(?s){match}.*config\.json"):
        read(tmp_path, BASE["LlamaForCausalLM"] | changes)


def test_the_original_length_may_stand_outside_of_rope(tmp_path):
    outside = {"rope_parameters": LLAMA3_ROPE_WITHOUT_ORIGINAL, "original_max_position_embeddings": 64}
    base = BASE["LlamaForCausalLM"]
    assert read(tmp_path, base | outside) == read(tmp_path, base | {"rope_parameters": LLAMA3_ROPE})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"a"', b"\xff\xfe{}", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_file(tmp_path, name, text):
    read(tmp_path, BASE["LlamaForCausalLM"])
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"/{name} (is not valid JSON|must hold a JSON object)"):
        ModelConfig.from_folder(str(tmp_path))


def test_an_empty_object(tmp_path):
    with pytest.raises(ValueError, match=r"architectures.*None.*config\.json"):
        read(tmp_path, {})


def test_bad_eos_ids_of_the_generation_config(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "a"}')
    with pytest.raises(ValueError, match=r"eos_token_id.*'a'.*generation_config\.json"):
        read(tmp_path, BASE["LlamaForCausalLM"])
