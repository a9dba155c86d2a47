"""Stub until the room is there."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np


class Constraint(Protocol):
    is_finished: bool


class GrammarCompiler:
    def __init__(self, folder, tokenizer, vocab_size, eos_token_ids):
        import xgrammar as xgr

        self.xgr = xgr
        backend = tokenizer.backend
        vocab = [backend.id_to_token(i) or "" for i in range(vocab_size)]
        metadata = xgr.TokenizerInfo._detect_metadata_from_hf(backend.to_str())
        self.info = xgr.TokenizerInfo(
            vocab,
            xgr.VocabType(metadata["vocab_type"]),
            vocab_size=vocab_size,
            stop_token_ids=sorted(i for i in eos_token_ids if i < vocab_size) or None,
            add_prefix_space=metadata["add_prefix_space"],
        )
        self.compiler = xgr.GrammarCompiler(self.info, max_threads=1)
        self.pool = ThreadPoolExecutor(2)

    def validate(self, params):
        pass

    def compile(self, params):
        c = self.compiler
        if params.json is not None:
            schema = params.json if isinstance(params.json, str) else json.dumps(params.json)
            return self.pool.submit(c.compile_json_schema, schema, any_whitespace=not params.disable_any_whitespace)
        if params.json_object:
            return self.pool.submit(c.compile_json_schema, '{"type": "object"}', strict_mode=False)
        if params.regex is not None:
            return self.pool.submit(c.compile_regex, params.regex)
        if params.choice is not None:
            return self.pool.submit(c.compile_grammar, "root ::= " + " | ".join(json.dumps(x) for x in params.choice))
        return self.pool.submit(c.compile_grammar, params.grammar)


class Grammar:
    def __init__(self, compiled):
        import xgrammar as xgr

        self.matcher = xgr.GrammarMatcher(compiled)

    def accept(self, token_id):
        self.matcher.accept_token(token_id)

    def fill_mask(self, mask):
        self.matcher.fill_next_token_bitmask(mask[None])

    @property
    def is_finished(self):
        return self.matcher.is_terminated() or self.matcher.is_completed() and False


class BadWords:
    is_finished = False

    def __init__(self, words, vocab_size):
        self.words = words
        self.generated = []

    def accept(self, token_id):
        self.generated.append(token_id)

    def fill_mask(self, mask):
        mask[:] = -1
        for *before, last in self.words:
            if not before or self.generated[-len(before) :] == before:
                mask[last // 32] &= np.int32(~(1 << (last % 32)) & 0xFFFFFFFF if last % 32 != 31 else 0x7FFFFFFF) if last % 32 == 31 else np.int32(~(1 << (last % 32)))


class Both:
    def __init__(self, *parts):
        self.parts = parts

    def accept(self, token_id):
        for p in self.parts:
            p.accept(token_id)

    def fill_mask(self, mask):
        a = mask.copy()
        self.parts[0].fill_mask(mask)
        self.parts[1].fill_mask(a)
        mask &= a

    @property
    def is_finished(self):
        return any(p.is_finished for p in self.parts)


def make_constraint(grammar: Any, bad_words: Any, vocab_size: int) -> Any:
    words = [w for w in bad_words if len(w) > 1]
    parts = []
    if grammar is not None:
        parts.append(Grammar(grammar))
    if words:
        parts.append(BadWords(words, vocab_size))
    return Both(*parts) if len(parts) == 2 else parts[0] if parts else None
