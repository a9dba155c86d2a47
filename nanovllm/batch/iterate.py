"""Any number of requests through an engine, of which it holds a bounded number at a time. Knows nothing of files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from nanovllm.outputs import RequestOutput
from nanovllm.requests.admission import CheckedRequest
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.inputs import Prompt

# Requests that are held, for each sequence that can run: where all that run end at once, as many are there to follow.
LOOK_AHEAD = 2
MISSING = object()

Key = TypeVar("Key")


def generate_iter(
    llm: LLMEngine, prompts: Iterable[Prompt], sampling_params: SamplingParams | Iterable[SamplingParams] | None
) -> Iterator[tuple[int, RequestOutput]]:
    """`LLM.generate_iter`, whose arguments and results these are."""
    if isinstance(prompts, (str, dict)) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be an iterable of prompts, got {prompts!r:.200}")
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        llm.intake.check_one([0], sampling_params)  # lest it be known only when the first result is asked for
        pairs = zip(prompts, itertools.repeat(sampling_params))
    elif isinstance(sampling_params, Iterable):
        pairs = itertools.zip_longest(prompts, sampling_params, fillvalue=MISSING)
    else:
        raise TypeError(f"sampling_params must be SamplingParams or an iterable of them, got {sampling_params!r:.200}")
    return complete(llm, _checked(llm, pairs))


def complete(llm: LLMEngine, requests: Iterator[tuple[Key, CheckedRequest]]) -> Iterator[tuple[Key, RequestOutput]]:
    """Completes requests; yields their results as they finish, each with the key that came with its request.

    `requests` is asked for the next ones when others have finished, in the thread that asks for results. What it
    raises is raised once all that it gave before are completed. Closing the generator drops what is unfinished.
    """
    most = LOOK_AHEAD * llm.config.max_num_seqs
    keys: dict[int, Key] = {}  # of the requests that are held, by number
    results: dict[int, RequestOutput] = {}  # of those among them that have finished
    failure: Exception | None = None
    try:
        while True:
            while failure is None and len(keys) < most:
                try:
                    key, checked = next(requests)
                except StopIteration:
                    break
                except Exception as error:
                    failure = error
                    break
                with llm._turn():
                    keys[llm.num_seqs] = key  # before it is queued, lest an interrupt leave it behind
                    llm.requests.add(llm.intake.make(checked, results))
            if not keys:
                break
            with llm._turn():
                if not results:  # else other threads' steps have brought some
                    llm._advance()
            for number in list(results):
                yield keys.pop(number), results.pop(number)
    finally:
        llm._drop(list(keys))
    if failure is not None:
        raise failure


def _checked(llm: LLMEngine, pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[int, CheckedRequest]]:
    """The requests of prompts and their parameters, by their index.

    Raises:
        TypeError, ValueError: a bad prompt or parameter, with its index, or one without the other.
    """
    for index, (prompt, params) in enumerate(pairs):
        if prompt is MISSING or params is MISSING:
            name = "prompts" if prompt is MISSING else "sampling_params"
            raise ValueError(f"there must be as many prompts as sampling_params, but {name} has only {index}")
        try:
            checked = llm.intake.check_one(prompt, params)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"prompt {index}: {error}") from error
        yield index, checked
