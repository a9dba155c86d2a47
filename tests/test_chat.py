"""Conversations to prompts: what transformers' apply_chat_template makes of them, contents in parts included."""

from __future__ import annotations

import copy
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
from nanovllm.chat.template import MOST_ROLES, NUM_KEPT, ChatTemplate

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
# As Qwen's: tools in the system's message, calls and their results, and thoughts that can be turned off.
WITH_TOOLS = """
{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>
{{- 'user' if m.role == 'tool' else m.role }}
{% if m.role == 'tool' %}<response id="{{ m.tool_call_id }}">{{ m.content }}</response>
{%- else %}{{ m.content or '' }}{% endif %}
{%- for call in m.tool_calls or [] %}<call>{{ call.function.name }}
{%- for name, value in call.function.arguments.items() %} {{ name }}={{ value | tojson }}{% endfor %}</call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
ONLY_PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endfor %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
GREEDY = SamplingParams(temperature=0, max_tokens=200)


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.fixture
def template(tmp_path):
    """Makes the template of a folder."""

    def make(source: str | list[dict] | None, **config: object) -> ChatTemplate:
        KINDS["byte_level"](tmp_path)
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": source} | config))
        return ChatTemplate.from_folder(str(tmp_path))

    return make


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "ClassOfALaterVersion", "extra_special_tokens": ["<x>"]},
        {"tokenizer_class": "ClassOfTheirs", "auto_map": {"AutoTokenizer": ["code.ClassOfTheirs", None]}},
    ],
)
def test_a_tokenizer_of_an_unknown_class(template, monkeypatch, config):
    """As transformers before 5 finds "TokenizersBackend": a template and tokenizer.json need none."""
    known = template(AS_STRINGS).render([{"role": "user", "content": "Hello"}])
    assert template(AS_STRINGS, **config).render([{"role": "user", "content": "Hello"}]) == known

    def refuse(*args, **options):
        raise ValueError("the class does not exist")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    assert template(AS_STRINGS, **config).render([{"role": "user", "content": "Hello"}]) == known


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


@pytest.mark.parametrize(
    ("source", "want"),
    [
        (AS_STRINGS, "[developer] Be kind\n[user] a\n"),
        (IN_PARTS, "[developer]<Be kind>[user]a"),
        (MIXED, "Be kind<a>"),
        ("{{ raise_exception('') if messages[0].role != 'system' }}{{ messages[0].content }}", "Be kind"),
    ],
)
def test_a_developer_is_the_system_where_a_template_knows_none(template, source, want):
    content = parts("Be kind") if source == IN_PARTS else "Be kind"
    assert (
        template(source).render([{"role": "developer", "content": content}, {"role": "user", "content": "a"}]) == want
    )


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


def test_what_is_known_of_roles_is_bounded(template):
    """They are whatever clients call them."""
    made = template(AS_STRINGS)
    for number in range(NUM_KEPT + 5):
        assert made.render([{"role": f"role {number}", "content": "Hello"}]) == f"[role {number}] Hello\n"
    assert 0 < len(made._shown) <= NUM_KEPT
    messages = [{"role": f"role {number}", "content": "Hello"} for number in range(MOST_ROLES + 1)]
    assert made.render(messages[:-1] * 9).count("Hello") == 9 * MOST_ROLES
    with pytest.raises(ValueError, match="at most 16 roles, got 17"):
        made.render(messages)


def test_what_a_template_refuses(template):
    made = template("{{ raise_exception('roles must alternate, got ' + messages[0].role) }}")
    with pytest.raises(ValueError, match="roles must alternate, got tool"):
        made.render([{"role": "tool", "content": "x"}])


def with_calls(*arguments: object) -> list[dict]:
    """A conversation with calls of a tool, and what they gave."""
    functions = [{"name": "weather", "arguments": value} for value in arguments]
    calls = [{"id": str(i), "type": "function", "function": function} for i, function in enumerate(functions)]
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How is it in Köln?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        *({"role": "tool", "tool_call_id": call["id"], "content": f"{call['id']} degrees"} for call in calls),
    ]


OBJECTS = ({"place": "Köln"}, {"place": "Bonn", "days": [1, 2]}, {})


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        (QUESTION, {}),
        (QUESTION, {"chat_template_kwargs": {"enable_thinking": False}}),
        (QUESTION, {"chat_template_kwargs": {"enable_thinking": True}}),
        (QUESTION, {"add_generation_prompt": False}),
        ([*QUESTION, {"role": "assistant", "content": "I am"}],
         {"add_generation_prompt": False, "continue_final_message": True}),
        (QUESTION, {"tools": [TOOL, TOOL]}),
        (QUESTION, {"tools": []}),
        (with_calls(*OBJECTS), {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}),
        (with_calls(*OBJECTS), {"add_generation_prompt": False}),
        (QUESTION, {"chat_template": AS_STRINGS}),
        (QUESTION, {"chat_template": "{{ tools|length }}{{ x }}", "tools": [TOOL], "chat_template_kwargs": {"x": 1}}),
    ],
    ids=lambda value: str(value)[-50:],
)  # fmt: skip
def test_the_prompt_is_that_of_transformers(template, messages, options):
    made = template(WITH_TOOLS)
    variables = options.get("chat_template_kwargs", {})
    others = {name: value for name, value in options.items() if name != "chat_template_kwargs"}
    others = {"add_generation_prompt": True} | others | variables
    want = made.tokenizer.apply_chat_template(messages, tokenize=False, **others)
    assert made.render(messages, **options) == want
    assert want != made.render(messages) or options in ({}, {"tools": []}) or variables == {"enable_thinking": True}


def test_arguments_of_tool_calls_may_be_json(template):
    made = template(WITH_TOOLS)
    messages = with_calls(*map(json.dumps, OBJECTS))
    before = copy.deepcopy(messages)
    want = made.render(with_calls(*OBJECTS))
    assert '<call>weather place="Köln"</call><call>weather place="Bonn" days=[1, 2]</call><call>weather</call>' in want
    assert made.render(messages) == want and messages == before
    assert made.render(with_calls("", None)) == made.render(with_calls({}, {}))
    with pytest.raises(ValueError, match=r"arguments must be JSON, got '\{place'"):
        made.render(with_calls("{}", "{place"))


@pytest.mark.parametrize(
    ("source", "content_format", "content", "want"),
    [
        (AS_STRINGS, "string", parts("a", "b"), "[user] a\nb\n"),
        (AS_STRINGS, "string", "a", "[user] a\n"),
        (AS_STRINGS, "openai", "a", "[user] [{'type': 'text', 'text': 'a'}]\n"),
        (IN_PARTS, "string", parts("a", "b"), "[user]a\nb"),
        (IN_PARTS, "openai", "a", "[user]<a>"),
        (IN_PARTS, "openai", parts("a", "b"), "[user]<a><b>"),
        (ONLY_PARTS, "auto", "a", "[user]<a>"),
        (ONLY_PARTS, "auto", parts("a", "b"), "[user]<a><b>"),
    ],
    ids=str,
)
def test_the_format_of_contents(template, source, content_format, content, want):
    messages = [{"role": "user", "content": content}]
    assert template(source).render(messages, chat_template_content_format=content_format) == want
    other = template("{{ raise_exception('another template') }}")
    assert other.render(messages, source, content_format) == want


def test_what_each_template_takes_is_found_out_for_itself(template):
    made = template(AS_STRINGS)
    messages = [{"role": "user", "content": parts("a", "b")}]
    for _ in range(2):
        assert made.render(messages) == "[user] a\nb\n"
        assert made.render(messages, IN_PARTS) == "[user]<a><b>"


def test_a_folder_of_several_templates(template):
    """Transformers picks one by its name, or that for tools if there are any."""
    sources = {"default": AS_STRINGS, "tool_use": "tools: {{ tools | length }}", "other": "other"}
    made = template([{"name": name, "template": source} for name, source in sources.items()])
    assert made.render(QUESTION) == "[user] introduce yourself\n"
    assert made.render(QUESTION, tools=[TOOL]) == "tools: 1"
    assert made.render(QUESTION, chat_template="other") == "other"
    with pytest.raises(ValueError, match=r"chat_template.*not the name of a file.*another"):
        made.render(QUESTION, chat_template="another")


def test_a_model_without_a_template(template):
    made = template(None)
    with pytest.raises(ValueError, match="no chat template: pass one as chat_template"):
        made.render(QUESTION)
    assert made.render(QUESTION, chat_template=AS_STRINGS) == "[user] introduce yourself\n"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"add_generation_prompt": True, "continue_final_message": True}, ValueError, "continue_final_message=True"),
        ({"continue_final_message": True}, ValueError, "add_generation_prompt=False"),
        ({"chat_template": 5}, TypeError, "chat_template.*5"),
        ({"chat_template": "template.jinja"}, ValueError, "chat_template.*not the name of a file.*jinja"),
        ({"chat_template": "{% for %}"}, ValueError, "cannot render"),
        ({"chat_template_content_format": "parts"}, ValueError, "chat_template_content_format.*'openai'.*'parts'"),
        ({"tools": TOOL}, TypeError, "tools must be a list.*weather"),
        ({"tools": ["weather"]}, ValueError, "cannot render"),
        ({"chat_template_kwargs": [1]}, TypeError, r"chat_template_kwargs.*\[1\]"),
        ({"chat_template_kwargs": {"tools": []}}, TypeError, "tools"),
        ({"chat_template_kwargs": {"tokenize": True}}, ValueError, "tokenize"),
    ],
    ids=str,
)
def test_bad_options_of_a_chat(template, options, error, match):
    with pytest.raises(error, match=match):
        template(WITH_TOOLS).render(QUESTION, **options)


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
    num_requests = demo.num_seqs
    with pytest.raises(error):
        demo.chat(messages, use_tqdm=False)
    assert demo.num_seqs == num_requests
    check_idle(demo)


def test_chat_hands_on_its_options(demo):
    """The answers are those to transformers' prompts."""
    conversations = [QUESTION, with_calls(*OBJECTS)]
    variables = {"enable_thinking": False}
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    results = demo.chat(
        conversations, params, False, chat_template=WITH_TOOLS, tools=[TOOL], chat_template_kwargs=variables
    )
    for messages, result in zip(conversations, results, strict=True):
        want = demo.get_tokenizer().apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, chat_template=WITH_TOOLS, tools=[TOOL], **variables
        )
        assert result["prompt"] == want and "<think>" in want and "# Tools" in want
        assert result["prompt_token_ids"] == demo.tokenizer.encode(want, add_special_tokens=False)
        assert result["token_ids"] == demo.generate(want, params, use_tqdm=False)[0]["token_ids"]


def test_the_model_goes_on_with_the_last_message(demo):
    answer = ANSWERS["introduce yourself"]
    begin = " ".join(answer.split(" ")[:4])
    messages = [*QUESTION, {"role": "assistant", "content": begin}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    (result,) = demo.chat(messages, GREEDY, use_tqdm=False, **options)
    assert begin + result["text"] == answer
    assert "".join(demo.stream(messages, GREEDY, **options)) == result["text"]


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
