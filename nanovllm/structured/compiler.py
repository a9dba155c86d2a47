"""Structures that a text must have, compiled by xgrammar for a model's vocabulary, beside what else goes on.

What is asked for becomes rules in xgrammar's EBNF. Compiling them takes milliseconds or seconds, in threads: xgrammar
holds no lock of Python's meanwhile. Knows nothing of requests; what a compiled grammar is good for is
`sampling/constraints.py`'s business.
"""

import functools
import json
import os
import re
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from nanovllm.expressions.regex import regex_rules
from nanovllm.structured.json_schema import HOLE, SchemaReader
from nanovllm.structured.params import StructuredOutputsParams
from nanovllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xgrammar

NUM_THREADS = 4  # so many grammars are compiled at once, each by some threads of xgrammar's
CACHE_BYTES = 512 * 2**20  # of compiled grammars
NUM_KEPT = 1024  # most grammars that are kept as read
MOST_CHARACTERS = 200_000  # of what is given: longer constants take more than ten seconds
EBNF_RULE = re.compile(r"^\s*[\w.-]+\s*::=", re.MULTILINE)
ERROR_ORIGIN = re.compile(r"^\[[\d:]+\] \S+:\d+: (Check failed: )?", re.MULTILINE)  # what xgrammar's errors begin with
BACKSLASH = re.compile(r"\\(\\|x[0-9a-f]{2})")  # with what belongs to it
NO_CONTROLS = r"[^\0-\x1f"  # begins the characters of a string; UTF-8 has no surrogates either
# In the rule of a property's name that is none of the listed: it could spell a listed one.
ESCAPE = r' | ("\\" basic_escape basic_string_sub)'


class GrammarCompiler:
    """Compiles the structures of one model's requests; equal ones once. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """`vocab_size` is the number of logits, perhaps more than the tokenizer's; eos_token_ids end a text."""
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="nanovllm-grammar")
        self._rules = functools.lru_cache(NUM_KEPT)(self._new_rules)

    @functools.cached_property
    def vocabulary(self) -> "xgrammar.TokenizerInfo":
        """The model's, as xgrammar wants it. Made when the first structure is read, as xgrammar takes long to import.

        Raises:
            ValueError: xgrammar is not installed, or the tokenizer is of a kind that it cannot follow.
        """
        try:
            import xgrammar
        except ImportError as error:
            reason = 'structured_outputs need the package xgrammar: pip install "nano-vllm[structured]"'
            raise ValueError(reason) from error
        return xgrammar.TokenizerInfo(
            token_bytes(self.tokenizer, self.vocab_size),
            xgrammar.VocabType.RAW,
            vocab_size=self.vocab_size,
            stop_token_ids=sorted(token_id for token_id in self.eos_token_ids if token_id < self.vocab_size),
        )

    @functools.cached_property
    def compiler(self) -> "xgrammar.GrammarCompiler":
        """What compiles, with threads of its own; it keeps what it has compiled."""
        import xgrammar

        num_threads = max(1, min(8, (os.cpu_count() or 1) // 2))
        return xgrammar.GrammarCompiler(self.vocabulary, max_threads=num_threads, cache_limit_bytes=CACHE_BYTES)

    def validate(self, structure: StructuredOutputsParams) -> None:
        """Raises ValueError, naming what is wrong, for a structure that cannot be compiled or would not be kept to.

        Or as `vocabulary` does.
        """
        self._rules(*_source(structure))

    def compile(self, structure: StructuredOutputsParams) -> "Future[xgrammar.CompiledGrammar]":
        """xgrammar's compiled grammar of a structure, once a thread has made it; or the error of `validate`."""
        return self.threads.submit(self._compile, structure)

    def _compile(self, structure: StructuredOutputsParams) -> "xgrammar.CompiledGrammar":
        # All of it here: a large one takes seconds to read, as does xgrammar, if this process has not validated it.
        rules, is_lark = self._rules(*_source(structure))
        return self.compiler.compile_lark(rules) if is_lark else self.compiler.compile_grammar(rules)

    def _new_rules(self, kind: str, text: str, is_compact: bool) -> tuple[str, bool]:
        """The checked grammar of what `_source` gives, in EBNF or in Lark's dialect; and whether it is in the latter.

        It stays a text, since xgrammar may alter a Grammar that it has read before it compiles that.
        """
        vocabulary = self.vocabulary
        import xgrammar

        given = text
        try:
            if len(text) > MOST_CHARACTERS:
                raise ValueError(f"it must have at most {MOST_CHARACTERS} characters, got {len(text)}")
            is_lark = kind == "grammar" and not EBNF_RULE.search(text)
            if is_lark:
                xgrammar.Grammar.from_lark(text, tokenizer_info=vocabulary)
                return text, True
            if kind == "json":
                text = _json_rules(_parsed(text), is_compact)
            elif kind == "regex":
                text = regex_rules(text, "root")
            elif kind == "choice":
                text = f"root ::= {' | '.join(map(_literal, json.loads(text)))}"
            xgrammar.Grammar.from_ebnf(text)
            return text, False
        except (ValueError, RuntimeError) as error:  # RuntimeErrors are xgrammar's
            reason = ERROR_ORIGIN.sub("", str(error)).strip()
            raise ValueError(f"structured_outputs cannot be used: {reason}; got {kind}={given!r:.300}") from error


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """What each token adds to a text, as UTF-8: nothing if it is not decoded, so that no grammar allows it.

    Raises:
        ValueError: what a token adds depends on others.
    """
    decoder = str(tokenizer.backend.decoder)
    is_byte_level = "ByteLevel" in decoder
    if tokenizer.cleans_up or not (is_byte_level or "▁" in decoder):
        reason = "its tokens must be bytes, or words with a ▁ for each space, and its texts as they are decoded"
        raise ValueError(f"structured_outputs cannot be used with this model's tokenizer: {reason}")
    # Byte-level tokens spell a byte by its character if that is plain, the others by those from U+0100 on.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
    tokens = [b""] * vocab_size
    for text, token_id in tokenizer.backend.get_vocab().items():
        if token_id >= vocab_size or not tokenizer.is_visible(token_id):
            continue
        if is_byte_level:
            is_spelt = all(character in byte_of for character in text)
            tokens[token_id] = bytes(byte_of[character] for character in text) if is_spelt else text.encode()
        elif tokenizer.is_byte(token_id):
            tokens[token_id] = bytes([int(text[3:5], 16)])
        else:
            tokens[token_id] = text.replace("▁", " ").encode()
    return tokens


def _source(structure: StructuredOutputsParams) -> tuple[str, str, bool]:
    """What is asked for: its kind, its text, with schemas and choices as JSON, and whether JSON has no whitespace."""
    is_compact = structure.disable_any_whitespace
    if structure.json_object:
        return "json", '{"type": "object"}', is_compact
    if structure.json is not None:
        try:
            text = structure.json if isinstance(structure.json, str) else json.dumps(structure.json)
        except RecursionError:
            raise ValueError("structured_outputs cannot be used: json is nested too deeply") from None
        return "json", text, is_compact
    if structure.choice is not None:
        return "choice", json.dumps(structure.choice), False
    return ("regex", structure.regex, False) if structure.regex is not None else ("grammar", structure.grammar, False)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the JSON schema is no JSON: {error}") from error


def _json_rules(schema: Any, is_compact: bool) -> str:
    """The grammar of a JSON schema: xgrammar's, with rules of our own in its holes."""
    import xgrammar

    reader = SchemaReader(schema)
    grammar = xgrammar.Grammar.from_json_schema(
        reader.read(), any_whitespace=not is_compact, separators=(",", ":") if is_compact else None
    )
    lines = str(grammar).replace(NO_CONTROLS, NO_CONTROLS + r"\ud800-\udfff").splitlines()
    lines = [line.replace(ESCAPE, "") if "_addl_key" in line.partition(" ")[0] else line for line in lines]
    # xgrammar prints "ße" with a \\xdfe that it would read as one character: \\x goes on as far as there are digits.
    printed = BACKSLASH.sub(lambda match: match[0].replace("\\x", "\\u00"), "\n".join(lines))
    ebnf = "\n".join([printed, *reader.holes])
    for number in range(len(reader.holes)):
        ebnf = ebnf.replace(_literal(json.dumps(HOLE.format(number))), f"hole_{number}")
    if HOLE.format("") in ebnf:
        raise RuntimeError("xgrammar prints a grammar's strings in an unknown way")
    return ebnf


def _literal(text: str) -> str:
    """A string in EBNF."""
    return json.dumps(text, ensure_ascii=False)
