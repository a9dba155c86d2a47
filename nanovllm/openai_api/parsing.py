"""What is in an answer, as it comes: reasoning in <think>, calls of tools in <tool_call>, and the rest.

These are the tags of Qwen's and of Hermes' templates. Nothing here knows of engines or HTTP.
"""

import json
import uuid
from typing import Any, NamedTuple

THINK, END_OF_THINK = "<think>", "</think>"
CALL, END_OF_CALL = "<tool_call>", "</tool_call>"


class Parts(NamedTuple):
    """What a piece of an answer adds; calls as OpenAI's API has them, each whole."""

    reasoning: str
    content: str
    calls: list[dict[str, Any]]


class AnswerParser:
    """Takes an answer apart, piece by piece.

    What may turn out to be a tag is held back, and so is white space that may stand before one: around a tag it is no
    part of the content or the reasoning. A text without tags is given out as it is.
    """

    def __init__(self, has_tools: bool, is_reasoning: bool, is_call: bool = False) -> None:
        """is_reasoning: the prompt has opened a <think> that the answer is to close; is_call: all of it is a call."""
        self.has_tools = has_tools
        self.is_call = is_call
        self.section = "reasoning" if is_reasoning else "start"
        self.num_calls = 0
        self._held = ""
        self._skips_space = is_reasoning  # behind a tag

    def push(self, text: str, is_last: bool) -> Parts:
        """Takes in the next piece; returns what it makes certain."""
        self._held += text
        sections: dict[str, str] = {"reasoning": "", "content": ""}
        calls: list[dict[str, Any]] = []
        if self.is_call:
            call = self._read_call(self._held) if is_last else None
            return Parts("", self._held if is_last and call is None else "", [call] if call is not None else [])
        if self.section == "start" and not self._has_started(is_last):
            return Parts("", "", [])
        while True:
            section, tag = self.section, self._next_tag()
            before, found, after = self._held.partition(tag) if tag is not None else (self._held, "", "")
            if found:
                before, self._held = before.rstrip(), after
            elif is_last or tag is None:
                self._held = ""
            else:
                before = "" if section == "call" else before[: self._num_certain(tag)]
                self._held = self._held[len(before) :]
            if section == "call":
                call = self._read_call(before) if found else None
                calls += [call] if call is not None else []
                if call is None and (found or is_last):
                    sections["content"] += CALL + before + found
            else:
                before = before.lstrip() if self._skips_space else before
                self._skips_space = self._skips_space and not before
                sections[section] += before
            if not found:
                return Parts(**sections, calls=calls)
            self.section = "call" if found == CALL else "content"
            self._skips_space = found != CALL

    def _has_started(self, is_last: bool) -> bool:
        """Finds out whether the answer begins with reasoning, once there is enough of it."""
        begin = self._held.lstrip()
        if begin.startswith(THINK):
            self.section, self._held, self._skips_space = "reasoning", begin[len(THINK) :], True
        elif is_last or not THINK.startswith(begin):
            self.section = "content"
        return self.section != "start"

    def _next_tag(self) -> str | None:
        """The tag that can end the section."""
        if self.section == "content":
            return CALL if self.has_tools else None
        return END_OF_THINK if self.section == "reasoning" else END_OF_CALL

    def _num_certain(self, tag: str) -> int:
        """How many characters of what is held can neither be of the tag nor white space before it."""
        text = self._held
        num_of_tag = next(size for size in range(len(tag) - 1, -1, -1) if text.endswith(tag[:size]))
        return len(text[: len(text) - num_of_tag].rstrip())

    def _read_call(self, text: str) -> dict[str, Any] | None:
        """The call of a tool that a JSON text asks for, None if it does not."""
        try:
            call = json.loads(text)
            function = {"name": call["name"], "arguments": json.dumps(call.get("arguments", {}), ensure_ascii=False)}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        if not isinstance(function["name"], str):
            return None
        self.num_calls += 1
        return {
            "index": self.num_calls - 1,
            "id": f"call_{uuid.uuid4().hex}",
            "type": "function",
            "function": function,
        }
