"""Tokens that only tokenizer_config.json and the older files know: ids, texts and EOS are those of transformers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from checkpoints import EOS_TOKEN_IDS, SHAPE, Checkpoint, random_prompt
from tokenizer_kinds import KINDS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, Qwen3Config

from nanovllm import LLM, SamplingParams
from nanovllm.text.tokenizer import load_tokenizer

NAMES = ["<s>", "</s>", "<|im_end|>", "<pad>", "<x>", "tool call", "<|img|>", "ab"]
# transformers 4 keeps a token of tokenizer.json that is not marked special as it is, and cleans up the texts of BPE.
needs_transformers_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has other rules")


def config(**options: object) -> dict:
    return {"tokenizer_class": "PreTrainedTokenizerFast"} | options


def write_tokenizer(folder: Path, added: list[AddedToken] = (), in_vocabulary: list[str] = ()) -> Tokenizer:
    """A byte-level tokenizer of single characters, with some of the names in its vocabulary or added."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(name.replace(" ", "Ġ") for name in in_vocabulary)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(added))
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def check_folder(folder: Path, draw: random.Random, num_texts: int = 20) -> None:
    ours, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    assert ours.eos_token_id == theirs.eos_token_id
    for _ in range(num_texts):
        text = "".join(draw.choice([*NAMES, "a", "b", " ", "hello", "中"]) for _ in range(8))
        token_ids = theirs.encode(text)
        assert ours.encode(text) == token_ids, text
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        token_ids += [draw.randrange(len(theirs)) for _ in range(10)]
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)


FOLDERS = {
    "added_tokens_decoder": {
        "tokenizer_config.json": config(
            added_tokens_decoder={
                "257": {
                    "content": "<|im_end|>",
                    "special": True,
                    "lstrip": False,
                    "rstrip": True,
                    "normalized": False,
                },
                "256": {"content": "<x>", "special": False, "lstrip": False, "rstrip": False, "normalized": True},
            }
        )
    },
    "named tokens": {"tokenizer_config.json": config(eos_token="</s>", bos_token="<s>", pad_token="<pad>")},
    "additional_special_tokens": {"tokenizer_config.json": config(additional_special_tokens=["<x>", "tool call"])},
    "tokens as objects": {
        "tokenizer_config.json": config(
            eos_token={"__type": "AddedToken", "content": "</s>", "lstrip": True, "rstrip": False, "special": True}
        )
    },
    "special_tokens_map.json": {
        "tokenizer_config.json": config(eos_token="</s>"),
        "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": "<pad>"},
    },
    "added_tokens.json": {
        "tokenizer_config.json": config(eos_token="</s>"),
        "added_tokens.json": {"<x>": 257, "</s>": 256},
    },
    "add_bos_token": {"tokenizer_config.json": config(bos_token="<s>", add_bos_token=True)},
    "split_special_tokens": {"tokenizer_config.json": config(eos_token="</s>", split_special_tokens=True)},
}
if transformers.__version__ >= "5":
    FOLDERS["a token of the model's own"] = {"tokenizer_config.json": config(image_token="<|img|>")}


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("in_vocabulary", [[], ["</s>", "<x>", "<s>"]], ids=["unknown", "known"])
def test_tokens_of_each_file(tmp_path, files, in_vocabulary):
    write_tokenizer(tmp_path, in_vocabulary=in_vocabulary)
    alone = load_tokenizer(str(tmp_path)).encode("</s><x><|im_end|><s>tool call<|img|>")
    for name, content in files.items():
        write_json(tmp_path / name, content)
    check_folder(tmp_path, random.Random(0))
    assert load_tokenizer(str(tmp_path)).encode("</s><x><|im_end|><s>tool call<|img|>") != alone or "split" in str(
        files
    )


@needs_transformers_5
def test_random_folders(tmp_path):
    """Tokens in any of the files, spelled in any way, with any flags."""
    draw = random.Random(0)

    def flags() -> dict:
        return {name: draw.random() < 0.3 for name in ("lstrip", "rstrip", "normalized", "special")}

    def spelled(name: str) -> str | dict:
        return name if draw.random() < 0.5 else {"__type": "AddedToken", "content": name, **flags()}

    def some(number: int) -> list[str]:
        return draw.sample(NAMES, number)

    for number in range(80):
        folder = tmp_path / str(number)
        folder.mkdir()
        added = [AddedToken(name, **flags()) for name in some(draw.randint(0, 3))]
        tokenizer = write_tokenizer(folder, added, in_vocabulary=some(draw.randint(0, 4)))

        def numbered(names: list[str], tokenizer: Tokenizer = tokenizer) -> dict[str, int]:
            size = tokenizer.get_vocab_size()
            ids = {name: tokenizer.token_to_id(name) for name in names}
            return {name: size + i if ids[name] is None else ids[name] for i, name in enumerate(names)}

        named = ("bos_token", "eos_token", "pad_token", "unk_token", "image_token")
        options = {name: spelled(draw.choice(NAMES)) for name in named if draw.random() < 0.5}
        options |= {
            draw.choice(["additional_special_tokens", "extra_special_tokens", "ignored"]): list(map(spelled, some(2)))
        }
        if draw.random() < 0.1:
            options["extra_special_tokens"] = {"foo_token": spelled(draw.choice(NAMES))}
        if draw.random() < 0.5:
            decoder = {str(i): {"content": name, **flags()} for name, i in numbered(some(draw.randint(0, 4))).items()}
            options["added_tokens_decoder"] = decoder
        if draw.random() < 0.9:
            write_json(folder / "tokenizer_config.json", config(**options))
        if draw.random() < 0.3:
            write_json(
                folder / "special_tokens_map.json", {name: draw.choice(NAMES) for name in draw.sample(named[:4], 2)}
            )
        if draw.random() < 0.3:
            write_json(folder / "added_tokens.json", numbered(some(2)))
        check_folder(folder, draw, num_texts=5)


@needs_transformers_5
def test_an_eos_that_tokenizer_json_does_not_mark_special(tmp_path):
    """It ends the text all the same, and is left out of it."""
    write_tokenizer(tmp_path, [AddedToken("<|im_end|>", special=False)])
    write_json(tmp_path / "tokenizer_config.json", config(eos_token="<|im_end|>"))
    ours = load_tokenizer(str(tmp_path))
    assert ours.decode(ours.encode("a<|im_end|>b")) == "ab" and ours.eos_token_id == 256
    check_folder(tmp_path, random.Random(0))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reads_as_transformers_does(tmp_path, kind):
    KINDS[kind](tmp_path)
    ours, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the tin don't, no!", " the  </s> 👋 中", "we 've ' never . <s>"):
        assert ours.encode(text) == theirs.encode(text)


def test_a_broken_tokenizer_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "no tokenizer.json or other file of a vocabulary|cannot make the tokenizer"),
        ({"tokenizer.model": "damaged"}, "cannot make the tokenizer of .*the packages sentencepiece and protobuf"),
    ],
)
def test_no_usable_vocabulary(tmp_path, files, match):
    """transformers 5 makes an empty tokenizer, by which a text has no tokens."""
    write_json(tmp_path / "config.json", {"model_type": "qwen2"})
    tokenizer_class = "LlamaTokenizer" if files else "Qwen2Tokenizer"
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": tokenizer_class})
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=match):
        load_tokenizer(str(tmp_path))


def test_loading_does_not_import_transformers(tmp_path):
    write_tokenizer(tmp_path)
    for name, content in FOLDERS["added_tokens_decoder"].items():
        write_json(tmp_path / name, content)
    program = f"""if True:
        import sys
        from nanovllm.text.tokenizer import load_tokenizer
        assert load_tokenizer({str(tmp_path)!r}).encode("<|im_end|>") == [257]
        assert "transformers" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


# ---- EOS -----------------------------------------------------------------------------------------------------------


def test_the_tokenizers_eos_ends_a_request(tmp_path):
    """A fine-tune's tokenizer_config.json names another EOS than its config.json and generation_config.json."""
    checkpoint = Checkpoint(Qwen3Config(**SHAPE), tmp_path)
    # One whose fourth token comes for the first time there, and ends nothing by the model's own files.
    prompts = (random_prompt(seed, 20) for seed in range(100))
    prompt, want = next(
        (prompt, want)
        for prompt in prompts
        if not set(want := checkpoint.greedy(prompt, 12, True)[0]) & set(EOS_TOKEN_IDS) and want.index(want[3]) == 3
    )
    eos = want[3]
    # Its ids are the model's: the tokens before it are characters, and the rest of the vocabulary is unknown.
    vocabulary = [chr(0x4E00 + i) for i in range(eos)] + ["<|im_end|>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    params = SamplingParams(temperature=0, max_tokens=12)
    results = []
    for content in (config(), config(eos_token="<|im_end|>")):
        write_json(tmp_path / "tokenizer_config.json", content)
        with LLM(str(tmp_path), device="cpu", kvcache_block_size=16, max_model_len=128) as llm:
            results += llm.generate(list(prompt), params, use_tqdm=False)
            ignoring = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            assert llm.generate(list(prompt), ignoring, use_tqdm=False)[0]["token_ids"] == want
    assert (results[0]["token_ids"], results[0]["finish_reason"]) == (want, "length")
    assert (results[1]["token_ids"], results[1]["finish_reason"]) == (want[:4], "stop")
    assert "<|im_end|>" not in results[1]["text"]
