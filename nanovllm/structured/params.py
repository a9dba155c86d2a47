"""The form that a request asks its text to have, as the caller gives it.

Checked for what it can mean by itself; whether it can be compiled is for `compiler.py` to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.options.checks import Options, check_fields, check_text, checked_tuple

STRUCTURES = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(repr=False, slots=True)
class StructuredOutputsParams(Options):
    """The form a request's text must have: one of json, regex, choice, grammar and json_object.

    Attributes:
        json: a JSON schema, as text, as a dict or as a pydantic model's class; a class becomes its schema's dict.
        regex: a regular expression that the whole text matches.
        choice: strings, one of which is the text.
        grammar: a context-free grammar in EBNF.
        json_object: any JSON object.
        disable_fallback: False only; there is one backend and so nothing to fall back to.
        disable_any_whitespace: JSON is compact; by default the model may put whitespace where JSON allows it.
        disable_additional_properties: objects of a JSON schema have no properties that it does not name.
        whitespace_pattern, structural_tag: None only, refused with the reason.

    Raises:
        TypeError, ValueError: an option of another type, none or several forms, or what is not there.
    """

    json: str | dict[str, Any] | type | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def check(self) -> None:
        """Checks that one form is asked for, of the right type; turns a pydantic class into its schema."""
        if self.whitespace_pattern is not None:
            reason = "JSON has any whitespace or, with disable_any_whitespace, none; use regex for another"
            raise ValueError(f"whitespace_pattern is not supported: {reason}; got {self.whitespace_pattern!r}")
        if self.structural_tag is not None:
            reason = "a form holds for the whole text, not between tags; use grammar for a text with parts"
            raise ValueError(f"structural_tag is not supported: {reason}; got {self.structural_tag!r}")
        check_fields(self, {})
        if self.disable_fallback:
            raise ValueError("disable_fallback must be False, got True: there is no second backend to fall back to")
        given = [name for name in STRUCTURES if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(f"one of {', '.join(STRUCTURES)} must be given, got {' and '.join(given) or 'none'}")
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        if self.choice is not None:
            self.choice = checked_tuple("choice", self.choice, check_text)
            if not self.choice:
                raise ValueError("choice must hold at least one string, got none")
        if isinstance(self.json, type) and hasattr(self.json, "model_json_schema"):
            self.json = self.json.model_json_schema()
        if self.json is not None and not isinstance(self.json, (str, dict)):
            raise TypeError(f"json must be a schema as str or dict, or a pydantic model's class, got {self.json!r}")


@dataclass(repr=False, slots=True)
class GuidedDecodingParams(StructuredOutputsParams):
    """StructuredOutputsParams under their older name, with the `backend` they had: None, "auto" or "xgrammar"."""

    backend: str | None = None

    def check(self) -> None:
        """Checks the form asked for, and that the backend is the one there is."""
        if self.backend not in (None, "auto", "xgrammar"):
            raise ValueError(
                f"backend must be None, 'auto' or 'xgrammar', the only one there is, got {self.backend!r}"
            )
        StructuredOutputsParams.check(self)  # not super(): slots make another class of this one


def checked_structure(structured_outputs: object, guided_decoding: object) -> StructuredOutputsParams | None:
    """The checked parameters given by one of the option's two names; a dict of them is made into that name's kind."""
    if structured_outputs is not None and guided_decoding is not None:
        both = f"{structured_outputs!r} and {guided_decoding!r}"
        raise ValueError(f"structured_outputs and guided_decoding are names of one option, got both: {both}")
    name, value, kind = "structured_outputs", structured_outputs, StructuredOutputsParams
    if guided_decoding is not None:
        name, value, kind = "guided_decoding", guided_decoding, GuidedDecodingParams
    if isinstance(value, dict):
        return kind(**value)
    if value is not None and not isinstance(value, StructuredOutputsParams):
        raise TypeError(f"{name} must be {kind.__name__} or a dict of its options, got {value!r}")
    if value is not None:
        value.check()
    return value
