"""Tokens to text: stop strings, streaming, whole characters, chat, and driving the engine by hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from checkpoints import SHAPE, Checkpoint, random_prompt
from engines import check_idle
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen3Config

import nanovllm.demo
from nanovllm import LLM, SamplingParams
from nanovllm.sampling_params import RequestOutputKind
from nanovllm.text.tokenizer import LONG_TEXT, load_tokenizer

DEMO = Path(nanovllm.demo.__file__).parent
TOKENIZER = load_tokenizer(str(DEMO))
HF_TOKENIZER = AutoTokenizer.from_pretrained(DEMO)
EOS_TOKEN_ID = HF_TOKENIZER.eos_token_id
ANSWERS = {
    line["question"]: line["answer"]
    for line in map(json.loads, (DEMO / "questions.jsonl").read_text(encoding="utf-8").splitlines())
}
INTRODUCTION = ANSWERS["introduce yourself"]
QUESTION = [{"role": "user", "content": "introduce yourself"}]
MIXED_TEXTS = [
    "plain text",
    "naïve café",
    "你好，世界！很高兴",
    "👋🏽 waves 👩‍👩‍👧‍👦 and 🇩🇪",
    "a🦀",
    "猫",
    "\n\n  spaces  \t",
    "עברית ✓",
]


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def greedy(**options) -> SamplingParams:
    return SamplingParams(temperature=0, **{"max_tokens": 200} | options)


@pytest.fixture(scope="module")
def demo():
    """The demo model, which knows its answers by heart."""
    with LLM(str(DEMO), device="cpu", dtype="float32", kvcache_block_size=16, max_model_len=512) as llm:
        yield llm


@pytest.fixture(scope="module")
def babbler(tmp_path_factory):
    """A random model with the demo's tokenizer: its text is full of broken characters."""
    folder = tmp_path_factory.mktemp("babbler")
    Checkpoint(Qwen3Config(**SHAPE | {"vocab_size": 2048}), folder)
    write_demo_tokenizer(folder)
    with LLM(str(folder), device="cpu", kvcache_block_size=16, max_model_len=512, max_num_seqs=32) as llm:
        yield llm


def answer(llm: LLM, params: SamplingParams) -> dict:
    result = llm.chat(QUESTION, params, use_tqdm=False)[0]
    check_idle(llm)
    return result


def prompt_ids(messages=QUESTION) -> list[int]:
    return encode(HF_TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


# ---- the tokenizer, by itself and transformers' --------------------------------------------------------------------


def write_demo_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)


def write_legacy_tokenizer(folder: Path) -> None:
    """The demo's in the format of GPT-2: no tokenizer.json, and no chat template."""
    TOKENIZER.backend.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))


def write_metaspace_tokenizer(folder: Path) -> None:
    """As SentencePiece makes them: spaces belong to words, BOS comes first, an unknown character becomes its bytes.

    It is saved as it may have been while a model was trained: prompts are to be cut to 8 tokens and padded to 40.
    """
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("i", "n"), ("e", "s"), ("e", "r"), ("▁", "▁")]
    characters = "▁abcdefghijklmnopqrstuvwxyz.,[]ï"
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *map("".join, merges)]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=40, pad_id=2, pad_token="</s>")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("write", [write_demo_tokenizer, write_legacy_tokenizer, write_metaspace_tokenizer])
def test_token_ids_and_texts_are_those_of_transformers(tmp_path, write):
    write(tmp_path)
    ours, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    texts = [
        *MIXED_TEXTS,
        " ".join(MIXED_TEXTS) * (LONG_TEXT // 80),
        "",
        " the  tin",
        "the <s>tin</s> or <|im_end|>",
        *ANSWERS.values(),
    ]
    for text in texts:
        token_ids = theirs.encode(text)
        assert ours.encode(text) == token_ids
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        for ids in (token_ids, token_ids[1:-1], token_ids[::-1]):
            want = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert ours.decode(ids) == want


def test_long_texts_let_other_threads_run():
    text = "words 你好 " * 60_000
    assert len(text) > LONG_TEXT
    thread = threading.Thread(target=TOKENIZER.encode, args=(text,))
    thread.start()
    num_turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        num_turns += 1
    assert num_turns > 20


def test_the_engine_neither_cuts_nor_pads_prompts(tmp_path, monkeypatch):
    """Prompts get the BOS, chats have only their template's."""
    Checkpoint(Qwen3Config(**SHAPE), tmp_path)
    write_metaspace_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    with LLM(str(tmp_path), device="cpu", kvcache_block_size=16) as llm:
        for text in ("the", "in the end the tin was an iron 中 👋" * 3):
            token_ids = llm.requests[llm.add_request(text)].seqs[0].token_ids
            assert token_ids == theirs.encode(text) and token_ids.count(1) == 1
        monkeypatch.setattr(llm, "generate", lambda prompts, *options: prompts)
        (prompt,) = llm.chat(QUESTION)
        token_ids = prompt["prompt_token_ids"]
        assert token_ids[0] == 1 and token_ids.count(1) == 1
        assert theirs.decode(token_ids[1:]) == "[user] introduce yourself"


def test_chat_needs_a_template(tmp_path):
    Checkpoint(Qwen3Config(**SHAPE | {"vocab_size": 2048}), tmp_path)
    write_legacy_tokenizer(tmp_path)
    with LLM(str(tmp_path), device="cpu", kvcache_block_size=16) as llm:
        with pytest.raises(ValueError, match="chat template"):
            llm.chat(QUESTION)
        check_idle(llm)
        assert llm.generate("introduce", greedy(max_tokens=2), use_tqdm=False)


def test_only_chats_import_transformers():
    """Its import takes longer than all else of a start."""
    program = f"""if __name__ == "__main__":
    import sys
    from nanovllm import LLM, SamplingParams
    with LLM({str(DEMO)!r}, device="cpu", max_model_len=64, kvcache_block_size=16) as llm:
        llm.generate("introduce", SamplingParams(max_tokens=2, stop="x"), use_tqdm=False)
        assert "transformers" not in sys.modules
        llm.chat({QUESTION!r}, SamplingParams(max_tokens=2), use_tqdm=False)
    """
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


# ---- through the engine --------------------------------------------------------------------------------------------


def test_eos_is_not_in_the_text(demo):
    result = answer(demo, greedy())
    assert result["text"] == INTRODUCTION
    assert result["token_ids"] == [*encode(INTRODUCTION), EOS_TOKEN_ID]
    assert result["finish_reason"] == "stop"


def test_ignore_eos(demo):
    result = answer(demo, greedy(ignore_eos=True, max_tokens=150))
    assert len(result["token_ids"]) == 150 and result["finish_reason"] == "length"
    assert result["text"].startswith(INTRODUCTION) and EOS_TOKEN_ID in result["token_ids"]


def test_length_ends_in_the_middle(demo):
    token_ids = encode(INTRODUCTION)
    result = answer(demo, greedy(max_tokens=10))
    assert result["token_ids"] == token_ids[:10] and result["finish_reason"] == "length"
    assert result["text"] == TOKENIZER.decode(token_ids[:10])
    result = answer(demo, greedy(max_tokens=len(token_ids) - 1))  # the last one ends the waving hand
    assert result["text"] == INTRODUCTION[:-1] and "\ufffd" not in result["text"]


def test_stop_token_ids(demo):
    token_ids = encode(INTRODUCTION)
    stop = next(token_id for token_id in token_ids[8:] if token_ids.count(token_id) == 1)
    end = token_ids.index(stop)
    for params in (greedy(stop_token_ids=[stop]), greedy(stop_token_ids=[stop], ignore_eos=True)):
        result = answer(demo, params)
        assert result["token_ids"] == token_ids[: end + 1] and result["finish_reason"] == "stop"
        assert result["text"] == TOKENIZER.decode(token_ids[:end])
    assert "".join(demo.stream(prompt_ids(), greedy(stop_token_ids=[stop]))) == TOKENIZER.decode(token_ids[:end])


@pytest.mark.parametrize(
    "stop",
    [
        " Qwen3",
        "of a few mega",
        "wen",
        ["nowhere to be found", "megabytes", " two hundred"],
        "👋",
        "I",
        ["\n", ". 👋"],
    ],
    ids=str,
)
def test_stop_strings(demo, stop):
    strings = [stop] if isinstance(stop, str) else stop
    end = min(INTRODUCTION.find(string) for string in strings if string in INTRODUCTION)
    result = answer(demo, greedy(stop=stop))
    assert result["text"] == INTRODUCTION[:end] and result["finish_reason"] == "stop"
    assert len(result["token_ids"]) < len(encode(INTRODUCTION)) + 1
    taken = list(demo.stream(prompt_ids(), greedy(stop=stop)))
    assert "".join(taken) == INTRODUCTION[:end] and "" not in taken
    check_idle(demo)


def test_a_stop_string_that_never_comes(demo):
    result = answer(demo, greedy(stop="👋👋"))
    assert result["text"] == INTRODUCTION and result["token_ids"][-1] == EOS_TOKEN_ID
    assert "".join(demo.stream(prompt_ids(), greedy(stop="👋👋"))) == INTRODUCTION


def test_a_stop_string_is_not_looked_for_in_the_prompt(demo):
    """The prompt has the string, and its end together with the first token would make it up."""
    assert answer(demo, greedy(stop=["user", "\nI", "assistant\n"]))["text"] == INTRODUCTION


@pytest.mark.parametrize("stop", [None, ["e", " a"], "\n"], ids=str)
def test_streamed_pieces_are_the_text(babbler, stop):
    """Random tokens, among them many bytes that are no character."""
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=50, stop=stop) for seed in range(12)]
    prompts = [list(random_prompt(seed, 12, 2048)) for seed in range(12)]
    results = babbler.generate(prompts, params, use_tqdm=False)
    assert any("\ufffd" in result["text"] for result in results) or stop
    for prompt, param, result in zip(prompts, params, results, strict=True):
        taken = list(babbler.stream(prompt, param))
        assert "".join(taken) == result["text"] and "" not in taken
        # Only the text's own end may be a character that never became whole.
        assert not any(piece.endswith("\ufffd") for piece in taken[:-1])
    check_idle(babbler)


def test_streaming_is_streaming(demo):
    stream = demo.stream("introduce yourself", greedy(max_tokens=30, ignore_eos=True))
    first = next(stream)
    assert demo.requests and first
    assert len([first, *stream]) > 10
    check_idle(demo)


def test_an_abandoned_stream_frees_its_request(demo):
    stream = demo.stream(prompt_ids(), greedy())
    next(stream)
    assert not demo.is_finished()
    stream.close()
    check_idle(demo)
    demo.stream(prompt_ids(), greedy())  # never begun
    check_idle(demo)


def test_streams_and_generate_interleave(demo):
    questions = list(ANSWERS)[:3]
    first, second = (
        demo.stream(prompt_ids([{"role": "user", "content": question}]), greedy()) for question in questions[:2]
    )
    texts = [next(first), next(second)]
    texts[0] += next(first)
    result = demo.chat([{"role": "user", "content": questions[2]}], greedy(max_tokens=20), use_tqdm=False)[0]
    assert ANSWERS[questions[2]].startswith(result["text"]) and len(result["token_ids"]) == 20
    texts[1] += next(second) + "".join(second)
    texts[0] += "".join(first)
    assert texts == [ANSWERS[question] for question in questions[:2]]
    check_idle(demo)


def test_generate_finishes_while_a_stream_waits(demo):
    """The stream's request ends inside `generate`; its text is still all there afterwards."""
    stream = demo.stream(prompt_ids(), greedy())
    text = next(stream)
    demo.generate("x", greedy(ignore_eos=True), use_tqdm=False)
    assert text + "".join(stream) == INTRODUCTION
    check_idle(demo)


def test_chat(demo):
    questions = list(ANSWERS)[2:5]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    results = demo.chat(conversations, greedy(), use_tqdm=False)
    assert [result["text"] for result in results] == [ANSWERS[question] for question in questions]
    assert demo.chat(tuple(conversations[0]), greedy(), use_tqdm=False)[0]["text"] == ANSWERS[questions[0]]
    assert demo.chat([], use_tqdm=False) == []
    prompts = [
        HF_TOKENIZER.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        for conversation in conversations
    ]
    assert [result["text"] for result in demo.generate(prompts, greedy(), use_tqdm=False)] == [
        result["text"] for result in results
    ]


def test_a_second_turn_hits_the_first(demo):
    demo.reset_prefix_cache()
    first = answer(demo, greedy())
    turns = [*QUESTION, {"role": "assistant", "content": first["text"]}, {"role": "user", "content": "And now?"}]
    result = demo.chat(turns, greedy(max_tokens=5), use_tqdm=False)[0]
    num_computed = len(prompt_ids()) + len(first["token_ids"]) - 1
    assert result["num_cached_tokens"] == num_computed // 16 * 16 > len(prompt_ids())


def test_driving_the_engine_by_hand(demo):
    questions = list(ANSWERS)[:4]
    assert demo.is_finished() and demo.step() == []
    once = {"output_kind": RequestOutputKind.FINAL_ONLY}
    ids = [
        demo.add_request(prompt_ids([{"role": "user", "content": question}]), greedy(**once)) for question in questions
    ]
    late, results = None, {}
    for step in range(1000):
        if demo.is_finished():
            break
        finished = {int(result["request_id"]): result for result in demo.step()}
        assert not set(finished) & set(results), "a result is handed out once"
        results.update(finished)
        if step == 5:
            demo.abort_request(ids[1])
            late = demo.add_request("introduce", greedy(max_tokens=3, ignore_eos=True, **once))
    assert sorted(results) == sorted({*ids, late} - {ids[1]})
    for request_id, question in zip(ids, questions, strict=True):
        if request_id != ids[1]:
            assert results[request_id]["text"] == ANSWERS[question]
    assert len(results[late]["token_ids"]) == 3
    check_idle(demo)


def test_generate_leaves_the_results_of_others(demo):
    """A request that ends while `generate` runs is handed out by the next `step`, and `generate` returns its own."""
    request_id = demo.add_request(prompt_ids(), greedy(max_tokens=4))
    result = demo.generate(prompt_ids(), greedy(max_tokens=9), use_tqdm=False)
    assert len(result) == 1 and len(result[0]["token_ids"]) == 9
    assert not demo.is_finished()
    assert [(int(result["request_id"]), len(result["token_ids"])) for result in demo.step()] == [(request_id, 4)]
    check_idle(demo)


def test_the_progress_bar(demo, capsys):
    demo.generate(["a", "b", "c"], greedy(max_tokens=3, ignore_eos=True), use_tqdm=True)
    shown = capsys.readouterr().err
    assert "3/3" in shown and "prefill" in shown and "decode" in shown and "tok/s" in shown
    demo.generate("a", greedy(max_tokens=3), use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_an_interrupted_generate_leaves_nothing(demo, monkeypatch):
    """Requests of the call that are waiting, running or finished are dropped; the next call works."""

    class Interrupted(tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    params = [greedy(max_tokens=n, ignore_eos=True) for n in (2, 2, 50, 50)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nanovllm.reports.progress.tqdm", Interrupted)
        demo.generate(["a", "b", "c", "d"], params, use_tqdm=True)
    check_idle(demo)
    assert answer(demo, greedy())["text"] == INTRODUCTION
