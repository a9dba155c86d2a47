"""The forms that a prompt may have, as types; `forms.py` says what is right in one."""

from collections.abc import Sequence
from typing import TypedDict


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict, total=False):
    """A prompt as token ids; its text, if it is there, is only kept for the result."""

    prompt_token_ids: Sequence[int]
    prompt: str


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt
