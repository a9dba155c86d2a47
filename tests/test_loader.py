"""Checkpoints: what is read, what is refused and how the refusal says why."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import MAX_POSITIONS, SHAPE, Checkpoint, random_prompt
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from nanovllm import LLM, SamplingParams
from nanovllm.checkpoint import loader
from nanovllm.checkpoint.model_config import ModelConfig
from nanovllm.kernels.cpu_products import multiplies_bfloat16
from nanovllm.layers.rotary_embedding import inverse_frequencies

PROMPT = random_prompt(1, 20)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


class Folder:
    """A copy of a checkpoint that a test may damage."""

    def __init__(self, source: str, path: Path) -> None:
        shutil.copytree(source, path)
        self.path = path
        self.file = path / "model.safetensors"
        # Copies, as older safetensors maps the file, which `save` overwrites.
        self.tensors = {name: tensor.clone() for name, tensor in load_file(self.file).items()}
        self.config = json.loads((path / "config.json").read_text())

    def save(self) -> None:
        save_file(self.tensors, self.file)

    def save_config(self) -> None:
        (self.path / "config.json").write_text(json.dumps(self.config))

    def load(self, **options) -> LLM:
        options = {"max_model_len": 128} | options
        return LLM(str(self.path), device="cpu", kvcache_block_size=16, **options)

    def greedy(self, **options) -> list[int]:
        with self.load(**options) as llm:
            return llm.generate(list(PROMPT), GREEDY, use_tqdm=False)[0]["token_ids"]

    def refused(self, match: str, error: type[Exception] = ValueError, **options) -> None:
        with pytest.raises(error, match=match):
            self.load(**options)

    def save_shards(self, shards: dict[str, dict[str, torch.Tensor]], weight_map: dict[str, str]) -> None:
        """Files in place of model.safetensors, and an index of them."""
        self.file.unlink()
        for file, tensors in shards.items():
            save_file(tensors, self.path / file)
        self.save_index({"metadata": {}, "weight_map": weight_map})

    def save_index(self, index: object) -> None:
        text = index if isinstance(index, str) else json.dumps(index)
        (self.path / "model.safetensors.index.json").write_text(text)


@pytest.fixture
def folder(checkpoint, tmp_path):
    return lambda family: Folder(checkpoint(family).path, tmp_path / family)


def expected(checkpoint, family: str) -> list[int]:
    return checkpoint(family).greedy(PROMPT, 12, True)[0]


@torch.inference_mode()
def greedy_of(model: PreTrainedModel) -> list[int]:
    """What `expected` gives, of any model."""
    ids = list(PROMPT)
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


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


def test_model_safetensors_counts_alone(checkpoint, folder):
    """Not an adapter, a copy in another layout or with other values, an old index or the shards it names."""
    qwen3 = folder("qwen3")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in qwen3.tensors.items()}
    save_file({"base_model.model.lora_A.weight": torch.ones(2, 2)}, qwen3.path / "adapter_model.safetensors")
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, qwen3.path / "consolidated.safetensors")
    save_file(zeros, qwen3.path / "model (copy).safetensors")
    save_file(zeros, qwen3.path / "model-00001-of-00001.safetensors")
    qwen3.save_index({"weight_map": dict.fromkeys(zeros, "model-00001-of-00001.safetensors")})
    (qwen3.path / "broken.safetensors").write_bytes(b"")
    assert qwen3.greedy() == expected(checkpoint, "qwen3")


def test_a_tensor_counts_where_the_index_assigns_it(checkpoint, folder):
    """Each of two shards holds all names, the half that is not assigned to it with other values."""
    llama = folder("llama")
    files = ("a.safetensors", "b.safetensors")
    weight_map = {name: files[i % 2] for i, name in enumerate(sorted(llama.tensors))}
    shards = {
        file: {
            name: tensor if weight_map[name] == file else torch.zeros_like(tensor)
            for name, tensor in llama.tensors.items()
        }
        for file in files
    }
    shards["a.safetensors"]["left_over"] = torch.ones(2)
    llama.save_shards(shards, weight_map)
    assert llama.greedy() == expected(checkpoint, "llama")


def test_a_shard_lacks_what_the_index_assigns_to_it(folder):
    llama = folder("llama")
    half = sorted(llama.tensors)[::2]
    name = sorted(llama.tensors)[11]
    rest = {other: tensor for other, tensor in llama.tensors.items() if other not in half}
    shards = {"a.safetensors": {other: llama.tensors[other] for other in half}, "b.safetensors": rest}
    weight_map = {other: file for file, tensors in shards.items() for other in tensors}
    llama.save_shards(shards, weight_map | {name: "a.safetensors"})
    llama.refused(rf"index\.json assigns.*{name}.*to a\.safetensors")


def test_an_index_that_leaves_a_tensor_out(folder):
    """It is missing, though a file holds it."""
    llama = folder("llama")
    weight_map = dict.fromkeys(llama.tensors, "a.safetensors")
    del weight_map["model.norm.weight"]
    llama.save_shards({"a.safetensors": llama.tensors}, weight_map)
    llama.refused(r"lacks the tensor 'model\.norm\.weight'")


@pytest.mark.parametrize(
    "index",
    ["", "{", "[]", {}, {"weight_map": None}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}],
)
def test_an_index_without_a_usable_weight_map(folder, index):
    llama = folder("llama")
    llama.save_shards({"a.safetensors": llama.tensors}, {})
    llama.save_index(index)
    llama.refused(r"model\.safetensors\.index\.json")


def test_two_files_with_one_tensor(checkpoint, folder):
    llama = folder("llama")
    llama.file.rename(llama.path / "part-1.safetensors")
    (llama.path / "._part-1.safetensors").write_bytes(b"what macOS leaves")
    (llama.path / "folder.safetensors").mkdir()
    assert llama.greedy() == expected(checkpoint, "llama")
    save_file({"model.norm.weight": llama.tensors["model.norm.weight"]}, llama.path / "part-2.safetensors")
    llama.refused(r"model\.norm\.weight.*part-1\.safetensors and in part-2\.safetensors")


def link_folder(source: Path, tmp_path: Path) -> str:
    (tmp_path / "link").symlink_to(source)
    return str(tmp_path / "link")


def link_files(source: Path, tmp_path: Path) -> str:
    """As in the hub's cache: the snapshot links to files that are named by their hashes."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(source.iterdir()):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    return str(snapshot)


def rename(name: str):
    return lambda source, tmp_path: str(source.rename(tmp_path / name))


@pytest.mark.parametrize("has_index", [False, True])
@pytest.mark.parametrize(
    "place",
    [
        *map(rename, ["model[v1]", "[a-z]*?", "a b", "~tilde", "#%{}$HOME'"]),
        link_folder,
        link_files,
        lambda source, tmp_path: f"{source}/",
        lambda source, tmp_path: f"{source}//.",
        lambda source, tmp_path: source.name,
        lambda source, tmp_path: f"./{source.name}/",
        lambda source, tmp_path: f"~/{source.name}",
        lambda source, tmp_path: source,
        lambda source, tmp_path: Path("~") / source.name,
    ],
)
def test_names_of_folders(checkpoint, folder, monkeypatch, tmp_path, place, has_index):
    """Characters that globbing or a shell would take for others, links, relative paths, ~ and Path objects."""
    llama = folder("llama")
    if has_index:
        llama.save_shards({"[a].safetensors": llama.tensors}, dict.fromkeys(llama.tensors, "[a].safetensors"))
    else:
        llama.file.rename(llama.path / "[a].safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with LLM(place(llama.path, tmp_path), device="cpu", kvcache_block_size=16, max_model_len=128) as llm:
        result = llm.generate(list(PROMPT), GREEDY, use_tqdm=False)[0]
    assert result["token_ids"] == expected(checkpoint, "llama")


@pytest.mark.parametrize("model", ["", None, 1, b"folder", ["folder"]])
def test_what_is_no_name_of_a_folder(model):
    with pytest.raises(TypeError, match="model must be a folder or a hub name"):
        LLM(model)


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


def test_a_clone_without_git_lfs(folder):
    qwen3, pointer = folder("qwen3"), "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
    qwen3.file.write_text(pointer)
    qwen3.refused(r"model\.safetensors cannot be read .*git lfs pull")
    (qwen3.path / "tokenizer.json").write_text(pointer)
    qwen3.refused(r"tokenizer\.json cannot be read .*git lfs pull")


def test_no_safetensors(folder):
    qwen3 = folder("qwen3")
    qwen3.file.rename(qwen3.path / "pytorch_model.bin")
    qwen3.refused("no safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.layers.1.self_attn.rotary_emb.sin_cached",
        "model.layers.0.self_attn.masked_bias",
        "model.layers.0.self_attn.bias",
        "model.layers.0.attn.bias",
        "model.layers.0.self_attn.attn.bias",
    ],
)
def test_buffers_of_old_checkpoints(checkpoint, folder, name):
    """They are passed over, with an index too."""
    mistral = folder("mistral")
    mistral.tensors[name] = torch.full((3, 5), torch.nan)
    mistral.save()
    assert mistral.greedy() == expected(checkpoint, "mistral")
    mistral.save_shards({"a.safetensors": mistral.tensors}, dict.fromkeys(mistral.tensors, "a.safetensors"))
    assert mistral.greedy() == expected(checkpoint, "mistral")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.inv_freq",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.attn.c_attn.bias",
        "model.layers.0.self_attn.not_masked_bias",
        "model.layers.2.self_attn.q_proj.weight",
        "lm_head.bias",
        "model.lm_head.weight",
    ],
)
def test_other_tensors_that_the_model_has_not(folder, name):
    mistral = folder("mistral")
    mistral.tensors[name] = torch.zeros(4)
    mistral.save()
    mistral.refused(f"has the unexpected tensor '{name}'")


def test_names_with_a_prefix(folder):
    """The message has a name that is there beside the one that is not."""
    mistral = folder("mistral")
    mistral.tensors = {f"_orig_mod.{name}": tensor for name, tensor in mistral.tensors.items()}
    mistral.save()
    mistral.refused(r"lacks the tensor 'lm_head\.weight' .* has the unexpected tensor '_orig_mod\.lm_head\.weight'")


def test_a_copy_of_the_embedding_as_the_tied_head(checkpoint, folder):
    qwen3 = folder("qwen3")
    qwen3.tensors["lm_head.weight"] = qwen3.tensors["model.embed_tokens.weight"].clone()
    qwen3.save()
    assert qwen3.greedy() == expected(checkpoint, "qwen3")


def test_an_embedding_that_has_the_name_of_the_tied_head(checkpoint, folder):
    """As safetensors' save_model leaves it, which keeps the first of two names; transformers reads it."""
    qwen3 = folder("qwen3")
    qwen3.tensors["lm_head.weight"] = qwen3.tensors.pop("model.embed_tokens.weight")
    qwen3.save()
    assert qwen3.greedy() == expected(checkpoint, "qwen3")


def test_a_tied_head_that_is_another(folder, monkeypatch):
    """transformers 5 uses both, so the tied one must not be used in silence."""
    qwen3 = folder("qwen3")
    embedding = qwen3.tensors["model.embed_tokens.weight"]
    match = r"'lm_head\.weight' that differs from 'model\.embed_tokens\.weight'.*tie_word_embeddings"
    monkeypatch.setattr(loader, "ROWS_AT_ONCE", 100)
    for row in (0, 150, len(embedding) - 1):
        head = embedding.clone()
        head[row, -1] += 1
        qwen3.tensors["lm_head.weight"] = head
        qwen3.save()
        qwen3.refused(match)
    if int(transformers.__version__.split(".")[0]) >= 5:
        model = AutoModelForCausalLM.from_pretrained(qwen3.path)
        assert torch.equal(model.lm_head.weight, head) and torch.equal(model.model.embed_tokens.weight, embedding)
    qwen3.tensors["lm_head.weight"] = embedding[:-1].clone()
    qwen3.save()
    qwen3.refused(match)


def test_the_remedy_for_a_tied_head_that_is_another(folder, tmp_path):
    qwen3 = folder("qwen3")
    head = qwen3.tensors["model.embed_tokens.weight"].flip(0).contiguous()
    qwen3.tensors["lm_head.weight"] = head
    save_file(qwen3.tensors, qwen3.file, metadata={"format": "pt"})
    qwen3.config["tie_word_embeddings"] = False
    qwen3.save_config()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(qwen3.path)).float().eval()
    model.load_state_dict(qwen3.tensors)
    assert qwen3.greedy() == greedy_of(model)


HUB_NAMES = (
    (r"\.mlp\.", ".block_sparse_moe."),
    (r"\.gate_proj\.", ".w1."),
    (r"\.down_proj\.", ".w2."),
    (r"\.up_proj\.", ".w3."),
)


def split_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint with those of all experts fused, as if each had its own."""
    split = {}
    for name, tensor in tensors.items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            split[name] = tensor
            continue
        before, module = name.rsplit(".", 1)
        for expert, own in enumerate(tensor):
            parts = ["down_proj"] if module == "down_proj" else ["gate_proj", "up_proj"]
            for part, weight in zip(parts, own.chunk(len(parts)), strict=True):
                split[f"{before}.{expert}.{part}.weight"] = weight.contiguous()
    return split


@pytest.mark.parametrize(("family", "num_ranks"), [("qwen3_moe", 1), ("qwen2_moe", 2), ("mixtral", 1), ("mixtral", 2)])
def test_layouts_of_experts(checkpoint, folder, family, num_ranks):
    """A tensor for each expert, under both names of Mixtral's, and one for all."""
    sparse, state = folder(family), checkpoint(family).model.state_dict()
    layouts = [split_experts(state)]
    if any(".experts.gate_up_proj" in name for name in state):  # transformers before 5 has no other
        layouts.append(state)
    if family == "mixtral":
        layouts.append({rename(name): tensor for name, tensor in layouts[0].items()})
    for tensors in layouts:
        sparse.tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        sparse.save()
        assert sparse.greedy(tensor_parallel_size=num_ranks) == expected(checkpoint, family)


def rename(name: str) -> str:
    """The hub's name of a tensor of Mixtral."""
    for ours, theirs in HUB_NAMES:
        name = re.sub(ours, theirs, name)
    return name


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts.5.up_proj.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.0.down_proj.weight"),
        ("qwen3_moe", "model.layers.1.mlp.gate.weight"),
        ("qwen3_moe", "model.layers.0.mlp.gate_proj.weight"),
        ("qwen2_moe", "model.layers.0.mlp.experts.4.gate_proj.weight"),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert.up_proj.weight"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w1.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w2.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
    ],
)
def test_a_missing_or_misshaped_tensor_of_experts(folder, family, name):
    sparse = folder(family)
    tensors = split_experts(sparse.tensors)
    sparse.tensors = {rename(name) if family == "mixtral" else name: tensor for name, tensor in tensors.items()}
    tensor = sparse.tensors.pop(name)
    sparse.save()
    sparse.refused(f"lacks the tensor '{name}' \\(1 in all\\)")
    sparse.tensors[name] = tensor[:, :-1].contiguous()
    sparse.save()
    sparse.refused(f"'{name}' has shape")


def test_a_tensor_of_one_expert_too_many(folder):
    sparse = folder("qwen3_moe")
    sparse.tensors = split_experts(sparse.tensors)
    name = "model.layers.1.mlp.experts.6.up_proj.weight"
    sparse.tensors[name] = torch.zeros(40, 64)
    sparse.save()
    sparse.refused(f"has the unexpected tensor '{name}'")


def test_a_fused_tensor_of_fewer_experts(checkpoint, folder):
    sparse, state = folder("mixtral"), checkpoint("mixtral").model.state_dict()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    if name not in state:
        pytest.skip("transformers before 5 fuses none")
    sparse.tensors = state | {name: state[name][:3].contiguous()}
    sparse.save()
    sparse.refused(rf"{name}.*\(3, 96, 64\).*\(4, 96, 64\)")


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
        auto = "bfloat16" if stored == torch.bfloat16 and multiplies_bfloat16() else "float32"
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
    scaled = inverse_frequencies(config.rope, config.head_dim, MAX_POSITIONS)
    llama.config = plain | {"rope_theta": config.rope.theta}
    llama.save_config()
    config = ModelConfig.from_folder(str(llama.path))
    ratio = scaled / inverse_frequencies(config.rope, config.head_dim, MAX_POSITIONS)
    assert ratio[0] == 1.0 and torch.isclose(ratio[-1], torch.tensor(1 / 8, dtype=ratio.dtype))
    assert ((ratio > 1 / 8) & (ratio < 1)).any() and (ratio.diff() <= 0).all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM.*Qwen2ForCausalLM.*Qwen3For"),
        ({"rope_parameters": {"rope_type": "ntk", "factor": 4.0}}, "ntk.*yarn"),
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method='bitsandbytes' is not supported"),
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


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"mlp_bias": True}),
        ("llama", {"hidden_act": "swish"}),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2, "layer_types": None}),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}),
        ("llama", {"sliding_window": None, "use_sliding_window": True}),
        ("qwen2", {"quantization_config": None, "pruned_heads": {}, "partial_rotary_factor": 1.0}),
    ],
)
def test_facts_that_change_nothing(checkpoint, folder, family, changes):
    changed = folder(family)
    changed.config |= changes
    changed.save_config()
    assert changed.greedy() == expected(checkpoint, family)


def test_biases_of_qwen3(tmp_path):
    """config.json decides on those of all four projections."""
    biased = Checkpoint(Qwen3Config(**SHAPE, head_dim=32, attention_bias=True), tmp_path)
    assert any(name.endswith("o_proj.bias") for name, _ in biased.model.named_parameters())
    with LLM(biased.path, device="cpu", kvcache_block_size=16, max_model_len=128) as llm:
        result = llm.generate(list(PROMPT), GREEDY, use_tqdm=False)[0]
    assert result["token_ids"] == biased.greedy(PROMPT, 12, True)[0]


NUM_TOKENS = len(PROMPT) + GREEDY.max_tokens


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {}),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}),  # Ministral, as transformers has it
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_a_window_counts_once_a_text_is_longer(checkpoint, folder, family, changes):
    """One that no request can fill is as good as none, and transformers agrees."""
    if changes and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("older versions of transformers give all layers the window or none")
    slid = folder(family)
    for window in (NUM_TOKENS, 8):
        slid.config |= changes | {"sliding_window": window}
        slid.save_config()
        known = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(slid.path)).float().eval()
        known.load_state_dict(checkpoint(family).model.state_dict())
        assert slid.greedy() == greedy_of(known)
        assert (slid.greedy() == expected(checkpoint, family)) == (window == NUM_TOKENS)


def test_a_window_of_llama_bounds_the_texts(checkpoint, folder):
    """transformers 5 disagrees with itself about longer ones."""
    llama = folder("llama")
    llama.config["sliding_window"] = NUM_TOKENS
    llama.save_config()
    with llama.load(max_model_len=NUM_TOKENS + 1) as llm:
        assert llm.config.max_model_len == NUM_TOKENS
    assert llama.greedy() == expected(checkpoint, "llama")


def test_the_window_of_mistral_that_no_key_gives(folder):
    mistral = folder("mistral")
    del mistral.config["sliding_window"]
    mistral.save_config()
    assert ModelConfig.from_folder(str(mistral.path)).layer_windows == (4096, 4096)


def test_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json$"):
        LLM(str(tmp_path), device="cpu")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no config\.json; an adapter is not supported"):
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
