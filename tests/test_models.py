"""Models of more than text: what computes text is read, in every layout of checkpoints, and the rest passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import Checkpoint, random_prompt
from engines import engine, generate
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Gemma3Config, Gemma3ForConditionalGeneration

from nanovllm import SamplingParams

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
