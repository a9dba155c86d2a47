"""GGUF files: the same tokens as transformers with the same weights, for every architecture and type of tensors."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints import EOS_TOKEN_IDS, EXPERTS, LLAMA3_ROPE, LONGROPE, SHAPE, Checkpoint, random_prompt
from engines import engine, generate
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3MoeConfig

import nanovllm.demo
from nanovllm import LLM, SamplingParams
from nanovllm.checkpoint.gguf import config as gguf_config
from nanovllm.checkpoint.gguf.header import read_header
from nanovllm.checkpoint.gguf.tensors import GGUFTensor
from nanovllm.checkpoint.loader import find_tensors
from nanovllm.checkpoint.model_config import ModelConfig
from nanovllm.config import Config
from nanovllm.kernels.cpu_products import CpuWeight
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.quantization.gguf import read_blocks
from nanovllm.text.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")
from gguf_files import llama3_factors, metadata_of, num_heads_of, tensors_of, unpermuted, write_file  # noqa: E402 (needs the package)

DEMO = Path(nanovllm.demo.__file__).parent
PROMPTS = [random_prompt(seed, length) for seed, length in ((0, 3), (1, 40), (2, 90))]
NUM_TOKENS = 8
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
GEMMA_SCALE = {"attention.scale": 20**-0.5, "attention.sliding_window": 24}
# The architecture of the files of a family, and what their metadata have that not all have.
FILES = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_sparse": ("qwen3moe", {}),
    "qwen2_moe": ("qwen2moe", {}),
    "llama": ("llama", {}),
    "llama_bias": ("llama", {}),
    "mistral": ("llama", {}),
    "mistral_window": ("llama", {"attention.sliding_window": 24}),
    "mixtral": ("llama", {}),
    "gemma2": ("gemma2", GEMMA_SCALE | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 1.0}),
    "gemma3": (
        "gemma3",
        GEMMA_SCALE
        | {
            "attention.sliding_window_pattern": 2,
            "rope.freq_base_swa": 100.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "phi3": (
        "phi3",
        {
            "attention.sliding_window": 100,
            "rope.scaling.original_context_length": 320,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(512 / 320) / math.log(320)),
        },
    ),
    "granite": (
        "granite",
        {"embedding_scale": 3.0, "residual_scale": 0.4, "attention.scale": 0.15, "logit_scale": 2.0},
    ),
    "smollm3_plain": ("smollm3", {}),
    "qwen2_yarn": (
        "qwen2",
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.yarn_beta_fast": 24.0,
        },
    ),
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 24.0,
}
OTHER_CONFIGS = {
    "qwen3_sparse": lambda: Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=32, num_experts=6, norm_topk_prob=True),
    "smollm3_plain": lambda: transformers.SmolLM3Config(**SHAPE | {"num_hidden_layers": 4}, pad_token_id=None),
    "qwen2_yarn": lambda: Qwen2Config(**SHAPE, rope_parameters=YARN),
}
# Of the others, tensors and facts are compared by default, which leaves little to be computed.
FAST = ("llama", "qwen3_sparse")
pytestmark = pytest.mark.skipif(
    not hasattr(LlamaConfig(), "rope_parameters"), reason="the files are made of transformers 5's configs"
)


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory):
    """The random checkpoint of a family, and its file in float32."""
    files = {}

    def get(family: str) -> tuple[Checkpoint, str]:
        if family not in files:
            folder = tmp_path_factory.mktemp(family)
            source = Checkpoint(OTHER_CONFIGS[family](), folder) if family in OTHER_CONFIGS else checkpoint(family)
            architecture, more = FILES[family]
            tensors = tensors_of(source.model, architecture)
            if family == "llama":
                tensors["rope_freqs.weight"] = llama3_factors(LLAMA3_ROPE, 24)
            if family == "phi3":
                for kind in ("short", "long"):
                    tensors[f"rope_factors_{kind}.weight"] = np.array(LONGROPE[f"{kind}_factor"], np.float32)
            metadata = metadata_of(source.model, architecture) | more
            files[family] = source, write_file(folder / "model.gguf", architecture, tensors, metadata)
        return files[family]

    return get


def check_tokens(llm: LLM, model: Checkpoint) -> None:
    results = generate(llm, PROMPTS, PARAMS)
    want = [model.greedy(prompt, NUM_TOKENS, True)[0] for prompt in PROMPTS]
    assert [result["token_ids"] for result in results] == want


def slow_but(names: tuple[str, ...], fast: tuple[str, ...]) -> list:
    """Parameters of a test that by default does some of them alone."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("family", slow_but(tuple(FILES), FAST))
def test_greedy_tokens(made, family):
    model, path = made(family)
    with engine(path, dtype="float32") as llm:
        assert llm.config.model == path and llm.tokenizer is None
        assert llm.config.model_config.eos_token_ids == {1}
        check_tokens(llm, model)


@pytest.mark.parametrize("family", FILES)
def test_config_and_tensors(made, family):
    """Both are those of the Hugging Face checkpoint, without computing anything."""
    model, path = made(family)
    ours, theirs = ModelConfig.from_folder(path), ModelConfig.from_folder(model.path)
    facts = vars(ours).keys() - {"dtype", "eos_token_ids"}
    differing = {name for name in facts if getattr(ours, name) != getattr(theirs, name)}
    # Llama 3's scaling is computed in the file; a window that is null is none of Mistral's.
    assert differing <= {
        "llama": {"rope"},
        "mistral": {"architecture"},
        "phi3": {"rope"},
        "gemma2": {"attention_scale"},
        "gemma3": {"attention_scale"},
    }.get(family, set())
    if ours.attention_scale is not None:
        assert ours.attention_scale == pytest.approx(theirs.attention_scale, rel=1e-6)
    found, wanted = find_tensors(path), find_tensors(model.path)
    if family not in ("qwen3_sparse", "qwen2_moe", "mixtral"):  # their checkpoints have other names
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].get_shape() == list(tensor.get_shape())
            tolerance = 1e-6 if family.startswith("gemma") else 0  # 1 was added
            torch.testing.assert_close(found[name][:], tensor[:].float(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", ["llama_bias", "qwen2", "qwen3", "gemma2", "phi3", "qwen3_sparse"])
def test_transformers_reads_the_same(made, family):
    pytest.importorskip("accelerate")  # transformers loads GGUF files with it
    model, path = made(family)
    folder, file = os.path.split(path)
    options = {"config": model.model.config, "dtype": torch.float32}  # it does not read all of the file's config
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, **options).state_dict()
    compared = 0
    for name, tensor in find_tensors(path).items():
        if name in theirs:  # not those of experts, which it has as one tensor
            assert torch.equal(tensor[:], theirs[name]), name
            compared += 1
    assert compared >= len(theirs) // 2


# Where the blocks of types that the package cannot quantise have float16 numbers, and how large these are for weights
# of about 0.1.
SCALES = {
    "Q2_K": ((80, 82), 1e-2),
    "Q3_K": ((108,), 3e-3),
    "Q4_K": ((0, 2), 6e-4),
    "Q5_K": ((0, 2), 3e-4),
    "Q6_K": ((208,), 1e-4),
}
QUANTISED = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *SCALES)


def packed(kind: str, values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The bytes of values in a type, or random ones where there is no way from values to bytes."""
    number = gguf.GGMLQuantizationType[kind]
    if kind not in SCALES:
        return gguf.quantize(values, number)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[number]
    shape = (*values.shape[:-1], values.shape[-1] // block_size, block_bytes)
    blocks = generator.integers(0, 256, shape, dtype=np.uint8)
    places, scale = SCALES[kind]
    for place in places:
        scales = generator.uniform(scale / 2, scale, shape[:-1]).astype(np.float16)
        blocks[..., place : place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A model whose matrices are of a type, as a file, with the same values for transformers."""
    shape = SHAPE | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    files = {}

    def get(kind: str) -> tuple[Checkpoint, str]:
        if kind in files:
            return files[kind]
        folder = tmp_path_factory.mktemp(kind)
        model = Checkpoint(LlamaConfig(**shape), folder, 7)
        generator = np.random.default_rng(7)
        number = gguf.GGMLQuantizationType[kind]
        names = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}

        def pack(name: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType] | None:
            if values.ndim == 1:
                return None
            data = packed(kind, values, generator)
            dequantised = gguf.dequantize(data, number)
            if heads := num_heads_of(model.model.config, name):
                dequantised = unpermuted(dequantised, heads)
            their_name = names.get(name) or our_names[name]
            model.model.state_dict()[their_name].copy_(torch.from_numpy(dequantised.copy()))
            return data, number

        tensors = tensors_of(model.model, "llama")
        our_names = dict(zip(tensors, dict(model.model.named_parameters()), strict=True))
        path = write_file(folder / "model.gguf", "llama", tensors, metadata_of(model.model, "llama"), pack)
        files[kind] = model, path
        return files[kind]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTISED)
def test_greedy_tokens_of_quantised_types(quantised, kind):
    model, path = quantised(kind)
    with engine(path, dtype="float32") as llm:
        check_tokens(llm, model)


@pytest.mark.parametrize("kind", QUANTISED)
def test_slices_of_quantised_types(quantised, kind):
    model, path = quantised(kind)
    wanted = model.model.state_dict()
    for name, tensor in find_tensors(path).items():
        want = wanted[name]
        assert torch.equal(tensor[:], want)
        assert torch.equal(tensor[3:9], want[3:9])
        if want.dim() == 2:  # within a block, over several, and none
            for start, stop in ((0, 256), (5, 250), (64, 96), (7, 7)):
                assert torch.equal(tensor[:, start:stop], want[:, start:stop])
                assert torch.equal(tensor[1:5, start:stop], want[1:5, start:stop])


def test_large_tensors_are_dequantised_in_parts(quantised, monkeypatch):
    model, path = quantised("Q4_0")
    monkeypatch.setattr("nanovllm.checkpoint.gguf.tensors.PACKED_BYTES", 1000)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(find_tensors(path)[name][:], model.model.state_dict()[name])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama_bias", "mixtral"])
def test_two_ranks(made, family):
    model, path = made(family)
    with engine(path, dtype="float32", tensor_parallel_size=2) as llm:
        check_tokens(llm, model)


@pytest.mark.parametrize("family", slow_but(("llama", "qwen3_sparse", "mixtral"), ("llama",)))
def test_rounded_while_loaded(made, family):
    """quantization="fp8" does with a file what it does with the checkpoint that it was made of."""
    checkpoint, path = made(family)
    results = []
    for model in (path, checkpoint.path):
        with engine(model, dtype="float32", quantization="fp8") as llm:
            assert llm.config.quantization == "fp8"
            results.append([result["token_ids"] for result in generate(llm, PROMPTS, PARAMS)])
    assert results[0] == results[1]
    assert results[0] != [checkpoint.greedy(prompt, NUM_TOKENS, True)[0] for prompt in PROMPTS]


# ---- codes that stay as they are ------------------------------------------------------------------------------------


def down_proj(llm: LLM) -> object:
    return llm.ranks.runner.model.model.layers[0].mlp.down_proj.weight


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_codes_that_stay(quantised, kind, num_ranks):
    """In float32 the tokens are those of transformers with the package's numbers."""
    model, path = quantised(kind)
    with engine(path, quantization="gguf", dtype="float32", tensor_parallel_size=num_ranks) as llm:
        weight = down_proj(llm)
        assert isinstance(weight, QuantizedWeight) and weight.bits == 4
        expected = model.model.model.layers[0].mlp.down_proj.weight[:, : weight.shape[1]]
        torch.testing.assert_close(weight.dequantize(torch.float32), expected, atol=1e-7, rtol=1e-6)
        check_tokens(llm, model)


def test_codes_in_bfloat16(quantised):
    """By torch's operator for CPUs; the prompt's logprobs are near those of the numbers."""
    model, path = quantised("Q4_1")
    prompt = PROMPTS[-1]
    logprobs = model.model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with engine(path, quantization="gguf", dtype="bfloat16") as llm:
        assert isinstance(down_proj(llm), CpuWeight)
        (result,) = generate(llm, [prompt], params)
    told = torch.tensor([next(iter(each.values())).logprob for each in result.prompt_logprobs[1:]])
    assert (told - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_dummy_codes(quantised):
    """Their numbers are as large as those of other dummy weights."""
    with engine(quantised("Q4_1")[1], quantization="gguf", dtype="float32", load_format="dummy") as llm:
        assert 0.015 < down_proj(llm).dequantize(torch.float32).std() < 0.025


def test_other_types_are_plain(quantised):
    model, path = quantised("Q8_0")
    with engine(path, quantization="gguf", dtype="float32") as llm:
        assert type(down_proj(llm)) is not QuantizedWeight
        check_tokens(llm, model)


def test_blocks_of_equal_weights():
    """Their scale is 0, and the least weight is all of them."""
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    values[1], values[2, :32] = 0.75, 0
    kind = gguf.GGMLQuantizationType.Q4_1
    rows = gguf.quantize(values, kind)
    codes, scales, zeros = torch.empty(4, 32, dtype=torch.uint8), torch.empty(4, 2), torch.empty(4, 2)
    read_blocks(GGUFTensor((4, 64), kind, rows), slice(0, 4), slice(0, 2), codes, scales, zeros)
    numbers = QuantizedWeight(codes, scales, (1, 32), zeros).dequantize(torch.float32)
    torch.testing.assert_close(numbers, torch.from_numpy(gguf.dequantize(rows, kind)), atol=1e-6, rtol=1e-6)


def test_a_layer_of_several_types(quantised, tmp_path):
    """Of q, k and v, which are multiplied as one, all must stay codes, or none."""
    model, _path = quantised("Q4_0")

    def pack(name: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType] | None:
        kind = gguf.GGMLQuantizationType.Q8_0 if "attn_v" in name else gguf.GGMLQuantizationType.Q4_0
        return (gguf.quantize(values, kind), kind) if values.ndim == 2 else None

    tensors, metadata = tensors_of(model.model, "llama"), metadata_of(model.model, "llama")
    path = write_file(tmp_path / "model.gguf", "llama", tensors, metadata, pack)
    match = r"layers\.0\.self_attn\.qkv_proj must be quantised as a whole: v_proj is by None, others by FilledGroups"
    with pytest.raises(ValueError, match=match), engine(path, quantization="gguf"):
        pass


# ---- the demo as a file: a tokenizer, a chat template and tokens that end a text ------------------------------------


class DemoModel:
    """The demo's parameters under its names, as `tensors_of` asks for them."""

    def __init__(self) -> None:
        self.weights = load_file(DEMO / "model.safetensors")

    def named_parameters(self) -> list[tuple[str, torch.Tensor]]:
        return list(self.weights.items())


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Adds the demo's tokenizer as llama.cpp's converter does one of byte-level BPE."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    assert special <= set(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eot_token_id(2)
    writer.add_pad_token_id(0)
    config = json.loads((DEMO / "tokenizer_config.json").read_text(encoding="utf-8"))
    writer.add_chat_template(config["chat_template"])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo as a file of bfloat16, in parts."""
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    metadata = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }

    def pack(name: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType] | None:
        kind = gguf.GGMLQuantizationType.BF16
        return (gguf.quantize(values, kind), kind) if values.ndim == 2 else None

    folder = tmp_path_factory.mktemp("demo")
    tensors = tensors_of(DemoModel(), "qwen3")
    write_file(folder / "demo.gguf", "qwen3", tensors, metadata, pack, add_tokenizer, split_max_tensors=20)
    return folder


def test_demo_answers(demo):
    """From a question's text to the answer's, by a folder's parts of a file alone."""
    lines = [json.loads(line) for line in (DEMO / "questions.jsonl").read_text(encoding="utf-8").splitlines()[:5]]
    assert sum(file.suffix == ".gguf" for file in demo.iterdir()) > 1
    with LLM(str(demo), max_model_len=1024, device="cpu") as llm:
        assert llm.config.model.endswith("-00001-of-00003.gguf")
        assert llm.scheduler.eos_token_ids == {1, 2}
        conversations = [[{"role": "user", "content": line["question"]}] for line in lines]
        results = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=256), use_tqdm=False)
    assert [(result["text"], result["finish_reason"]) for result in results] == [
        (line["answer"], "stop") for line in lines
    ]


def test_tokenizer(demo):
    path = Config.create(str(demo), {"device": "cpu"}).tokenizer
    ours, original = load_tokenizer(path), load_tokenizer(str(DEMO))
    theirs = AutoTokenizer.from_pretrained(demo, gguf_file=Path(path).name)
    for text in ("Hello  there,\n\tit's 12345", "<|im_start|>user\nhé 日本<|im_end|>", " "):
        ids = ours.encode(text)
        assert ids == original.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=False) == text
        assert ours.decode(ids) == original.decode(ids)
    assert ours.eos_token_id == 1  # as the file says


def test_tokenizer_of_sentencepiece(tmp_path):
    """With BOS, a byte fallback, and no merges but what scores say."""
    letters = [*"▁abcdelo", "▁a", "ab", "lo", "▁l"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * 259 + [-float(place) for place in range(len(letters))])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(letters))
        writer.add_bos_token_id(1)
        writer.add_unk_token_id(0)

    tensors = {"token_embd.weight": np.zeros((len(tokens), 64), np.float32)}
    metadata = {
        "context_length": 64,
        "embedding_length": 64,
        "block_count": 1,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "vocab_size": len(tokens),
    }
    path = write_file(tmp_path / "model.gguf", "llama", tensors, metadata, add=add)
    ours = load_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("a lo", "hé ab"):
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"] and ids[0] == 1
        assert ours.decode(ids) == text
    assert ours.encode("a", add_special_tokens=False) == [tokens.index("▁a")]
    assert ours.is_byte(tokens.index("<0x41>"))


# ---- which files count ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(made, tmp_path):
    """A folder with a GGUF file and nothing else."""
    shutil.copy(made("qwen3")[1], tmp_path / "model.gguf")
    return tmp_path


def create(model: object, **options: object) -> Config:
    return Config.create(model, {"device": "cpu"} | options)


def test_a_folder_with_one_file(folder):
    path = str(folder / "model.gguf")
    for load_format in ("auto", "gguf"):
        for model in (str(folder), folder, path, folder / "model.gguf"):
            config = create(model, load_format=load_format)
            assert (config.model, config.tokenizer, config.hf_config_path) == (path, path, None)
    assert create(path, load_format="dummy").model == path
    with pytest.raises(ValueError, match=r"load_format='safetensors' does not read model='.*model.gguf'"):
        create(path, load_format="safetensors")
    shutil.copy(path, folder / "other.gguf")
    with pytest.raises(ValueError, match=r"several GGUF files, name one of model.gguf, other.gguf"):
        create(folder)


def test_what_else_a_folder_has_counts(made, folder):
    for file in ("config.json", "generation_config.json"):
        shutil.copy(Path(made("qwen3")[0].path) / file, folder)
    shutil.copy(DEMO / "tokenizer.json", folder)
    config = create(folder)
    assert config.model == str(folder / "model.gguf")
    assert config.tokenizer == config.hf_config_path == config.generation_folder == str(folder)
    assert config.model_config == ModelConfig.from_folder(made("qwen3")[0].path)
    assert create(folder / "model.gguf").hf_config_path is None
    (folder / "config.json").unlink()
    config = create(folder)
    assert (config.hf_config_path, config.generation_folder) == (None, str(folder))
    assert config.model_config.eos_token_ids == set(EOS_TOKEN_IDS)


def test_safetensors_count_first(made, folder):
    source = Path(made("qwen3")[0].path)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(source / file, folder)
    assert create(folder).model == str(folder)
    assert create(folder, load_format="gguf").model == str(folder / "model.gguf")
    (folder / "model.gguf").unlink()
    with pytest.raises(ValueError, match=r"load_format='gguf', but model='.*' has no GGUF file"):
        create(folder, load_format="gguf")


def test_hf_config_path(made):
    """Its facts count where a file's metadata would say otherwise, and its generation_config.json."""
    checkpoint, path = made("gemma2")
    config = create(path, hf_config_path=checkpoint.path)
    assert config.model_config == ModelConfig.from_folder(checkpoint.path)
    assert (config.model, config.generation_folder) == (path, checkpoint.path)
    with pytest.raises(ValueError, match="hf_config_path='nowhere' is neither a folder nor"):
        create(path, hf_config_path="nowhere")
    assert create(checkpoint.path, hf_config_path=made("qwen3")[0].path).model_config.architecture.startswith("Qwen3")


def test_quantization(made, monkeypatch):
    """vLLM's name of it; but on CPUs weights are plain once they are loaded."""
    checkpoint, path = made("qwen3")
    config = create(path, quantization="gguf")
    assert (config.quantization, config.quantization_method.path) == ("gguf", path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = create(path, quantization="gguf", device="cuda")
    assert config.quantization is None and config.quantization_method is None
    with pytest.raises(ValueError, match=r"quantization='gguf' contradicts model='.*', which is no GGUF file"):
        create(checkpoint.path, quantization="gguf")
    with pytest.raises(ValueError, match=r"quantization='awq': only fp8, int8, int4 can be made .*model\.gguf\)"):
        create(path, quantization="awq")


def test_overrides(made):
    config = create(made("qwen3")[1], hf_overrides={"rope_theta": 5000.0})
    assert config.model_config.rope.theta == 5000


# ---- bad files ------------------------------------------------------------------------------------------------------


def rewritten(made, path: Path, family: str = "qwen3", drop: str = "", **metadata: object) -> str:
    """The file of a family with other metadata (None: without), or without a tensor."""
    model, _ = made(family)
    architecture, more = FILES[family]
    values = metadata_of(model.model, architecture) | more
    values |= {name.replace("__", "."): value for name, value in metadata.items() if name != "architecture"}
    tensors = tensors_of(model.model, architecture)
    tensors.pop(drop, None)
    values = {name: value for name, value in values.items() if value is not None}
    return write_file(path / "bad.gguf", metadata.get("architecture", architecture), tensors, values)


# Of what the package knows, keys of other architectures, and those that change nothing or that tensors' shapes repeat.
OTHER_KEYS = {
    "altup.active_idx",
    "altup.num_inputs",
    "attention.decay_lora_rank",
    "attention.gate_lora_rank",
    "attention.group_norm_epsilon",
    "attention.group_norm_groups",
    "attention.iclr_lora_rank",
    "attention.key_length_mla",
    "attention.kv_lora_rank",
    "attention.layer_norm_epsilon",
    "attention.q_lora_rank",
    "attention.relative_buckets_count",
    "attention.value_length_mla",
    "attention.value_residual_mix_lora_rank",
    "decoder_block_count",
    "decoder_start_token_id",
    "embedding_length_out",
    "expert_group_scale",
    "expert_group_used_count",
    "expert_shared_count",
    "experts_per_group",
    "features_length",
    "full_attention_interval",
    "n_deepstack_layers",
    "pooling_type",
    "rescale_every_n_layers",
    "rope.scaling.finetuned",
    "swin_norm",
    "tensor_data_layout",
    "time_decay_extra_dim",
    "time_mix_extra_dim",
    "token_shift_count",
    "vocab_size",
    "{dense}_feat_in",
    "{dense}_feat_out",
}
BAD = [
    ({"architecture": "mamba"}, "general.architecture='mamba' is not supported, only gemma2, gemma3, .*bad.gguf"),
    ({"attention__head_count": 0}, "num_attention_heads must be an integer between 1 and"),
    ({"block_count": None}, "bad.gguf has no 'qwen3.block_count'; hf_config_path"),
    ({"attention__head_count": 3}, "num_key_value_heads=2 must divide num_attention_heads=3"),
    ({"attention__value_length": 8}, "qwen3.attention.value_length=8 is not supported, only 32"),
    ({"attention__clamp_kqv": 2.0}, "qwen3.attention.clamp_kqv=2.0 is not supported"),
    ({"attention__causal": False}, "qwen3.attention.causal=False is not supported"),
    ({"attention__scale": 0.5}, "qwen3.attention.scale=0.5 is not supported"),
    ({"rope__dimension_count": 16}, "partial_rotary_factor=0.5 is not supported, only 1"),
    ({"rope__scaling__type": "longrope"}, "rope_scaling of type 'longrope' has no 'short_factor'"),
    ({"rope__scaling__type": "spiral"}, "rope_scaling of type 'spiral' is not supported"),
    ({"drop": "token_embd.weight"}, "lacks the tensor 'token_embd.weight'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_refused_metadata(made, tmp_path, changes, message):
    path = rewritten(made, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        create(path)


def test_what_the_metadata_leaves_out(made, tmp_path):
    """What llama.cpp knows of an architecture."""
    sparse = rewritten(made, tmp_path, "qwen3_sparse", expert_weights_norm=False)
    assert not create(sparse).model_config.mixture.norm_topk_prob
    read = create(rewritten(made, tmp_path, "gemma2", attention__scale=None)).model_config
    assert read.attention_scale == 28**-0.5
    of_27b = rewritten(made, tmp_path, "gemma2", attention__scale=None, block_count=46)
    assert create(of_27b).model_config.attention_scale == (64 / 4) ** -0.5
    without = rewritten(made, tmp_path, "qwen2", **{"attention__head_count_kv": None, "attention__key_length": None})
    assert create(without).model_config.num_key_value_heads == 4
    without = rewritten(made, tmp_path, "mistral", attention__head_count_kv=None)  # it has 4 heads of either
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(find_tensors(without)[name][:], made("mistral")[0].model.state_dict()[name])
    linear = rewritten(made, tmp_path, "qwen2", rope__scale_linear=4.0)
    rope = create(linear).model_config.rope
    assert (rope.kind, rope.factor) == ("linear", 4)


def test_every_key_is_settled():
    """What the package knows of a model's metadata is read, refused, or listed here."""
    source = Path(gguf_config.__file__).read_text(encoding="utf-8")
    for group in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope):
        for key in vars(group).values():
            if isinstance(key, str) and key.startswith("{arch}."):
                name = key.removeprefix("{arch}.")
                is_read = f'"{name}"' in source or name.startswith("rope.scaling.yarn_beta_")
                assert is_read or name in OTHER_KEYS, name


def test_missing_and_unknown_tensors(made, tmp_path):
    path = rewritten(made, tmp_path, drop="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"lacks the tensor 'model.layers.1.mlp.up_proj.weight' \(1 in all\)"):
        engine(path)
    names = find_tensors(rewritten(made, tmp_path, "qwen2", architecture="qwen3"))
    assert "model.layers.0.self_attn.q_proj.bias" in names
    tensors = {"token_embd.weight": np.zeros((4, 4)), "blk.0.ssm_a": np.zeros((4,)), "blk.0.x.weight": np.zeros((4,))}
    names = find_tensors(write_file(tmp_path / "names.gguf", "qwen3", tensors, {}))
    assert names.keys() == {"model.embed_tokens.weight", "blk.0.ssm_a", "blk.0.x.weight"}


DAMAGED = "bad.gguf is no GGUF file that can be read, or is truncated or damaged"


def test_damaged_files(made, tmp_path):
    data = Path(made("qwen3")[1]).read_bytes()
    bad = tmp_path / "bad.gguf"
    for damaged in (b"", data[:3], b"PK" + data[2:], data[:20], data[:300], data[:-40]):
        bad.write_bytes(damaged)
        with pytest.raises(ValueError, match=DAMAGED):
            create(bad)
    bad.write_bytes(data[:4] + b"\1\0\0\0" + data[8:])
    with pytest.raises(ValueError, match=f"{DAMAGED}: .*version 1"):
        create(bad)
    with pytest.raises(ValueError, match=r"model='.*missing.gguf' is no file"):
        create(tmp_path / "missing.gguf")


def test_every_byte_of_a_header_may_be_damaged(made, tmp_path):
    """A damaged header is refused by a ValueError or read as something else, never another error."""
    data = Path(made("qwen3")[1]).read_bytes()
    generator = np.random.default_rng(0)
    for number in range(60):
        bad = tmp_path / f"{number}.gguf"
        damaged = bytearray(data)
        damaged[generator.integers(4, 3000)] = generator.integers(0, 256)
        bad.write_bytes(damaged)
        try:
            create(bad)
            find_tensors(str(bad))
        except ValueError as error:
            assert str(bad) in str(error)
        bad.unlink()


def test_a_list_without_an_end(tmp_path):
    """It is refused before it is read."""
    tensors = {"token_embd.weight": np.zeros((4, 32), np.float32)}
    path = write_file(
        tmp_path / "bad.gguf", "qwen3", tensors, {}, add=lambda writer: writer.add_token_types([1, 6, 1])
    )
    assert read_header(path).metadata["tokenizer.ggml.token_type"] == [1, 6, 1]
    data = Path(path).read_bytes()
    place = data.index(b"token_type") + len("token_type") + 8
    Path(path).write_bytes(data[: place + 5] + b"\1" + data[place + 6 :])
    with pytest.raises(ValueError, match=f"{DAMAGED}: it has a list of {2**40 + 3} values"):
        read_header(path)


def test_a_file_of_the_other_byte_order(tmp_path):
    tensors = {"token_embd.weight": np.zeros((4, 32), np.float32)}
    path = write_file(tmp_path / "bad.gguf", "qwen3", tensors, {}, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match=f"{DAMAGED}: it is big-endian"):
        read_header(path)


def test_tensors_that_cannot_be(tmp_path):
    bad = tmp_path / "bad.gguf"
    path = write_file(bad, "qwen3", {"token_embd.weight": np.zeros((0, 32), np.float32)}, {})
    with pytest.raises(ValueError, match=rf"{DAMAGED}: the tensor 'token_embd.weight' of shape \(0, 32\) has no"):
        read_header(path)
    path = write_file(bad, "qwen3", {f"blk.{layer}.attn_q.bias": np.ones(32) for layer in (0, 1)}, {})
    bad.write_bytes(bad.read_bytes().replace(b"blk.1.", b"blk.0."))
    with pytest.raises(ValueError, match=f"{DAMAGED}: .*duplicated tensor with name blk.0.attn_q.bias"):
        read_header(path)


def test_a_file_is_read_once(made, monkeypatch, tmp_path):
    path = str(shutil.copy(made("qwen3")[1], tmp_path / "model.gguf"))
    header = read_header(path)
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", None)
        assert read_header(path) is header
    os.utime(path, (0, 0))
    assert read_header(path) is not header


def test_types_that_have_no_values(made, tmp_path):
    tensors = {"token_embd.weight": np.zeros((4, 256), np.float32)}

    def pack(name: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        return np.zeros((4, 292), np.uint8), gguf.GGMLQuantizationType.Q8_K

    path = write_file(tmp_path / "bad.gguf", "qwen3", tensors, {}, pack)
    with pytest.raises(
        ValueError, match=r"the tensor 'token_embd.weight' of type Q8_K, of which the package .* no values"
    ):
        find_tensors(path)


def test_a_part_is_missing(demo, tmp_path):
    parts = sorted(demo.glob("*.gguf"))
    for part in parts[:-1]:
        shutil.copy(part, tmp_path)
    with pytest.raises(ValueError, match=f"is one of 3 parts, of which .*{re.escape(parts[-1].name)} is missing"):
        create(tmp_path)
    assert read_header(str(parts[1])).tensors.keys() == read_header(str(parts[0])).tensors.keys()


def test_the_package_is_missing(made, monkeypatch):
    path = made("qwen3")[1]
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=re.escape('need the package gguf: pip install "nano-vllm[gguf]"')):
        create(path)
