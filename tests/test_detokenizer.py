"""Tokens to text by themselves: whole characters, stop strings, and the text of one whole decode at any time."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import MIXED_TEXTS, TOKENIZER, encode
from text_fuzz import Kind
from tokenizer_kinds import KINDS

from nanovllm.text.detokenizer import Detokenizer
from nanovllm.text.tokenizer import Tokenizer


def pieces(token_ids: list[int], stop: tuple[str, ...] = (), tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    """What is streamed after each token, and at the end."""
    detokenizer = Detokenizer(tokenizer, stop)
    taken = []
    for token_id in token_ids:
        is_stopped = detokenizer.push([token_id]) is not None
        taken.append(detokenizer.take(is_stopped))
        if is_stopped:
            break
    taken.append(detokenizer.take(True))
    assert "".join(taken) == detokenizer.text
    return taken


# ---- every kind of tokenizer ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    return Kind(request.param, tmp_path_factory.mktemp("kinds") / request.param)


def test_texts_are_those_of_transformers(kind):
    """Random tokens one by one with random stop strings, compared with one whole decode; see text_fuzz.py for more."""
    draw = random.Random(0)
    for _ in range(600):
        kind.check(draw)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tokenizer with byte fallback."""
    return Kind("metaspace_bpe", tmp_path_factory.mktemp("kinds") / "llama").ours


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    return [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in data]


def test_a_run_of_bytes_longer_than_any_window(llama):
    text = "你好，世界！很高兴认识你" * 4
    for taken in (
        pieces(byte_tokens(llama, text.encode()), tokenizer=llama),
        pieces(llama.encode(text), tokenizer=llama),
    ):
        assert "".join(taken) == text


def test_a_run_of_bytes_is_streamed_once_it_has_ended(llama):
    """Before that a further byte may make every one of it U+FFFD."""
    run, (the,) = byte_tokens(llama, "你".encode()), [llama.backend.token_to_id("▁the")]
    assert pieces([the, *run, the], tokenizer=llama) == ["the", "", "", "", "你 the", ""]
    broken = pieces([the, *run, *byte_tokens(llama, b"\xff"), the], tokenizer=llama)
    assert broken == ["the", "", "", "", "", "\ufffd" * 4 + " the", ""]


def test_a_stop_string_within_a_run_of_bytes(llama):
    run = byte_tokens(llama, "你好".encode())
    assert pieces(run, stop=("好",), tokenizer=llama) == ["", "", "", "", "", "你", ""]
    detokenizer = Detokenizer(llama, ("你",))
    assert [detokenizer.push([token_id]) for token_id in run[:3]] == [None, None, "你"]


def test_the_text_is_that_of_the_completion_alone(llama):
    """As transformers and nano-vllm have it: no space at the beginning, whatever the prompt was."""
    the = llama.backend.token_to_id("▁the")
    assert "".join(pieces([the, the], tokenizer=llama)) == llama.decode([the, the]) == "the the"


# ---- whole characters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", MIXED_TEXTS)
def test_whole_characters(text):
    taken = pieces(encode(text))
    assert "".join(taken) == text
    assert not any("\ufffd" in piece for piece in taken)


def test_a_character_begun_in_the_prompt_is_broken():
    rest = encode("🦀")[1:]
    assert "".join(pieces(rest + encode("a"))) == TOKENIZER.decode(rest) + "a" != "a"


def test_characters_are_split_between_tokens_here():
    """Otherwise the tests above would show nothing."""
    assert all(len(encode(character)) > 1 for character in ("🦀", "猫", "ï"))
    assert "\ufffd" in TOKENIZER.decode(encode("🦀")[:-1])


def test_an_incomplete_character_at_the_end_is_held_back():
    assert "".join(pieces(encode("done 🦀")[:-1])) == "done "


TOKEN_IDS = st.lists(st.one_of(st.integers(0, 3327), st.integers(0, 255)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(token_ids=TOKEN_IDS, cuts=st.lists(st.integers(0, 60)))
def test_text_does_not_depend_on_when_tokens_come(token_ids, cuts):
    """One at a time, in any groups or all at once; broken bytes in the middle are what the tokenizer makes of them."""
    whole = Detokenizer(TOKENIZER)
    whole.push(token_ids)
    assert "".join(pieces(token_ids)) == whole.text
    grouped = Detokenizer(TOKENIZER)
    borders = [0, *sorted(cuts), len(token_ids)]
    for start, end in pairwise(borders):
        grouped.push(token_ids[start:end])
    assert grouped.text == whole.text == TOKENIZER.decode(token_ids).rstrip("\ufffd")


# ---- stop strings --------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from("ab猫🦀 "), max_size=30),
    stop=st.lists(st.text(st.sampled_from("ab猫🦀 "), min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_cut_the_text(text, stop):
    """The text ends before the stop string that is complete first; nothing of it is ever streamed."""
    token_ids = encode(text)
    taken = pieces(token_ids, stop=tuple(stop))
    streamed = "".join(taken)
    ends = {text.find(string) for string in stop} - {-1}
    if not ends:
        assert streamed == text
    else:
        assert text.startswith(streamed) and not any(string in streamed for string in stop)
        assert any(text.startswith(string, len(streamed)) for string in stop)
        first_end = min(text.find(string) + len(string) for string in stop if string in text)
        assert len(streamed) <= first_end
    for end in range(len(taken)):  # at no time more than the final text
        assert streamed.startswith("".join(taken[:end]))


def test_the_earliest_of_stop_strings_in_one_token():
    token_ids = encode(" inference")
    assert len(token_ids) == 1
    assert "".join(pieces(token_ids, stop=("rence", "fer", "zz"))) == " in"
