"""Beam search by requests of one token each: an engine gives the log probabilities, `Beams` chooses.

Nothing here knows how a step is computed. The prefix cache keeps what beams share, so that a step computes the tokens
behind each beam's last full block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from nanovllm.beam_search.beams import Beams, BeamSearchOutput
from nanovllm.beam_search.params import BeamSearchParams
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.inputs import Prompt

MAX_EXPONENT = 126  # of two, in a float32


def beam_search(
    llm: LLMEngine, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool = False
) -> list[BeamSearchOutput]:
    """Continues each prompt in the ways that a beam search finds most probable.

    The beams and their order are those of transformers' `generate(num_beams=beam_width, early_stopping=False)`: by
    cum_logprob / (number of generated tokens ** length_penalty).

    Args:
        llm: computes the log probabilities; other threads may use it meanwhile.
        prompts: as for `LLM.generate`.
        params: the same for all prompts.
        use_tqdm: show a bar of the tokens that each beam has.

    Raises:
        TypeError, ValueError: a bad prompt or parameter, or a `beam_width` that needs more log probabilities than the
            engine's `max_logprobs`.
        RequestError, RuntimeError: as `LLM.generate`.
    """
    _check(params)
    eos_token_ids = frozenset() if params.ignore_eos else llm.scheduler.eos_token_ids
    num_logprobs = _num_logprobs(params.beam_width, len(eos_token_ids), llm.config.max_logprobs)
    step_params = SamplingParams(temperature=0, max_tokens=1, logprobs=num_logprobs, detokenize=False)
    results = llm.generate(prompts, step_params, use_tqdm=False)
    searches = []
    for result in results:
        max_tokens = min(params.max_tokens, llm.config.max_model_len - len(result.prompt_token_ids))
        searches.append(Beams(result.prompt_token_ids, max_tokens, params, eos_token_ids))
    running = searches
    with tqdm(total=params.max_tokens, desc="Beam search", unit="token", disable=not use_tqdm) as bar:
        while running:
            choices = iter([result.outputs[0].logprobs[0] for result in results])
            for beams in running:
                beams.advance([next(choices) for _ in beams.running])
            bar.update()
            running = [beams for beams in running if not beams.is_done]
            next_prompts = [{"prompt_token_ids": beam.tokens} for beams in running for beam in beams.running]
            results = llm.generate(next_prompts, step_params, use_tqdm=False)
    return [_output(llm, beams, params) for beams in searches]


def _check(params: BeamSearchParams) -> None:
    """Raises TypeError or ValueError unless the search can be done as `params` ask."""
    if not isinstance(params, BeamSearchParams):
        raise TypeError(f"params must be BeamSearchParams, got {params!r}")
    params.check()
    if params.temperature not in (0, 1):
        raise ValueError(
            f"temperature must be 0 in a beam search, or 1, which is the same, got {params.temperature}: "
            "beams are compared by the model's own probabilities, of which the engine gives only the largest"
        )
    if abs(params.length_penalty) * math.log2(params.max_tokens) > MAX_EXPONENT:
        raise ValueError(
            f"length_penalty must be at most {MAX_EXPONENT / math.log2(params.max_tokens):.4g} in size for max_tokens="
            f"{params.max_tokens}, got {params.length_penalty}: max_tokens ** length_penalty must be a float32"
        )


def _num_logprobs(beam_width: int, num_eos_tokens: int, limit: int) -> int:
    """How many of each beam's most likely tokens the search must know; `limit` is the engine's, -1 for none.

    Raises:
        ValueError: more than the engine gives.
    """
    num_logprobs = beam_width + num_eos_tokens
    if -1 < limit < num_logprobs:
        raise ValueError(
            f"beam_width={beam_width} needs the {num_logprobs} most likely tokens of each beam (beam_width and the "
            f"{num_eos_tokens} tokens that end a text), but max_logprobs is {limit}: start the engine by "
            f"LLM(..., max_logprobs={num_logprobs})"
        )
    return num_logprobs


def _output(llm: LLMEngine, beams: Beams, params: BeamSearchParams) -> BeamSearchOutput:
    """The result of a search that is done, with texts."""
    sequences = [beam for _, beam in beams.finished]
    for beam in sequences:
        is_cut = beam.finish_reason == "stop" and not params.include_stop_str_in_output
        token_ids = beam.tokens[:-1] if is_cut else beam.tokens
        beam.text = llm.tokenizer.decode(token_ids, skip_special_tokens=False) if llm.tokenizer is not None else ""
    return BeamSearchOutput(sequences)
