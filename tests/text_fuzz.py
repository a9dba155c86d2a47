"""Random tokens through the detokenizer, one by one: at any time their text is what transformers decodes them to.

    python tests/text_fuzz.py --sequences 100000 --seed 0

Prints a summary; the exit status is 1 after a difference, which it names.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tokenizer_kinds import KINDS
from transformers import AutoTokenizer

from nanovllm.text.detokenizer import Detokenizer
from nanovllm.text.tokenizer import Tokenizer, load_tokenizer

STOP_CHARACTERS = " the.,'n中👋\ufffd"


class Oracle:
    """The texts of the first 1, 2, ... tokens, each by one whole `decode` of transformers."""

    def __init__(
        self, tokenizer: Any, token_ids: list[int], stop: tuple[str, ...], keeps_stop: bool, skips_special: bool
    ) -> None:
        self.texts: list[str] = []
        self.stopped_by: str | None = None
        for end in range(1, len(token_ids) + 1):
            text = tokenizer.decode(token_ids[:end], skip_special_tokens=skips_special).rstrip("\ufffd")
            found = [(text.index(string), string) for string in stop if string in text]
            if found:
                length, self.stopped_by = min(found)
                text = text[: length + len(self.stopped_by) * keeps_stop]
            self.texts.append(text)
            if found:
                break


def check_sequence(
    ours: Tokenizer,
    theirs: Any,
    token_ids: list[int],
    stop: tuple[str, ...],
    takes: list[bool],
    keeps_stop: bool,
    skips_special: bool,
) -> None:
    """Pushes tokens one by one, takes text where `takes` says so, and raises AssertionError at a difference."""
    oracle = Oracle(theirs, token_ids, stop, keeps_stop, skips_special)
    whole = theirs.decode(token_ids, skip_special_tokens=skips_special)
    assert ours.decode(token_ids, skips_special) == whole
    detokenizer, taken = Detokenizer(ours, stop, keeps_stop, skips_special), ""
    for index, text in enumerate(oracle.texts):
        stopped_by = detokenizer.push(token_ids[index : index + 1])
        assert detokenizer.text == text, f"token {index}: {detokenizer.text!r}, not {text!r}"
        is_last = index == len(oracle.texts) - 1
        want_stop = oracle.stopped_by if is_last else None
        assert stopped_by == want_stop, f"token {index}: stopped by {stopped_by!r}, not {want_stop!r}"
        if takes[index] or is_last:
            taken += detokenizer.take(is_last)
            assert oracle.texts[-1].startswith(taken), f"token {index}: {taken!r} taken of {oracle.texts[-1]!r}"
    assert not oracle.texts or taken == oracle.texts[-1], f"{taken!r} taken of {oracle.texts[-1]!r}"
    at_once = Detokenizer(ours, skip_special_tokens=skips_special)
    at_once.push(token_ids)
    assert at_once.text == whole.rstrip("\ufffd")


class Kind:
    """One tokenizer, ours and transformers', and random sequences of its tokens."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        folder.mkdir()
        KINDS[name](folder)
        self.ours = load_tokenizer(str(folder))
        self.theirs = AutoTokenizer.from_pretrained(folder)
        self.size = len(self.theirs)

    def draw_tokens(self, draw: random.Random) -> list[int]:
        """Tokens at random, among them characters in pieces, in runs of one kind of token."""
        token_ids: list[int] = []
        for _ in range(draw.randint(0, 8)):
            if draw.random() < 0.4:
                text = "".join(draw.choice(["中", "👋", "ï", " ", "the", "'", ".", "n't"]) for _ in range(3))
                pieces = self.ours.encode(text, add_special_tokens=False)
                token_ids += pieces[draw.randint(0, 1) : draw.randint(1, len(pieces)) if pieces else 0]
            else:
                # One beyond the vocabulary too: a model's may be larger.
                low = draw.choice([0, self.size // 2, self.size - 40])
                token_ids += [draw.randint(max(0, low), self.size) for _ in range(draw.randint(1, 4))]
        return token_ids

    def check(self, draw: random.Random) -> None:
        token_ids = self.draw_tokens(draw)
        lengths = [draw.randint(1, 4) for _ in range(draw.choice([0, 0, 1, 3]))]
        stop = tuple("".join(draw.choice(STOP_CHARACTERS) for _ in range(length)) for length in lengths)
        takes = [draw.random() < 0.7 for _ in token_ids]
        keeps_stop, skips_special = draw.random() < 0.3, draw.random() < 0.7
        try:
            check_sequence(self.ours, self.theirs, token_ids, stop, takes, keeps_stop, skips_special)
        except AssertionError as error:
            case = f"{self.name} {token_ids} {stop=} {takes=} {keeps_stop=} {skips_special=}"
            raise AssertionError(f"{case}: {error}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, start, num_differences = random.Random(arguments.seed), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        kinds = [Kind(name, Path(folder, name)) for name in KINDS]
        for number in range(arguments.sequences):
            try:
                kinds[number % len(kinds)].check(draw)
            except AssertionError as error:
                num_differences += 1
                print(error, file=sys.stderr)
    seconds = time.monotonic() - start
    print(
        f"{arguments.sequences} sequences of {len(kinds)} tokenizers in {seconds:.0f} s: {num_differences} differences"
    )
    return num_differences > 0


if __name__ == "__main__":
    sys.exit(main())
