"""quantization_config: what is read of it, what is refused, and which matrices it means."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from quantized_checkpoints import DYNAMIC, FORMATS

from nanovllm.models.gemma3 import Gemma3ForConditionalGeneration
from nanovllm.models.mixtral import MixtralForCausalLM
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.quantization import read_method, schemes_of


def changed(name: str, path: str, value: Any) -> dict[str, Any]:
    """The configuration of a format with another value, at a path of keys."""
    config = copy.deepcopy(FORMATS[name].config)
    *before, key = path.split("/")
    place = config
    for part in before:
        place = place[part]
    place[key] = value
    return config


GROUP = "config_groups/group_0"
WEIGHTS, INPUTS = f"{GROUP}/weights", f"{GROUP}/input_activations"
REFUSED = [  # format, path, value, what the message has beside the last key
    ("awq_32", "version", "gemv", "gemv.*'gemm'"),
    ("awq_32", "version", "marlin", "marlin"),
    ("awq_32", "version", "exllama", "exllama"),
    ("awq_32", "bits", 8, "=8.*only 4"),
    ("awq_32", "bits", True, "=True"),
    ("awq_32", "group_size", 48, "=48.*32 or 64 or 128 or -1"),
    ("awq_32", "zero_point", "yes", "'yes'"),
    ("awq_32", "modules_to_not_convert", "lm_head", "list of names"),
    ("gptq_4", "bits", 3, "=3.*only 4 or 8"),
    ("gptq_4", "bits", None, "=None"),
    ("gptq_4", "group_size", 1024, "=1024"),
    ("gptq_4", "lm_head", True, "=true"),
    ("gptq_4", "dynamic", {"-:.*down": {}}, "down.*rules"),
    ("gptq_4", "checkpoint_format", "marlin", "marlin.*'gptq' or 'gptq_v2'"),
    ("gptq_4", "is_marlin_format", True, "true"),
    ("gptq_4", "pack_dtype", "int16", "int16"),
    ("gptq_4", "desc_act", 1, "true or false"),
    ("gptq_4", "modules_in_block_to_quantize", [[1]], "list of names"),
    ("gptq_4", "modules_in_block_to_quantize", [1], "list of lists"),
    ("packed_4", "quantization_status", "calibration", "'calibration'"),
    ("packed_4", "format", "marlin-24", "marlin-24"),
    ("packed_4", "format", "mixed-precision", "=None.*group_0 of config_groups of quantization_config of /model"),
    ("packed_4", "format", "nvfp4-pack-quantized", "nvfp4"),
    ("packed_4", "sparsity_config", {"format": "sparse-24-bitmask"}, "sparse-24-bitmask"),
    ("packed_4", "transform_config", {"config_groups": {"u": {}}}, "config_groups"),
    ("packed_4", "config_groups", None, "must be an object"),
    ("packed_4", "ignore", ["re:("], "regular expression"),
    ("packed_4", GROUP, [], "must be an object"),
    ("packed_4", f"{GROUP}/targets", "Linear", "list of names"),
    ("packed_4", f"{GROUP}/output_activations", DYNAMIC, "num_bits"),
    ("packed_4", INPUTS, DYNAMIC, "pack-quantized"),
    ("packed_4", WEIGHTS, None, "must be an object"),
    ("packed_4", f"{WEIGHTS}/num_bits", 2, "=2.*only 4 or 8"),
    ("packed_4", f"{WEIGHTS}/type", "float", "'float'"),
    ("packed_4", f"{WEIGHTS}/strategy", "tensor_group", "tensor_group"),
    ("packed_4", f"{WEIGHTS}/group_size", 16, "=16"),
    ("packed_4", f"{WEIGHTS}/actorder", "other", "other"),
    ("packed_4", f"{WEIGHTS}/dynamic", True, "True"),
    ("float_rows", "format", "int-quantized", None),
    ("float_rows", f"{WEIGHTS}/num_bits", 4, "=4"),
    ("float_rows", f"{WEIGHTS}/symmetric", False, "False"),
    ("float_rows", f"{WEIGHTS}/strategy", "group", "group"),
    ("float_rows", f"{INPUTS}/type", "int", "'int'"),
    ("float_rows", f"{INPUTS}/strategy", "tensor", "tensor"),
    ("float_tensor", f"{INPUTS}/strategy", "token", "token"),
    ("int8_rows", f"{INPUTS}/symmetric", False, "False"),
    ("int8_rows", f"{INPUTS}/num_bits", 4, "=4"),
    ("float_blocks", f"{WEIGHTS}/block_structure", [64, 64], r"\[64, 64\].*\[128, 128\]"),
    ("float_blocks", f"{INPUTS}/group_size", 64, "=64"),
]


@pytest.mark.parametrize(("name", "path", "value", "match"), REFUSED)
def test_a_configuration_that_is_not_supported(name, path, value, match):
    with pytest.raises(ValueError, match=f"{path.split('/')[-1]}.*{match}" if match else "type=.*of /model/config"):
        read_method(None, changed(name, path, value), "/model/config.json")


@pytest.mark.parametrize("method", ["bitsandbytes", "mxfp4", "modelopt", "nvfp4", "x", None, 4])
def test_a_method_that_is_not_supported(method):
    with pytest.raises(ValueError, match=f"quant_method={method!r} is not supported, only fp8, awq, gptq, comp"):
        read_method(None, {"quant_method": method}, "config.json")


@pytest.mark.parametrize(
    ("name", "option", "is_right"),
    [
        ("awq_32", "awq", True),
        ("awq_32", "awq_marlin", True),
        ("awq_32", "gptq_marlin", False),
        ("gptq_4", "gptq", True),
        ("gptq_4", "gptq_marlin", True),
        ("gptq_4", "fp8", False),
        ("packed_4", "compressed-tensors", True),
        ("packed_4", "awq", False),
    ],
)
def test_the_option_quantization(name, option, is_right):
    if is_right:
        assert read_method(option, FORMATS[name].config, "config.json").scheme_of(["model.layers.0.mlp.up_proj"])
    else:
        with pytest.raises(ValueError, match=f"quantization='{option}' contradicts quant_method"):
            read_method(option, FORMATS[name].config, "config.json")


def test_spellings_of_awq():
    """AutoAWQ's own file calls them otherwise than transformers."""
    own = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    of_transformers = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}
    schemes = [read_method(None, config, "").scheme_of(["a"]) for config in (own, of_transformers)]
    assert schemes[0] == schemes[1] and schemes[0].group_size == 64
    with pytest.raises(ValueError, match="w_bit=3"):
        read_method(None, own | {"w_bit": 3}, "")


def is_quantized(model: type[Qwen3ForCausalLM], config: dict[str, Any], name: str) -> bool:
    return schemes_of(model, read_method(None, config, "config.json"))(name) is not None


@pytest.mark.parametrize(
    ("model", "listed", "module"),
    [
        (Qwen3ForCausalLM, ["model.layers.1.mlp.down_proj"], "mlp.down_proj"),
        (Qwen3ForCausalLM, ["self_attn.q_proj", "k_proj", "re:.*v_proj$"], "self_attn.qkv_proj"),
        (Qwen3ForCausalLM, ["model.layers.1."], "mlp.gate_up_proj"),
        (Qwen3ForCausalLM, ["model.layers.1.mlp.gate_up_proj"], "mlp.gate_up_proj"),
        (Gemma3ForConditionalGeneration, ["language_model.model.layers.1.mlp.down_proj"], "mlp.down_proj"),
        (Gemma3ForConditionalGeneration, ["re:model.language_model.layers.1.mlp"], "mlp.gate_up_proj"),
        (Gemma3ForConditionalGeneration, ["model.language_model.layers.1.self_attn"], "self_attn.o_proj"),
        (MixtralForCausalLM, ["model.layers.1.block_sparse_moe.w2"], "mlp.down_proj"),
    ],
)
def test_names_of_plain_matrices(model, listed, module):
    """They may be of any of the model's layouts, and of the matrices that a layer fuses or of what they are then."""
    for name, key in (("awq_32", "modules_to_not_convert"), ("packed_4", "ignore"), ("fp8_blocks", "ignored_layers")):
        config = FORMATS[name].config | {key: listed}
        assert not is_quantized(model, config, f"model.layers.1.{module}")
        assert is_quantized(model, config, "model.layers.11.mlp.other")


def test_a_layer_that_is_quantised_in_part():
    config = FORMATS["awq_32"].config | {"modules_to_not_convert": ["k_proj"]}
    with pytest.raises(ValueError, match=r"qkv_proj must be quantised as a whole: k_proj"):
        is_quantized(Qwen3ForCausalLM, config, "model.layers.0.self_attn.qkv_proj")


def test_modules_that_gptq_names():
    config = FORMATS["gptq_4"].config | {
        "modules_in_block_to_quantize": [["mlp.down_proj"], ["mlp.up_proj", "gate_proj"]]
    }
    modules = {"mlp.down_proj": True, "mlp.gate_up_proj": True, "self_attn.o_proj": False, "self_attn.qkv_proj": False}
    for module, is_listed in modules.items():
        assert is_quantized(Qwen3ForCausalLM, config, f"model.layers.0.{module}") == is_listed


def test_groups_of_compressed_tensors():
    """A target that names a matrix counts before "Linear", whichever is first; what no target means is plain."""
    config = copy.deepcopy(FORMATS["packed_4"].config) | {"format": "mixed-precision"}
    four_bits, floats = config["config_groups"]["group_0"], FORMATS["float_rows"].config["config_groups"]["group_0"]
    config["config_groups"] = {
        "a": four_bits | {"format": "pack-quantized"},
        "b": floats | {"format": "float-quantized", "targets": ["re:.*down_proj", "model.layers.1.self_attn.o_proj"]},
    }
    scheme_of = schemes_of(Qwen3ForCausalLM, read_method(None, config, ""))
    floats_scheme = scheme_of("model.layers.0.mlp.down_proj")
    assert floats_scheme == scheme_of("model.layers.1.self_attn.o_proj")
    assert (
        floats_scheme != scheme_of("model.layers.0.self_attn.o_proj") == scheme_of("model.layers.1.mlp.gate_up_proj")
    )
    del config["config_groups"]["a"]
    assert schemes_of(Qwen3ForCausalLM, read_method(None, config, ""))("model.layers.0.self_attn.o_proj") is None
