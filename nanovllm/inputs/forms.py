"""What a prompt has to say, whichever of its forms it comes in. Nothing here knows the model or its tokenizer."""

from collections.abc import Sequence as Items
from typing import Any

import numpy as np

from nanovllm.compat.refused_arguments import REFUSED_ARGUMENTS, refuse
from nanovllm.inputs import Prompt

LISTS = (list, tuple, np.ndarray)  # the types of a list of prompts or token ids
PROMPT_KEYS = ("prompt", "prompt_token_ids")


def list_prompts(
    prompts: Prompt | Items[Prompt] | None, prompt_token_ids: Items[int] | Items[Items[int]] | None
) -> list[Any]:
    """The prompts of a call, which are not checked yet; what comes by `prompt_token_ids` has its text by `prompts`.

    Raises:
        TypeError: there are neither.
        ValueError: there are more of the one than of the other.
    """
    if prompts is None and prompt_token_ids is None:
        raise TypeError("a call needs prompts, or token ids by the keyword prompt_token_ids; both are None")
    if prompt_token_ids is None:
        return _as_list(prompts)
    rows = _as_list(prompt_token_ids)
    texts = [None] * len(rows) if prompts is None else _as_list(prompts)
    if len(texts) != len(rows):
        raise ValueError(f"prompt_token_ids has {len(rows)} entries for {len(texts)} prompts")
    return [{"prompt": text, "prompt_token_ids": row} for text, row in zip(texts, rows, strict=True)]


def _as_list(prompts: Any) -> list[Any]:
    """A list of prompts; what is a single one, or nothing that could be a list of them, becomes its only entry."""
    is_list = isinstance(prompts, LISTS) and not (len(prompts) and isinstance(prompts[0], (int, np.integer)))
    return list(prompts) if is_list else [prompts]


def text_and_ids(prompt: Any) -> tuple[str | None, Any]:
    """What a prompt has of the two, one of them at least; of the ids, only that they are a list is checked.

    Raises:
        TypeError, ValueError: it has neither, or something else, or a text that is no string.
    """
    text, token_ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
    if isinstance(prompt, dict):
        refuse(prompt)
        for key in prompt:
            if key not in PROMPT_KEYS and key not in REFUSED_ARGUMENTS:
                names = " and ".join(map(repr, PROMPT_KEYS))
                raise TypeError(f"a prompt may have {names}, got {key!r}; conversations go to `chat`")
        text, token_ids = map(prompt.get, PROMPT_KEYS)
        if text is not None and not isinstance(text, str):
            raise TypeError(f"the 'prompt' of a prompt must be a string, got {text!r}")
    if not isinstance(token_ids, LISTS) and (text is None or token_ids is not None):
        raise TypeError(f"a prompt must be a string or a list of token ids, got {prompt!r}")
    return text, token_ids


def check_ids(token_ids: list[Any], vocab_size: int) -> list[int]:
    """A prompt's token ids, one at least, as Python's ints.

    Raises:
        TypeError, ValueError: naming one that is no int, or is not in the vocabulary.
    """
    if set(map(type, token_ids)) != {int}:
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, (int, np.integer)):
                raise TypeError(f"a prompt's token ids must be ints, got {token_id!r}")
        token_ids = list(map(int, token_ids))
    lowest, highest = min(token_ids), max(token_ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"a prompt's token ids must be between 0 and {vocab_size - 1}, got {wrong}")
    return token_ids
