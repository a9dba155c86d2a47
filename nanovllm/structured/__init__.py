"""Stub until the room is there."""

from typing import Any, Protocol


class Constraint(Protocol):
    is_finished: bool


class GrammarCompiler:
    pass


def make_constraint(grammar: Any, bad_words: Any, vocab_size: int) -> Any:
    return None
