"""An answer is taken apart alike, wherever the pieces in which it comes are cut."""

from __future__ import annotations

import json
import random

import pytest

pytest.importorskip("pydantic", reason="needs pydantic, which the extra [test] brings")
from nanovllm.openai_api.parsing import AnswerParser

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
WEATHER = ("weather", {"city": "Paris"})
CASES = [  # text, has tools, is reasoning; then reasoning, content, calls
    ("plain", False, False, "", "plain", []),
    ("", True, False, "", "", []),
    ("  kept \n", True, False, "", "  kept \n", []),
    ("<think>\nso\n\nthen \n</think>\n\nyes ", False, False, "so\n\nthen", "yes ", []),
    ("\n <think>so</think>yes", False, False, "so", "yes", []),
    ("<think></think>yes", False, False, "", "yes", []),
    ("so\n</think>\nyes", False, True, "so", "yes", []),
    ("<think>so it never ends ", False, False, "so it never ends ", "", []),
    ("never ends </thi", False, True, "never ends </thi", "", []),
    ("yes <think>no</think>", False, False, "", "yes <think>no</think>", []),
    ("<thin", False, False, "", "<thin", []),
    (CALL, True, False, "", "", [WEATHER]),
    (CALL, False, False, "", CALL, []),
    (f"I look. \n{CALL}\n{CALL}\n", True, False, "", "I look.", [WEATHER, WEATHER]),
    (f"<think>\nso\n</think>\n\n{CALL}", True, False, "so", "", [WEATHER]),
    (f"{CALL}\nand more", True, False, "", "and more", [WEATHER]),
    ('<tool_call>{"name": "now"}</tool_call>', True, False, "", "", [("now", {})]),
    ("<tool_call>no json</tool_call> end", True, False, "", "<tool_call>no json</tool_call>end", []),
    ("<tool_call>[1]</tool_call>", True, False, "", "<tool_call>[1]</tool_call>", []),
    ('<tool_call>{"name": 5}</tool_call>', True, False, "", '<tool_call>{"name": 5}</tool_call>', []),
    ('a <tool_call>{"name": ', True, False, "", 'a<tool_call>{"name": ', []),
    ("1 < 2 <tool", True, False, "", "1 < 2 <tool", []),
]


def parse(pieces: list[str], has_tools: bool, is_reasoning: bool) -> tuple:
    parser = AnswerParser(has_tools, is_reasoning)
    parts = [parser.push(piece, index == len(pieces) - 1) for index, piece in enumerate(pieces)]
    calls = [call for part in parts for call in part.calls]
    assert [call["index"] for call in calls] == list(range(parser.num_calls))
    functions = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts), functions


def test_a_call_that_is_nested_too_deeply_is_content():
    text = "<tool_call>" + "[" * 100_000 + "</tool_call>"
    assert parse([text], True, False) == ("", text, [])


@pytest.mark.parametrize(("text", "has_tools", "is_reasoning", "reasoning", "content", "calls"), CASES)
def test_answers(text, has_tools, is_reasoning, reasoning, content, calls):
    want = (reasoning, content, calls)
    assert parse([text], has_tools, is_reasoning) == want
    assert parse([*text, ""], has_tools, is_reasoning) == want
    draw = random.Random(0)
    for _ in range(50):
        cuts = sorted(draw.randint(0, len(text)) for _ in range(draw.randint(1, 5)))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parse(pieces, has_tools, is_reasoning) == want


@pytest.mark.parametrize(
    ("text", "calls"), [('{"name": "say", "arguments": {"a": "</tool_call>"}}', 1), ('{"name"', 0)]
)
def test_an_answer_that_is_a_call(text, calls):
    parser = AnswerParser(has_tools=True, is_reasoning=True, is_call=True)
    assert parser.push(text[:9], False) == parser.push(text[9:12], False) == ("", "", [])
    got = parser.push(text[12:], True)
    assert got.reasoning == "" and got.content == ("" if calls else text)
    assert [call["function"]["arguments"] for call in got.calls] == ['{"a": "</tool_call>"}'] * calls


def test_text_without_tools_is_not_held_back():
    parser = AnswerParser(has_tools=False, is_reasoning=False)
    assert parser.push("a <tool", False).content == "a <tool"
    parser = AnswerParser(has_tools=True, is_reasoning=False)
    assert parser.push("a <tool", False).content == "a"
    assert parser.push("s", False).content == " <tools"
