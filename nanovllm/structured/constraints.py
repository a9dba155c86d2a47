"""What says, token by token, which tokens may come next. Knows nothing of requests, devices or probabilities."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Constraint(Protocol):
    """Which tokens may follow those that were accepted.

    Attributes:
        is_finished: whether nothing may follow.
    """

    is_finished: bool

    def accept(self, token_id: int) -> None:
        """Takes in a token that was generated, one that `fill_mask` allowed."""

    def fill_mask(self, mask: np.ndarray) -> None:
        """Writes int32 [ceil(vocab / 32)]: bit t % 32 of word t // 32 says whether token t may come next."""


class GrammarConstraint:
    """A text that a grammar accepts."""

    def __init__(self, compiled: Any) -> None:
        """`compiled` is xgrammar's compiled grammar."""
        import xgrammar

        self.matcher = xgrammar.GrammarMatcher(compiled)
        self.has_end_tokens = bool(self.matcher.stop_token_ids)
        self.is_finished = False

    def accept(self, token_id: int) -> None:
        """See Constraint; the end is a token that ends the text or, where the model has none, a complete text."""
        self.matcher.accept_token(token_id)
        is_complete = not self.has_end_tokens and self.matcher.is_completed()
        self.is_finished = self.matcher.is_terminated() or is_complete

    def fill_mask(self, mask: np.ndarray) -> None:
        """See Constraint."""
        self.matcher.fill_next_token_bitmask(mask[None])


class BadWords:
    """No sequence of tokens out of a list of them: the last token of each is banned behind the others."""

    is_finished = False

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self.words = [list(word) for word in words]
        self.generated: list[int] = []

    def accept(self, token_id: int) -> None:
        """See Constraint."""
        self.generated.append(token_id)

    def fill_mask(self, mask: np.ndarray) -> None:
        """See Constraint."""
        mask.fill(-1)
        bits = mask.view(np.uint32)
        for *before, last in self.words:
            if self.generated[len(self.generated) - len(before) :] == before:
                bits[last // 32] &= np.uint32(~(1 << last % 32) & 0xFFFFFFFF)


class Both:
    """What two constraints both allow."""

    def __init__(self, first: Constraint, second: Constraint) -> None:
        self.first = first
        self.second = second

    @property
    def is_finished(self) -> bool:
        """See Constraint."""
        return self.first.is_finished or self.second.is_finished

    def accept(self, token_id: int) -> None:
        """See Constraint."""
        self.first.accept(token_id)
        self.second.accept(token_id)

    def fill_mask(self, mask: np.ndarray) -> None:
        """See Constraint."""
        other = np.empty_like(mask)
        self.first.fill_mask(mask)
        self.second.fill_mask(other)
        mask &= other


def make_constraint(grammar: Any, bad_words: Sequence[Sequence[int]]) -> Constraint | None:
    """What a compiled grammar and bad words, of which those of one token are banned elsewhere, say; None: nothing."""
    words = [word for word in bad_words if len(word) > 1]
    by_grammar = GrammarConstraint(grammar) if grammar is not None else None
    if not words:
        return by_grammar
    return Both(by_grammar, BadWords(words)) if by_grammar is not None else BadWords(words)
