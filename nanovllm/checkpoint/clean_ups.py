"""What the option `clean_up_tokenization_spaces` asks for: WordPiece leaves spaces before punctuation."""

REPLACED = (  # in this order
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
# Characters that a replaced text can go on behind.
INSIDE_REPLACED = "".join({character for text, _ in REPLACED for character in text[:-1]})


def clean_up(text: str) -> str:
    """A decoded text without those spaces."""
    for old, new in REPLACED:
        text = text.replace(old, new)
    return text


def num_clean(text: str) -> int:
    """How many characters of a decoded text are cleaned up alike whatever comes behind it."""
    return len(text.rstrip(INSIDE_REPLACED))
