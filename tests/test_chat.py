"""Conversations to prompts: what transformers' apply_chat_template makes of them, contents in parts included."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from checkpoints import SHAPE, Checkpoint
from engines import check_idle
from test_text import ANSWERS, DEMO, QUESTION
from tokenizer_kinds import KINDS
from transformers import AutoTokenizer, Qwen3Config

from nanovllm import LLM, SamplingParams
from nanovllm.text.chat_template import ChatTemplate

AS_STRINGS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
CONCATENATED = "{% for m in messages %}{{ '[' + m.role + '] ' + m.content }}{% endfor %}"
IF_STRING = "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}"
AS_JSON = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
IN_PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endif %}{% endfor %}"
)
# As vision models have it: the system's content is a string, the user's may be parts.
MIXED = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}"
    "{% for m in messages if m.role == 'user' %}{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endfor %}"
)


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.fixture
def template(tmp_path):
    """Makes the template of a folder."""

    def make(source: str, **config: object) -> ChatTemplate:
        KINDS["byte_level"](tmp_path)
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": source} | config))
        return ChatTemplate.from_folder(str(tmp_path))

    return make


@pytest.mark.parametrize("source", [AS_STRINGS, CONCATENATED, IF_STRING, AS_JSON])
def test_parts_are_joined_for_a_template_of_strings(template, source):
    made = template(source)
    in_parts = [{"role": "user", "content": parts("Hello", "world")}]
    assert made.render(in_parts) == made.render([{"role": "user", "content": "Hello\nworld"}])
    assert "Hello" in made.render(in_parts) and "'type'" not in made.render(in_parts)


def test_parts_are_handed_on_to_a_template_that_loops_over_them(template):
    made = template(IN_PARTS)
    assert made.render([{"role": "user", "content": parts("Hello", "world")}]) == "[user]<Hello><world>"
    assert made.render([{"role": "user", "content": "Hello"}]) == "[user]Hello"


def test_a_template_that_loops_for_one_role_only(template):
    messages = [{"role": "system", "content": parts("Be", "kind")}, {"role": "user", "content": parts("a", "b")}]
    assert template(MIXED).render(messages) == "Be\nkind<a><b>"


def test_messages_are_handed_on_as_they_are(template):
    """A missing content stays missing, and what else a message has is there."""
    source = "{% for m in messages %}{{ m.content is defined }} {{ m.tool_calls | length }}{% endfor %}"
    messages = [{"role": "assistant", "tool_calls": [{"name": "f"}]}]
    assert template(source).render(messages) == "False 1"
    assert messages == [{"role": "assistant", "tool_calls": [{"name": "f"}]}]


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ({"type": "image_url", "image_url": {"url": "x.png"}}, "text only.*image_url"),
        ({"type": "image"}, "text only.*image"),
        ({"type": "text"}, "text only.*type.*text"),
        ({"type": "text", "text": 5}, "text only.*5"),
        ("Hello", "text only.*Hello"),
    ],
    ids=str,
)
@pytest.mark.parametrize("source", [AS_STRINGS, IN_PARTS], ids=["strings", "parts"])
def test_a_part_that_is_no_text(template, source, part, match):
    with pytest.raises(ValueError, match=match):
        template(source).render([{"role": "user", "content": [*parts("Look:"), part]}])


@pytest.mark.parametrize(
    ("messages", "error", "match"),
    [
        ([], ValueError, "messages.*none"),
        ("Hello", TypeError, "list of messages.*Hello"),
        ([{"content": "Hello"}], TypeError, "role.*Hello"),
        ([{"role": 5, "content": "Hello"}], TypeError, "role.*5"),
        (["Hello"], TypeError, "role.*Hello"),
        ([{"role": "user", "content": 5}], TypeError, "content.*5"),
    ],
    ids=str,
)
def test_bad_messages(template, messages, error, match):
    with pytest.raises(error, match=match):
        template(AS_STRINGS).render(messages)


def test_what_a_template_refuses(template):
    made = template("{{ raise_exception('roles must alternate, got ' + messages[0].role) }}")
    with pytest.raises(ValueError, match="roles must alternate, got tool"):
        made.render([{"role": "tool", "content": "x"}])


VARIABLES = {
    "bos_token": ("{{ bos_token }}", "<s>"),
    "eos_token": ("{{ eos_token }}", "</s>"),
    "tools": ("{{ tools is none }}", "True"),
    "strftime_now": ("{{ strftime_now('%Y') | length }}", "4"),
    "tojson": ("{{ messages[0].content | tojson }}", "\"<a href='x'> & 中\""),
    "generation": ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
    "loopcontrols": ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    "add_generation_prompt": ("{% if add_generation_prompt %}>{% endif %}", ">"),
    "trim_blocks": ("a\n{% if true %}\n  b\n{% endif %}", "a\n  b\n"),
}


@pytest.mark.parametrize(("source", "want"), VARIABLES.values(), ids=VARIABLES)
def test_the_variables_of_a_template_are_those_of_transformers(template, source, want):
    messages = [{"role": "user", "content": "<a href='x'> & 中"}]
    made = template(source)
    assert made.render(messages) == want
    theirs = AutoTokenizer.from_pretrained(made.tokenizer.name_or_path)
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == want


# ---- through the engine --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    with LLM(str(DEMO), device="cpu", dtype="float32", kvcache_block_size=16, max_model_len=512) as llm:
        yield llm


def test_chat_takes_parts(demo):
    greedy = SamplingParams(temperature=0, max_tokens=200)
    for question in list(ANSWERS)[:2]:
        messages = [{"role": "user", "content": parts(question)}]
        assert demo.chat(messages, greedy, use_tqdm=False)[0]["text"] == ANSWERS[question]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([QUESTION, [{"role": "user", "content": [{"type": "image"}]}]], ValueError),
        ([QUESTION, []], ValueError),
        ("Hello", TypeError),
        (None, TypeError),
        ([QUESTION, "Hello"], TypeError),
    ],
    ids=lambda value: str(value)[-30:],
)
def test_a_bad_conversation_refuses_the_list(demo, messages, error):
    num_requests = demo.num_requests
    with pytest.raises(error):
        demo.chat(messages, use_tqdm=False)
    assert demo.num_requests == num_requests
    check_idle(demo)


def test_a_long_conversation_is_not_printed_whole(template):
    made = template("{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match="cannot render") as raised:
        made.render([{"role": "user", "content": "x" * 10**6}])
    assert len(str(raised.value)) < 1000


def test_a_template_in_a_file_of_its_own(tmp_path):
    Checkpoint(Qwen3Config(**SHAPE), tmp_path)
    KINDS["byte_level"](tmp_path)
    Path(tmp_path, "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with LLM(str(tmp_path), device="cpu", kvcache_block_size=16, max_model_len=64) as llm:
        assert re.fullmatch("x", llm.chat_template.render([{"role": "user", "content": "x"}]))
