"""What says, token by token, which tokens may come next. Knows nothing of requests, devices or probabilities.

A mask is int32 [ceil(vocab_size / 32)]: bit t % 32 of word t // 32 is set if token t is allowed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import xgrammar


class Constraint(Protocol):
    """Which tokens may follow those that were accepted; each sample of a request has one of its own."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing may follow."""

    def accept(self, token_id: int) -> None:
        """Takes in a token that was generated.

        Raises:
            RuntimeError: one that `fill_mask` did not allow.
        """

    def fill_mask(self, mask: np.ndarray) -> None:
        """Writes which tokens may come next: none, where no token spells what must."""


class GrammarConstraint:
    """A text that a grammar accepts. Where it does, and only there, a token that ends texts is allowed."""

    def __init__(self, compiled: "xgrammar.CompiledGrammar") -> None:
        import xgrammar

        self.matcher = xgrammar.GrammarMatcher(compiled)
        self.has_end_tokens = bool(self.matcher.stop_token_ids)
        self.num_words = -(-compiled.tokenizer_info.vocab_size // 32)

    @property
    def is_finished(self) -> bool:
        """See Constraint; a token that ends the text was accepted or, for a model without, nothing else is left."""
        if self.has_end_tokens or not self.matcher.is_completed():
            return self.matcher.is_terminated()
        mask = np.empty(self.num_words, dtype=np.int32)
        self.fill_mask(mask)
        return not mask.any()

    def accept(self, token_id: int) -> None:
        """See Constraint."""
        if not self.matcher.accept_token(token_id):
            raise RuntimeError(f"the grammar does not allow token {token_id} here")

    def fill_mask(self, mask: np.ndarray) -> None:
        """See Constraint."""
        self.matcher.fill_next_token_bitmask(mask)


class BadWords:
    """No sequence of tokens out of a list of them: the last token of each is banned behind the others."""

    is_finished = False

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self.last_tokens: dict[tuple[int, ...], list[int]] = {}  # of words, by the tokens before
        for *before, last in words:
            self.last_tokens.setdefault(tuple(before), []).append(last)
        self.lengths = sorted(set(map(len, self.last_tokens)))
        self.generated: list[int] = []  # the last ones, as many as matter

    def accept(self, token_id: int) -> None:
        """See Constraint."""
        self.generated.append(token_id)
        if len(self.generated) > self.lengths[-1]:
            del self.generated[0]

    def fill_mask(self, mask: np.ndarray) -> None:
        """See Constraint."""
        mask.fill(-1)
        bits = mask.view(np.uint32)
        for length in self.lengths:
            before = tuple(self.generated[max(0, len(self.generated) - length) :])
            for last in self.last_tokens.get(before, ()):
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


def make_constraint(
    grammar: "xgrammar.CompiledGrammar | None", bad_words: Sequence[Sequence[int]]
) -> Constraint | None:
    """What a compiled grammar and bad words, of which those of one token are banned elsewhere, say; None: nothing."""
    words = [word for word in bad_words if len(word) > 1]
    by_grammar = GrammarConstraint(grammar) if grammar is not None else None
    if not words:
        return by_grammar
    return Both(by_grammar, BadWords(words)) if by_grammar is not None else BadWords(words)
