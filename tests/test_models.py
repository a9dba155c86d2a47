"""What is particular to Gemma: its parts, and what is read of its models that take images too."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import Checkpoint, random_prompt
from engines import engine, generate
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Gemma3Config, Gemma3ForConditionalGeneration

from nanovllm import SamplingParams
from nanovllm.checkpoint.model_config import ModelConfig
from nanovllm.checkpoint.rope import Rope
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.models.gemma2 import Gemma2RMSNorm

PROMPTS = [random_prompt(21, 60), random_prompt(22, 9)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# How checkpoints call the tensors: what they put before those of the text model, its head and the others.
LAYOUTS = {
    "hub": ("language_model.model.", "language_model.lm_head.", ""),
    "transformers 5": ("model.language_model.", "lm_head.", "model."),
}


def expected(checkpoint: Checkpoint) -> list[list[int]]:
    """What transformers generates with the text model."""
    return [checkpoint.greedy(prompt, 12, True)[0] for prompt in PROMPTS]


def answers(path: Path) -> list[list[int]]:
    with engine(str(path)) as llm:
        return [result["token_ids"] for result in generate(llm, PROMPTS, GREEDY)]


def write(folder: Path, checkpoint: Checkpoint, layout: str, is_tied: bool) -> dict[str, torch.Tensor]:
    """The checkpoint as the text part of one that takes images, of whose other tensors there are a few."""
    text, head, others = LAYOUTS[layout]
    source = Path(checkpoint.path)
    tensors = load_file(source / "model.safetensors")
    tensors = {text + name.removeprefix("model."): tensor.clone() for name, tensor in tensors.items()}
    if not is_tied:
        tensors[f"{head}weight"] = tensors[f"{text}embed_tokens.weight"].clone()
    for name in ("vision_tower.vision_model.post_layernorm.weight", "multi_modal_projector.mm_soft_emb_norm.weight"):
        tensors[others + name] = torch.randn(3)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": VISION}
    outer |= {"text_config": config, "tie_word_embeddings": is_tied, "eos_token_id": [1, 5]}
    (folder / "config.json").write_text(json.dumps(outer))
    return tensors


@pytest.mark.parametrize("overrides", [{"sliding_window": 8}, {"text_config": {"sliding_window": 8}}])
def test_overrides_reach_the_text(checkpoint, tmp_path, overrides):
    """And leave the rest of it as it is."""
    write(tmp_path, checkpoint("gemma3"), "hub", True)
    before = ModelConfig.from_folder(str(tmp_path))
    after = ModelConfig.from_folder(str(tmp_path), overrides)
    windows = tuple(window and 8 for window in before.layer_windows)
    assert after == dataclasses.replace(before, layer_windows=windows) != before


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_gemma3(checkpoint, tmp_path, layout, is_tied):
    write(tmp_path, checkpoint("gemma3"), layout, is_tied)
    assert answers(tmp_path) == expected(checkpoint("gemma3"))


@pytest.mark.parametrize("name", ["vision.weight", "model.vision_towers.weight", "lm_head.bias"])
def test_a_tensor_that_is_neither_of_text_nor_of_images(checkpoint, tmp_path, name):
    tensors = write(tmp_path, checkpoint("gemma3"), "hub", True)
    save_file(tensors | {name: torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"unexpected tensor '{name}'"):
        engine(str(tmp_path))


def test_what_transformers_saves_of_gemma3(checkpoint, tmp_path):
    """And its answers are those of the text model alone."""
    text = checkpoint("gemma3")
    config = Gemma3Config(
        text_config=AutoConfig.from_pretrained(text.path).to_dict(),
        vision_config=VISION | {"model_type": "siglip_vision_model"},
        mm_tokens_per_image=1,
    )
    model = Gemma3ForConditionalGeneration(config).float().eval()
    model.get_decoder().load_state_dict(text.model.model.state_dict())
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        ids = torch.tensor([PROMPTS[0]])
        assert torch.equal(model(ids).logits.argmax(-1), text.model(ids).logits.argmax(-1))
    assert answers(tmp_path) == expected(text)


def test_a_config_that_leaves_most_to_defaults(tmp_path):
    """As that of Gemma 3 4B."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    raw |= {"eos_token_id": [1, 106], "torch_dtype": "bfloat16", "vision_config": VISION}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    c = ModelConfig.from_folder(str(tmp_path))
    assert (c.vocab_size, c.hidden_size, c.num_attention_heads, c.num_key_value_heads) == (262208, 2560, 8, 4)
    assert (c.head_dim, c.attention_scale, c.max_position_embeddings) == (256, 1 / 16, 131072)
    assert c.layer_windows == tuple(None if layer % 6 == 5 else 1024 for layer in range(34))
    assert c.local_rope == Rope("default", 10000.0)
    assert (c.rope.kind, c.rope.factor, c.rope.theta) == ("linear", 8.0, 1e6)
    assert c.tie_word_embeddings and c.dtype == "bfloat16" and c.eos_token_ids == {1, 106}
    known = Gemma3Config.from_dict(raw).text_config
    for name in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        assert getattr(c, name) == getattr(known, name), name


@pytest.mark.parametrize("text", [None, [], "gemma3"])
def test_a_config_without_text(tmp_path, text):
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"text_config must be an object"):
        ModelConfig.from_folder(str(tmp_path))


def rank(number: int, size: int, dtype: torch.dtype) -> SimpleNamespace:
    """A rank that has parameters."""

    def parameter(*shape, dtype=dtype):
        return torch.nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)

    return SimpleNamespace(rank=number, size=size, dtype=dtype, parameter=parameter)


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 72**0.5), ("bfloat16", 8.5)])
def test_scaled_embeddings(checkpoint, dtype, scale):
    """Gemma's are multiplied by a number of the model's dtype: 8.5 in place of 8.4853."""
    options = {"dtype": dtype, "load_format": "dummy", "hf_overrides": {"hidden_size": 72}}
    with engine(checkpoint("gemma2").path, **options) as llm:
        embedding = llm.ranks.runner.model.model.embed_tokens
        x = embedding(torch.tensor([5]))[0]
        torch.testing.assert_close(x, embedding.weight[5] * torch.tensor(scale, dtype=x.dtype))


def test_logits_with_a_soft_cap_beyond_the_vocabulary():
    """The last of three ranks has 2 of 10 columns, in the place of 4."""
    head = ParallelLMHead(10, 1, rank(2, 3, torch.float32), None, soft_cap=2.0)
    head.weight.data.copy_(torch.tensor([[1.0], [-100.0]]))
    logits = head(torch.ones(1, 1))
    assert logits[0, 0] == pytest.approx(2 * math.tanh(0.5)) and logits[0, 1:].tolist() == [-2, -math.inf, -math.inf]


def test_logprobs_under_a_soft_cap_of_logits(checkpoint):
    """No greedy token changes by it, but how likely each is does."""
    checkpoint = checkpoint("gemma2")
    with torch.inference_mode():
        want = checkpoint.model(torch.tensor([PROMPTS[0]])).logits[0, -1].log_softmax(-1)
    with engine(checkpoint.path) as llm:
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=20)
        logprobs = generate(llm, PROMPTS[:1], params)[0].outputs[0].logprobs[0]
    assert len(logprobs) == 20
    for token_id, logprob in logprobs.items():
        assert logprob.logprob == pytest.approx(want[token_id].item(), abs=1e-4)


def test_norms_keep_the_bits_of_their_weights(checkpoint, tmp_path):
    """1 + weight in float32, of a model in bfloat16."""
    tensors = write(tmp_path, checkpoint("gemma3"), "hub", True)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with engine(str(tmp_path), dtype="bfloat16") as llm:
        model = llm.ranks.runner.model.model
        norms = {name: module for name, module in model.named_modules() if isinstance(module, Gemma2RMSNorm)}
        assert len(norms) == 4 * 6 + 1
        for name, norm in norms.items():
            assert torch.equal(norm.weight, 1 + tensors[f"language_model.model.{name}.weight"].float())
        assert model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
        assert len(generate(llm, PROMPTS, GREEDY)[0]["token_ids"]) == 12
