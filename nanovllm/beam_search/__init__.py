"""Beam search: the k most probable continuations of a prompt that a search of width k finds.

`params` says what may be asked for, `search` drives an engine, `beams` chooses. Nothing of the engine knows this room;
what it needs of the engine is `generate` with `logprobs`.
"""

from nanovllm.beam_search.beams import BeamSearchOutput, BeamSearchSequence

__all__ = ["BeamSearchOutput", "BeamSearchSequence"]
