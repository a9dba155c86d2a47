"""Structures that a text must have, compiled by xgrammar for a model's vocabulary, beside what else goes on.

Knows nothing of requests; what a compiled grammar is good for is `constraints.py`'s business.
"""

import json
import re
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from nanovllm.structured.expressions import regex_rule
from nanovllm.structured.json_schema import honourable_schema, placeholder
from nanovllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanovllm.sampling_params import StructuredOutputsParams

NUM_THREADS = 2
MOST_CHARACTERS = 1_000_000  # of what is given


class GrammarCompiler:
    """Compiles the structures of one model's requests; equal ones once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """`vocab_size` is the number of logits, perhaps more than the tokenizer's; eos_token_ids end a text.

        Raises:
            ValueError: xgrammar is not installed.
        """
        try:
            import xgrammar
        except ImportError:
            raise ValueError(
                'structured_outputs need the package xgrammar: pip install "nano-vllm[structured]"'
            ) from None
        self.xgrammar = xgrammar
        backend = tokenizer.backend
        metadata = xgrammar.TokenizerInfo._detect_metadata_from_hf(backend.to_str())
        info = xgrammar.TokenizerInfo(
            [backend.id_to_token(token_id) or "" for token_id in range(vocab_size)],
            xgrammar.VocabType(metadata["vocab_type"]),
            vocab_size=vocab_size,
            stop_token_ids=sorted(token_id for token_id in eos_token_ids if token_id < vocab_size),
            add_prefix_space=metadata["add_prefix_space"],
        )
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        self.threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="nanovllm-grammar")

    def validate(self, structure: "StructuredOutputsParams") -> None:
        """Raises ValueError for a structure that cannot be compiled, naming what is wrong."""
        self._grammar(structure)

    def compile(self, structure: "StructuredOutputsParams") -> "Future[Any]":
        """xgrammar's compiled grammar of a structure, once a thread has made it."""
        return self.threads.submit(lambda: self.compiler.compile_grammar(self._grammar(structure)))

    def _grammar(self, structure: "StructuredOutputsParams") -> Any:
        """xgrammar's grammar of a structure."""
        make = self.xgrammar.Grammar
        try:
            if structure.regex is not None:
                return make.from_ebnf(f"root ::= {regex_rule(structure.regex)}")
            if structure.choice is not None:
                choices = [f"({regex_rule(re.escape(choice))})" for choice in structure.choice]
                return make.from_ebnf(f"root ::= {' | '.join(choices)}")
            if structure.grammar is not None:
                return make.from_ebnf(structure.grammar)
            schema, rules = honourable_schema({"type": "object"} if structure.json_object else _schema(structure.json))
            any_whitespace = not structure.disable_any_whitespace
            grammar = str(make.from_json_schema(json.dumps(schema), any_whitespace=any_whitespace))
            for number, rule in enumerate(rules):
                # Within a literal of the grammar, that ends before it and goes on behind.
                grammar = grammar.replace(f'\\"{placeholder(number)}\\"', f'" string_{number} "')
                grammar += f"\nstring_{number} ::= {rule}"
            return make.from_ebnf(grammar)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"structured_outputs cannot be used: {error}; got {structure!r:.300}") from error


def _schema(given: str | dict[str, Any]) -> Any:
    if isinstance(given, dict):
        return given
    if len(given) > MOST_CHARACTERS:
        raise ValueError(f"a JSON schema must have at most {MOST_CHARACTERS} characters, got {len(given)}")
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the JSON schema is no JSON: {error}") from error
