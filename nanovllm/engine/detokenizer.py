"""Tokens to text, a few at a time: whole characters only, cut at the first stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer

# Decoding starts this many tokens early: some tokenizers drop the space before the first token they are given.
CONTEXT_TOKENS = 6
REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one request, without its special tokens.

    A token may end in the middle of a character, which decodes to replacement characters at the end; these are held
    back until the rest has come. Text that may be the beginning of a stop string is held back from `take`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.text = ""
        self._window = list(prompt_token_ids[-CONTEXT_TOKENS:])  # the tokens still decoded anew
        self._window_chars = len(tokenizer.decode(self._window).rstrip(REPLACEMENT))  # of its text, already in `text`
        self._taken = 0

    def push(self, token_ids: Sequence[int]) -> bool:
        """Appends tokens; returns whether the text has reached a stop string, where it then ends."""
        self._window += token_ids
        decoded = self.tokenizer.decode(self._window)
        whole = decoded.rstrip(REPLACEMENT)
        num_known = len(self.text)
        self.text += whole[self._window_chars :]
        self._window_chars = max(self._window_chars, len(whole))
        if len(whole) == len(decoded) and len(self._window) > 2 * CONTEXT_TOKENS:
            self._window = self._window[-CONTEXT_TOKENS:]
            self._window_chars = len(self.tokenizer.decode(self._window))
        # Only a stop string that ends behind the known text can be new; of several, the earliest cuts.
        found = [self.text.find(stop, max(0, num_known - len(stop) + 1)) for stop in self.stop]
        end = min((index for index in found if index >= 0), default=None)
        self.text = self.text[:end]
        return end is not None

    def take(self, finished: bool) -> str:
        """The text not taken yet, without what may become a stop string unless the request has finished."""
        held_back = 0 if finished else max(map(len, self.stop), default=1) - 1
        piece = self.text[self._taken : max(0, len(self.text) - held_back)]
        self._taken += len(piece)
        return piece
