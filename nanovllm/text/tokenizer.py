"""Text to tokens and back. What a folder's files say of its tokenizer is read by `checkpoint/tokenizer.py`.

This file knows nothing of models, requests or devices.
"""

import re
from collections.abc import Sequence

import tokenizers

from nanovllm.checkpoint.clean_ups import clean_up, num_clean
from nanovllm.checkpoint.tokenizer import read_tokenizer

LONG_TEXT = 20_000  # characters, which take tens of milliseconds
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        backend: the tokenizer of the `tokenizers` package that does the work.
        eos_token_id: the token that ends a text, None if the files name none.
        cleans_up: whether `decode` removes spaces, see `checkpoint/clean_ups.py`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_id: int | None, cleans_up: bool) -> None:
        backend.no_truncation()  # the file may hold what the training set up
        backend.no_padding()
        self.backend = backend
        self.eos_token_id = eos_token_id
        self.cleans_up = cleans_up
        added = backend.get_added_tokens_decoder()
        self._special_ids = {token_id for token_id, token in added.items() if token.special}
        self._texts: dict[int, str] = {}  # of single tokens, as far as they were asked for
        self._has_byte_fallback = "ByteFallback" in str(backend.decoder)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text; special ones are those that the tokenizer puts around a prompt, such as BOS.

        Raises:
            ValueError: the text has half a surrogate pair, as a JSON string and a terminal's bytes can bring.
        """
        try:
            if len(text) > LONG_TEXT:  # this way of it lets other threads run meanwhile
                return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # which says no more than that it must be a string
            raise ValueError(f"a text must be a string of whole characters, got {text!r:.200}: {error}") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; U+FFFD stands for bytes that are no character."""
        return self.clean_up(self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """The text of one token alone, special or not; "" for one outside of the vocabulary."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.backend.decode([token_id], skip_special_tokens=False)
        return text

    def clean_up(self, text: str) -> str:
        """A decoded text as it is handed out."""
        return clean_up(text) if self.cleans_up else text

    def num_clean(self, text: str) -> int:
        """How many characters of a decoded text are handed out alike whatever comes behind it."""
        return num_clean(text) if self.cleans_up else len(text)

    def is_visible(self, token_id: int, skip_special_tokens: bool = True) -> bool:
        """Whether a token is decoded at all: of this vocabulary, which a model's may exceed, and not skipped."""
        is_skipped = skip_special_tokens and token_id in self._special_ids
        return not is_skipped and self.backend.id_to_token(token_id) is not None

    def is_byte(self, token_id: int) -> bool:
        """Whether a token is a byte of a byte fallback.

        A run of them is decoded as one: together they must be valid UTF-8, or each becomes U+FFFD.
        """
        return self._has_byte_fallback and BYTE_TOKEN.fullmatch(self.backend.id_to_token(token_id)) is not None


def load_tokenizer(folder: str | None) -> Tokenizer | None:
    """The tokenizer of a folder or a GGUF file, None if it has none or no folder is given.

    Raises:
        ValueError: the files cannot be used, naming the folder.
    """
    files = read_tokenizer(folder) if folder is not None else None
    return Tokenizer(*files) if files is not None else None
