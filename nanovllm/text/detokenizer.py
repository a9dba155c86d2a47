"""Tokens to text, a few at a time: whole characters only, cut at the first stop string."""

from collections.abc import Sequence

from nanovllm.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one request's tokens: at any time what `Tokenizer.decode` makes of them all.

    A token may end in the middle of a character, which decodes to U+FFFD at the end; that is left out until the rest
    has come. Later tokens may change the end of the text: bytes of a byte fallback are valid or not all together, and
    a clean-up removes a space once the next character is known. `take` hands out what nothing can change any more,
    and holds back what may be the beginning of a stop string.

    Decoding all tokens anew with each would take quadratic time. Decoders work token by token or byte by byte, and
    only treat the first token unlike the others. So once the text ends with a whole character, outside of a run of
    bytes, its tokens are settled: only the last of them is decoded again, for the sake of those behind it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        keeps_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """With keeps_stop, the text ends behind the stop string."""
        self.tokenizer = tokenizer
        self.stop = stop
        self.keeps_stop = keeps_stop
        self.skip_special_tokens = skip_special_tokens
        self.text = ""
        self._settled_text = ""
        self._uncleaned = ""  # the end of the settled text as it was decoded, while a clean-up may change it
        self._context: list[int] = []  # the last settled token, which decoding begins with
        self._context_chars = 0  # length of its text
        self._pending: list[int] = []  # tokens that are not settled
        self._num_final = 0  # characters of the text that no later token changes
        self._num_taken = 0

    def push(self, token_ids: Sequence[int], finds_stops: bool = True) -> str | None:
        """Appends tokens; returns the first stop string that the text has reached and ends with or before, if any."""
        self._pending += [i for i in token_ids if self.tokenizer.is_visible(i, self.skip_special_tokens)]
        decoded = self._decode_pending(len(self._pending))
        num_final_before = self._num_final
        whole = decoded.rstrip(REPLACEMENT)
        self.text = self._settled_text + self.tokenizer.clean_up(self._uncleaned + whole)
        end = len(self._pending)
        while end and self.tokenizer.is_byte(self._pending[end - 1]):
            end -= 1
        is_in_run = end < len(self._pending)
        final = self._uncleaned + (self._decode_pending(end).rstrip(REPLACEMENT) if is_in_run else whole)
        num_clean = self.tokenizer.num_clean(final)
        final_text = self._settled_text + self.tokenizer.clean_up(final[:num_clean])
        self._num_final = len(final_text)
        if not is_in_run and len(whole) == len(decoded):
            self._settled_text, self._uncleaned = final_text, final[num_clean:]
            self._context = (self._context + self._pending)[-1:]
            self._context_chars = len(self._decode(self._context))
            self._pending = []
        # Only a stop string that ends behind the text that was final before can be new.
        if not finds_stops:
            return None
        found = [(self.text.find(stop, max(0, num_final_before - len(stop) + 1)), stop) for stop in self.stop]
        index, stop = min(((index, stop) for index, stop in found if index >= 0), default=(None, None))
        if stop is not None:
            self.text = self.text[: index + len(stop) * self.keeps_stop]
        return stop

    def take(self, finished: bool) -> str:
        """The text not taken yet that will not change, without what may become a stop string unless it has ended."""
        piece = self.final_text(finished)[self._num_taken :]
        self._num_taken += len(piece)
        return piece

    def final_text(self, finished: bool) -> str:
        """All of the text that will not change, taken or not."""
        held_back = max(map(len, self.stop), default=1) - 1
        return self.text if finished else self.text[: max(0, self._num_final - held_back)]

    def _decode_pending(self, end: int) -> str:
        """What the first `end` pending tokens add to the settled ones, before a clean-up."""
        return self._decode(self._context + self._pending[:end])[self._context_chars :]

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.backend.decode(token_ids, skip_special_tokens=self.skip_special_tokens)
