"""Structured outputs: the forms that a text may have, and their grammars, which xgrammar compiles.

The engine asks `GrammarCompiler` for a compiled grammar; what holds a sample's tokens to it is
`sampling/constraints.py`.
"""

from nanovllm.structured.compiler import GrammarCompiler

__all__ = ["GrammarCompiler"]
