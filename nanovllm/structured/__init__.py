"""Structured outputs: what a text may be, token by token, by xgrammar; and bad words, which are told the same way.

The engine asks `GrammarCompiler` for a compiled grammar and `make_constraint` for what a sample's tokens are held to.
"""

from nanovllm.structured.compiler import GrammarCompiler
from nanovllm.structured.constraints import Constraint, make_constraint

__all__ = ["Constraint", "GrammarCompiler", "make_constraint"]
