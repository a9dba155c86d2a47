"""Experts whose weights are in 8 bits: what is loaded, in each layout of checkpoints, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import SHAPE, Checkpoint, random_prompt
from kernel_data import rounded
from quantized_checkpoints import DYNAMIC, TOKEN_GROUP, unpacked
from safetensors.torch import load_file, save_file
from test_gpu import cast, engine_logits, reference_logits, relative_error
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import e4m3
from nanovllm.kernels.experts import down_experts_torch, gate_up_experts_torch
from nanovllm.kernels.routing import Routing

PROMPTS = [random_prompt(seed, 5 + 20 * seed) for seed in range(3)]
NUM_TOKENS = 8
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
WIDE = SHAPE | {"hidden_size": 144}  # of two blocks, of which the second is not whole
CONFIGS = {
    # A dense layer and a sparse one. Two ranks have a block each of an expert's gates.
    "qwen3_moe": Qwen3MoeConfig(
        **WIDE,
        head_dim=32,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        norm_topk_prob=True,
        mlp_only_layers=[0],
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **SHAPE, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=40, shared_expert_intermediate_size=56
    ),
    # The ups begin within a block.
    "mixtral": MixtralConfig(
        **WIDE | {"intermediate_size": 72}, head_dim=24, num_local_experts=4, num_experts_per_tok=2
    ),
}
FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "self_attn", "mlp.gate", "model.layers.0.mlp.gate_proj"],
}
# Only experts are quantised here, so that ranks may cut all else anywhere.
FP8_CONFIG["modules_to_not_convert"] += ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
# What LLM Compressor writes.
COMPRESSED = {
    "compressed rows": unpacked("float", "channel", DYNAMIC).config,
    "compressed blocks": unpacked("float", "block", TOKEN_GROUP).config,
}
for config in COMPRESSED.values():
    config["ignore"] = ["lm_head", "re:.*self_attn", "re:.*mlp.gate$", "model.layers.0.mlp"]
HUB_NAMES = {"mlp.": "block_sparse_moe.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class Quantised:
    """A checkpoint with experts in 8 bits: its tensors in a layout, and transformers' model of their numbers."""

    def __init__(self, checkpoint: Checkpoint, path: Path, layout: str) -> None:
        self.path, self.layout = path, layout
        self.suffix = "_scale" if layout in COMPRESSED else "_scale_inv"
        path.mkdir()
        self.model = copy.deepcopy(checkpoint.model)
        self.tensors = {}
        for name, tensor in self.model.state_dict().items():
            if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
                self._quantise(name, tensor)
            else:
                self.tensors[name] = tensor
        if layout == "hub":
            self.tensors = {hub_name(name): tensor for name, tensor in self.tensors.items()}
        self.config = json.loads(Path(checkpoint.path, "config.json").read_text())
        self.config["quantization_config"] = copy.deepcopy(COMPRESSED.get(layout, FP8_CONFIG))

    def _quantise(self, name: str, weight: torch.Tensor) -> None:
        """Adds the tensors of all experts' gates and ups, or downs, [E, rows, columns], and changes the model's."""
        before, module = name.rsplit(".", 1)
        parts = ["down_proj"] if module == "down_proj" else ["gate_proj", "up_proj"]
        block = (1, weight.size(2)) if self.layout == "compressed rows" else (128, 128)
        quantised = [round_blocks(part, block) for part in weight.chunk(len(parts), dim=1)]
        weight.copy_(torch.cat([numbers for _, _, numbers in quantised], dim=1))
        if self.layout == "fused":
            self.tensors[name] = torch.cat([codes for codes, _, _ in quantised], dim=1)
            self.tensors[f"{name}_scale_inv"] = torch.cat([scales for _, scales, _ in quantised], dim=1)
            return
        for part, (codes, scales, _) in zip(parts, quantised, strict=True):
            for expert in range(len(weight)):
                self.tensors[f"{before}.{expert}.{part}.weight"] = codes[expert].clone()
                self.tensors[f"{before}.{expert}.{part}.weight{self.suffix}"] = scales[expert].clone()

    def save(self) -> None:
        save_file(self.tensors, self.path / "model.safetensors")
        (self.path / "config.json").write_text(json.dumps(self.config))


def round_blocks(numbers: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [E, N, K], scales of blocks of so many rows and columns, and the numbers that they stand for."""
    num_rows, num_columns = numbers.shape[1:]
    height, width = size
    codes = torch.empty(numbers.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(len(numbers), -(-num_rows // height), -(-num_columns // width))
    rounded = torch.empty_like(numbers)
    for i in range(scales.size(1)):
        for j in range(scales.size(2)):
            rows, columns = slice(height * i, height * i + height), slice(width * j, width * j + width)
            block = (slice(None), rows, columns)
            scale = numbers[block].abs().amax((1, 2), keepdim=True) / 448
            scales[:, i, j] = scale[:, 0, 0]
            codes[block] = (numbers[block] / scale).to(codes.dtype)
            rounded[block] = codes[block].float() * scale
    return codes, scales, rounded


def hub_name(name: str) -> str:
    """Mixtral's name of a tensor."""
    for ours, theirs in HUB_NAMES.items():
        name = name.replace(ours, theirs)
    return name


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    made = {}

    def get(family: str) -> Checkpoint:
        if family not in made:
            made[family] = Checkpoint(CONFIGS[family], tmp_path_factory.mktemp(family))
            if not any(name.endswith(".experts.gate_up_proj") for name in made[family].model.state_dict()):
                pytest.skip("this transformers fuses no experts")
        return made[family]

    return get


@torch.inference_mode()
def greedy_of(model: PreTrainedModel) -> list[list[int]]:
    """What transformers generates."""
    texts = [list(prompt) for prompt in PROMPTS]
    for ids in texts:
        for _ in range(NUM_TOKENS):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return [ids[-NUM_TOKENS:] for ids in texts]


def load(path: Path | str, **options) -> LLM:
    return LLM(str(path), device="cpu", dtype="float32", max_model_len=128, kvcache_block_size=16, **options)


def generate(path: Path | str, **options) -> list[list[int]]:
    with load(path, **options) as llm:
        results = llm.generate([list(prompt) for prompt in PROMPTS], GREEDY, use_tqdm=False)
    return [result["token_ids"] for result in results]


@pytest.mark.parametrize(
    ("family", "layout", "num_ranks"),
    [
        ("qwen3_moe", "apart", 1),
        ("qwen3_moe", "apart", 2),
        ("qwen3_moe", "fused", 1),
        ("mixtral", "hub", 1),
        ("mixtral", "fused", 1),
        ("qwen3_moe", "compressed rows", 1),
        ("qwen3_moe", "compressed blocks", 1),
        pytest.param("qwen3_moe", "compressed rows", 2, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "fused", 2, marks=pytest.mark.slow),
        pytest.param("mixtral", "apart", 1, marks=pytest.mark.slow),
    ],
)
def test_scales_of_blocks_or_rows(random_model, tmp_path, family, layout, num_ranks):
    quantised = Quantised(random_model(family), tmp_path / "quantised", layout)
    quantised.save()
    assert generate(quantised.path, tensor_parallel_size=num_ranks) == greedy_of(quantised.model)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), [("qwen3_moe", "apart"), ("mixtral", "hub")])
def test_transformers_reads_the_same_numbers(tmp_path, family, layout):
    """Of whole blocks; of others it takes the scales for those of equal parts."""
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("this transformers reads them on a GPU only")
    config = copy.deepcopy(CONFIGS[family])
    config.hidden_size, config.intermediate_size = 256, 128
    quantised = Quantised(Checkpoint(config, tmp_path / "plain"), tmp_path / "quantised", layout)
    quantised.save()
    as_numbers = transformers.FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(quantised.path, dtype=torch.float32, quantization_config=as_numbers)
    own = dict(quantised.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, own[name], rtol=1e-6, atol=1e-7)
    assert generate(quantised.path) == greedy_of(quantised.model)


@pytest.mark.parametrize(
    ("family", "is_fused", "num_ranks"),
    [
        ("qwen3_moe", False, 1),
        ("qwen3_moe", True, 2),
        ("qwen2_moe", False, 1),
        pytest.param("mixtral", True, 1, marks=pytest.mark.slow),
    ],
)
def test_plain_experts_that_are_rounded(random_model, tmp_path, family, is_fused, num_ranks):
    """Results do not depend on the layout, nor on the ranks."""
    checkpoint = random_model(family)
    model, path = copy.deepcopy(checkpoint.model), checkpoint.path
    if is_fused:
        path = tmp_path
        save_file(model.state_dict(), path / "model.safetensors")
        (path / "config.json").write_bytes(Path(checkpoint.path, "config.json").read_bytes())
    for name, parameter in model.named_parameters():
        if "_proj" in name and parameter.dim() > 1:  # routers, the head and biases stay as they are
            rows = parameter.data.flatten(0, -2)
            parameter.data = rounded(rows, rows.size(1)).view_as(parameter)
    assert generate(path, quantization="fp8", tensor_parallel_size=num_ranks) == greedy_of(model)


@pytest.mark.parametrize("layout", ["apart", "fused"])
def test_a_missing_tensor(random_model, tmp_path, layout):
    quantised = Quantised(random_model("qwen3_moe"), tmp_path / "quantised", layout)
    name = f"model.layers.1.mlp.experts.{'3.up_proj.weight' if layout == 'apart' else 'down_proj'}_scale_inv"
    # A tensor of all experts that is not there is asked for expert by expert.
    missing = name if layout == "apart" else "model.layers.1.mlp.experts.0.down_proj.weight_scale_inv"
    scales = quantised.tensors.pop(name)
    quantised.save()
    with pytest.raises(ValueError, match=f"lacks the tensor '{re.escape(missing)}'"):
        load(quantised.path)
    quantised.tensors[name] = scales[..., :-1].contiguous()
    quantised.save()
    with pytest.raises(ValueError, match=f"'{name}' has shape"):
        load(quantised.path)


def test_plain_experts_where_codes_should_be(random_model, tmp_path):
    quantised = Quantised(random_model("qwen3_moe"), tmp_path / "quantised", "apart")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    quantised.tensors[name] = quantised.tensors[name].float()
    quantised.save()
    with pytest.raises(ValueError, match=f"'{name}' has dtype F32, the model needs F8_E4M3"):
        load(quantised.path)


def test_plain_experts_of_a_quantised_checkpoint(random_model, tmp_path):
    """They are listed among what is not quantised: as a whole."""
    quantised = Quantised(random_model("qwen3_moe"), tmp_path / "quantised", "fused")
    quantised.tensors = load_file(f"{random_model('qwen3_moe').path}/model.safetensors")
    quantised.config["quantization_config"]["modules_to_not_convert"] += ["mlp.experts"]
    quantised.save()
    assert generate(quantised.path) == greedy_of(random_model("qwen3_moe").model)


def test_other_schemes_are_refused(random_model, tmp_path):
    quantised = Quantised(random_model("qwen3_moe"), tmp_path / "quantised", "apart")
    del quantised.config["quantization_config"]["weight_block_size"]
    quantised.save()
    match = r"experts that are quantised by Scaled\(.*\) are not supported"
    with pytest.raises(ValueError, match=match):
        load(quantised.path)
    weights_alone = unpacked("float", "block", None).config
    for config, scheme in ((unpacked("int", "channel", DYNAMIC).config, "Scaled"), (weights_alone, "Fp8Blocks")):
        quantised.config["quantization_config"] = config
        quantised.save()
        with pytest.raises(ValueError, match=rf"experts that are quantised by {scheme}\(.*\) are not supported"):
            load(quantised.path)


def test_ranks_that_would_cut_a_block(random_model, tmp_path):
    quantised = Quantised(random_model("mixtral"), tmp_path / "quantised", "apart")
    quantised.save()
    match = "tensor_parallel_size=2 would cut a block of 128: a rank's part of gate_up_proj .* ends at 36 of 72"
    with pytest.raises(ValueError, match=match):
        load(quantised.path, tensor_parallel_size=2)


def test_a_gpu_without_8_bits(monkeypatch, random_model):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(e4m3, "has_e4m3", lambda device: False)
    match = r"experts in FP8 needs a GPU of compute capability 8\.9 or later, this one has 8\.0"
    with pytest.raises(ValueError, match=match):
        load(random_model("qwen3_moe").path, quantization="fp8")


def test_dummy_weights(random_model, tmp_path):
    """Of neither kind is anything read but config.json."""
    quantised = Quantised(random_model("qwen3_moe"), tmp_path / "quantised", "apart")
    quantised.save()
    for path, options in ((quantised.path, {}), (random_model("qwen3_moe").path, {"quantization": "fp8"})):
        with load(path, load_format="dummy", **options) as llm:
            experts = llm.ranks.runner.model.model.layers[1].mlp.experts
            std = experts.down_proj.dequantize(torch.float32).std().item()
            assert 0.015 < std < 0.025


def round_inputs(model: PreTrainedModel) -> None:
    """Has transformers' experts round what they multiply, as the plain statement beside the kernels does."""

    def forward(self: torch.nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        routing = Routing(weights.float(), index, torch.zeros(1), order=None)
        h = gate_up_experts_torch(rounded(x, 128), self.gate_up_proj.data, routing)
        return down_experts_torch(rounded(h, 128), self.down_proj.data, routing)

    for module in model.modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
            module.forward = forward.__get__(module)


@pytest.mark.gpu
@pytest.mark.parametrize("num_prompts", [1, 3, 32])
@pytest.mark.parametrize(("family", "layout"), [("qwen3_moe", "apart"), ("mixtral", "hub")])
def test_logits_on_a_gpu(random_model, tmp_path, family, layout, num_prompts):
    """In bf16, against float32: errors at most 1.2 times those of the plain statement, with the same numbers."""
    checkpoint = copy.copy(random_model(family))
    checkpoint.model = copy.deepcopy(checkpoint.model)
    for parameter in checkpoint.model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 0.5  # so that errors do not grow from layer to layer
        parameter.data = parameter.data.bfloat16().float()  # of which nothing is lost in bf16
    quantised = Quantised(checkpoint, tmp_path / "quantised", layout)
    quantised.save()
    prompts = [random_prompt(seed, 200) for seed in range(num_prompts)]
    logits, generated = engine_logits(str(quantised.path), prompts, num_kvcache_blocks=64)
    ids = torch.cat([torch.tensor(prompts, device="cuda"), generated], dim=1)
    model = quantised.model.cuda()
    reference = reference_logits(model, ids)
    round_inputs(model)
    error = relative_error(reference_logits(cast(model, torch.bfloat16), ids), reference)
    assert 1e-4 < error < 0.2
    assert relative_error(logits, reference) <= 1.2 * error
