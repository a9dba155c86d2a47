"""Tokens to text, a few at a time: whole characters only, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Decoding starts this many tokens early: some tokenizers drop the space before the first token they are given.
CONTEXT_TOKENS = 6
REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one request.

    A token may end in the middle of a character, which decodes to replacement characters at the end; these are held
    back until the rest has come. Text that may be the beginning of a stop string is held back from `take`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.text = ""
        self.is_stopped = False
        self._window = list(prompt_token_ids[-CONTEXT_TOKENS:])  # the tokens still decoded anew
        self._window_chars = len(self._decode().rstrip(REPLACEMENT))  # characters of the window already in `text`
        self._taken = 0

    def push(self, token_ids: Sequence[int]) -> bool:
        """Appends tokens; returns whether the text has reached a stop string."""
        if self.is_stopped:
            return True
        self._window += token_ids
        decoded = self._decode()
        whole = decoded.rstrip(REPLACEMENT)
        num_known = len(self.text)
        self.text += whole[self._window_chars :]
        self._window_chars = max(self._window_chars, len(whole))
        if len(whole) == len(decoded) and len(self._window) > 2 * CONTEXT_TOKENS:
            self._window = self._window[-CONTEXT_TOKENS:]
            self._window_chars = len(self._decode())
        self._cut_at_stop(num_known)
        return self.is_stopped

    def take(self, finished: bool) -> str:
        """The text not taken yet, without what may become a stop string unless the request has finished."""
        held_back = 0 if finished or self.is_stopped else max(map(len, self.stop), default=1) - 1
        end = max(self._taken, len(self.text) - held_back)
        piece = self.text[self._taken : end]
        self._taken = end
        return piece

    def _decode(self) -> str:
        return self.tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _cut_at_stop(self, num_known: int) -> None:
        """Cuts the text at the earliest stop string that ends after its first `num_known` characters."""
        found = [self.text.find(stop, max(0, num_known - len(stop) + 1)) for stop in self.stop]
        ends = [index for index in found if index >= 0]
        if ends:
            self.text = self.text[: min(ends)]
            self.is_stopped = True
