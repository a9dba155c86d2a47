"""Beam search: the k most probable continuations of a prompt that a search of width k finds.

`search` drives an engine, `beams` chooses. Nothing of the engine knows this room; what it needs of the engine is
`generate` with `logprobs`.
"""

from nanovllm.beam_search.beams import BeamSearchSequence
from nanovllm.beam_search.search import BeamSearchOutput, beam_search

__all__ = ["BeamSearchOutput", "BeamSearchSequence", "beam_search"]
