"""Small tokenizers of every kind, as model folders hold them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["the", "tin", "don", "no", "never", "we", "v", "r", "n", "m", "s", "re", "ve", "t", "a", "ï", "中", "👋"]
PUNCTUATION = [".", ",", "!", "?", "'", "n't", "'s", "'ve", "'re", "'m"]


def write_tokenizer(folder: Path, tokenizer: Tokenizer, **config: object) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    tokenizer.add_special_tokens([token for token in SPECIAL if tokenizer.token_to_id(token) is not None])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: token_id for token_id, token in enumerate(dict.fromkeys(tokens))}


def byte_level(folder: Path) -> None:
    """As GPT-2's and Qwen's: tokens are bytes, which may end anywhere in a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["Ġthe", "ðŁ", "ĳĭ", "ä¸", "Ń", "ĠðŁ", "ï¿½", "Ġ.", "'s"]
    tokenizer = Tokenizer(models.BPE(numbered([*SPECIAL, *alphabet, *pieces]), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    write_tokenizer(folder, tokenizer, clean_up_tokenization_spaces=True)  # which is not for BPE


def metaspace_bpe(folder: Path, strips: bool = True) -> None:
    """As Llama 2's: a space is a part of a word, and what has no token becomes its bytes."""
    tokens = [*SPECIAL, *BYTES, "▁", "▁▁", *(f"▁{word}" for word in WORDS[:9]), *WORDS[:15], *PUNCTUATION]
    tokenizer = Tokenizer(models.BPE(numbered(tokens), [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strips)
    write_tokenizer(folder, tokenizer)


def gemma_bpe(folder: Path) -> None:
    """As Gemma's: the same, but a space at the beginning stays."""
    metaspace_bpe(folder, strips=False)


def unigram(folder: Path, cleans_up: bool = True) -> None:
    """As T5's, with a clean-up."""
    tokens = [
        *SPECIAL,
        "▁",
        *(f"▁{word}" for word in WORDS),
        *WORDS,
        *PUNCTUATION,
        *(f"▁{mark}" for mark in PUNCTUATION),
    ]
    vocabulary = [(token, -float(rank)) for rank, token in enumerate(dict.fromkeys(tokens))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    write_tokenizer(folder, tokenizer, clean_up_tokenization_spaces=cleans_up)


def word_piece(folder: Path, cleans_up: bool = False, decoder_cleans_up: bool = False) -> None:
    """As BERT's: words are joined by spaces, but for pieces that go on."""
    tokens = [*SPECIAL, *WORDS, *PUNCTUATION, *(f"##{word}" for word in WORDS)]
    tokenizer = Tokenizer(models.WordPiece(numbered(tokens), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=decoder_cleans_up)
    write_tokenizer(folder, tokenizer, clean_up_tokenization_spaces=cleans_up)


def word_piece_cleaned(folder: Path) -> None:
    """The same, with the spaces before punctuation removed from the whole text."""
    word_piece(folder, cleans_up=True)


def word_piece_cleaned_twice(folder: Path) -> None:
    """The same, with its decoder removing spaces too."""
    word_piece(folder, cleans_up=True, decoder_cleans_up=True)


def unigram_uncleaned(folder: Path) -> None:
    """As T5's, without a clean-up."""
    unigram(folder, cleans_up=False)


KINDS: dict[str, Callable[[Path], None]] = {
    write.__name__: write
    for write in (
        byte_level,
        metaspace_bpe,
        gemma_bpe,
        unigram,
        unigram_uncleaned,
        word_piece,
        word_piece_cleaned,
        word_piece_cleaned_twice,
    )
}
