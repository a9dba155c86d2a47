"""What a request must be like: checked before anything is queued, so that a refused call leaves no trace.

Parameters are checked by SamplingParams itself; here, whether they fit the model and the prompt. Nothing here knows
what becomes of a request.
"""

import copy
from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import numpy as np

from nanovllm.config import Config
from nanovllm.inputs import Prompt
from nanovllm.inputs.forms import LISTS, check_ids, list_prompts, text_and_ids
from nanovllm.options.checks import check
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.tokenizer import Tokenizer

Params = SamplingParams | Items[SamplingParams] | None  # for all prompts, one for each, or the defaults


class CheckedRequest(NamedTuple):
    """A request that can be completed.

    Attributes:
        prompt: the text, None if token ids were given without one.
        token_ids: what is computed, within the vocabulary, and fewer than max_model_len.
        params: a checked copy that the caller cannot change, but that requests may share; its max_tokens is an int.
        priority: lower ones go first.
        timeout: seconds that it may take, from now on.
    """

    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    timeout: float | None = None


def read_added(
    request_id: str | Prompt | None,
    prompt: Prompt | SamplingParams | None,
    params: SamplingParams | None,
    sampling_params: SamplingParams | None,
) -> tuple[str | None, Prompt | None, SamplingParams | None]:
    """The id, prompt and parameters of `add_request`, which may be given without the first; they are not checked yet.

    Raises:
        TypeError: the id is no string, or parameters are given twice.
    """
    second = prompt if isinstance(prompt, SamplingParams) else None
    if prompt is None or second is not None:  # the first argument is the prompt
        request_id, prompt = None, request_id
    elif request_id is not None and not isinstance(request_id, str):
        raise TypeError(f"request_id must be a string, got {request_id!r}")
    given = [value for value in (second, params, sampling_params) if value is not None]
    if len(given) > 1:
        raise TypeError(f"a request has one SamplingParams, got {given}")
    return request_id, prompt, given[0] if given else None


def check_requests(
    prompts: Prompt | Items[Prompt] | None,
    sampling_params: Params,
    config: Config,
    tokenizer: Tokenizer | None,
    defaults: SamplingParams,
    prompt_token_ids: Items[int] | Items[Items[int]] | None = None,
) -> list[CheckedRequest]:
    """The requests of a call, for each prompt one.

    Args:
        prompts: one or a list of them; a prompt is a string, a list of token ids, or a dict that has them under
            "prompt" or "prompt_token_ids". If it has both, the ids are computed and the text is kept.
        sampling_params: for all prompts, or a list with one for each.
        defaults: taken where `sampling_params` is None.
        prompt_token_ids: the ids of one prompt or a list of them; `prompts` are None then, or the texts to be kept.

    Raises:
        TypeError, ValueError: naming what is wrong, its value and the limit.
    """
    listed = list_prompts(prompts, prompt_token_ids)
    listed_params = _list_params(defaults if sampling_params is None else sampling_params, len(listed))
    checked: dict[int, SamplingParams] = {}  # by the id of what was given, mostly one for all prompts
    for params in listed_params:
        if id(params) not in checked:
            checked[id(params)] = _check_params(params, config, tokenizer)
    return [
        _check_prompt(prompt, checked[id(params)], config, tokenizer)
        for prompt, params in zip(listed, listed_params, strict=True)
    ]


def check_request(
    prompt: Prompt,
    sampling_params: SamplingParams | None,
    config: Config,
    tokenizer: Tokenizer | None,
    defaults: SamplingParams,
) -> CheckedRequest:
    """The request of a call that takes one prompt; the arguments and errors are those of `check_requests`."""
    params = _check_params(defaults if sampling_params is None else sampling_params, config, tokenizer)
    return _check_prompt(prompt, params, config, tokenizer)


def with_urgency(
    requests: list[CheckedRequest], priority: Items[int] | None, timeout: float | None, config: Config
) -> list[CheckedRequest]:
    """The requests of a call with a priority each, and the seconds that they may take.

    Raises:
        TypeError, ValueError: naming what is wrong, its value and the limit.
    """
    if timeout is not None:
        check("timeout", timeout, float, 0)
    priorities = [0] * len(requests) if priority is None else priority
    if not isinstance(priorities, LISTS):
        raise TypeError(f"priority must be a list with a number for each prompt, got {priority!r}")
    if len(priorities) != len(requests):
        raise ValueError(f"priority has {len(priorities)} entries for {len(requests)} prompts")
    for number in priorities:
        check("priority", number, int)
        if number and config.scheduling_policy != "priority":
            raise ValueError(
                f"priority={number} needs LLM(..., scheduling_policy='priority'): by 'fcfs', requests are served in "
                "the order in which they come"
            )
    return [
        request._replace(priority=number, timeout=timeout)
        for request, number in zip(requests, priorities, strict=True)
    ]


def _list_params(sampling_params: SamplingParams | Items[SamplingParams], num_prompts: int) -> Items[SamplingParams]:
    """The parameters of each prompt, which are not checked yet."""
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * num_prompts
    if not isinstance(sampling_params, (list, tuple)):
        raise TypeError(f"sampling_params must be SamplingParams or a list of them, got {sampling_params!r}")
    if len(sampling_params) != num_prompts:
        raise ValueError(f"sampling_params has {len(sampling_params)} entries for {num_prompts} prompts")
    return sampling_params


def _check_params(params: SamplingParams, config: Config, tokenizer: Tokenizer | None) -> SamplingParams:
    """A copy of parameters that fit the model; they are checked again, as they may have been assigned to."""
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params must be SamplingParams, got {params!r}")
    params = params.clone()
    params.check()
    for name in ("stop", "bad_words", "structured_outputs"):
        value = getattr(params, name)
        if value and tokenizer is None:
            raise ValueError(f"{name}={value!r} needs a tokenizer, the model has none")
    vocab_size, most_logprobs = config.model_config.vocab_size, config.max_logprobs
    for name in ("allowed_token_ids", "logit_bias"):
        highest = max(getattr(params, name) or (0,))
        if highest >= vocab_size:
            raise ValueError(f"{name} must hold token ids between 0 and {vocab_size - 1}, got {highest}")
    for name in ("logprobs", "prompt_logprobs"):
        num_logprobs = getattr(params, name)
        if num_logprobs is None:
            continue
        if most_logprobs != -1 and not 0 <= num_logprobs <= most_logprobs:
            raise ValueError(
                f"{name}={num_logprobs} asks for more than max_logprobs={most_logprobs} gives; "
                f"start the engine by LLM(..., max_logprobs={num_logprobs})"
            )
        if num_logprobs > vocab_size:
            raise ValueError(f"{name} must be at most the vocabulary's {vocab_size} tokens, got {num_logprobs}")
    return params


def _check_prompt(prompt: Any, params: SamplingParams, config: Config, tokenizer: Tokenizer | None) -> CheckedRequest:
    """The request of a prompt with checked parameters."""
    text, given_ids = text_and_ids(prompt)
    if given_ids is None:
        if tokenizer is None:
            raise ValueError(f"the model has no tokenizer: a prompt must be token ids, got {text[:50]!r}")
        token_ids = tokenizer.encode(text)
    else:
        token_ids = given_ids.tolist() if isinstance(given_ids, np.ndarray) else list(given_ids)
    longest = config.max_model_len - 1  # one more is generated at least
    if params.truncate_prompt_tokens is not None:
        num_kept = longest if params.truncate_prompt_tokens == -1 else params.truncate_prompt_tokens
        token_ids = token_ids[-num_kept:]
    if not token_ids:
        raise ValueError("a prompt must have tokens, got none")
    if len(token_ids) > longest:
        raise ValueError(_say_too_long(len(token_ids), config))
    token_ids = check_ids(token_ids, config.model_config.vocab_size)
    if params.max_tokens is None:
        params = copy.copy(params)
        params.max_tokens = config.max_model_len - len(token_ids)
    return CheckedRequest(text, token_ids, params)


def _say_too_long(num_tokens: int, config: Config) -> str:
    """What is wrong with a prompt of so many tokens, and what its sender can do."""
    limit, model_limit = config.max_model_len, config.model_config.max_position_embeddings
    message = f"a prompt must have fewer tokens than max_model_len={limit}, got {num_tokens}; "
    if model_limit > limit:
        message += f"the model itself takes {model_limit}: raise LLM(..., max_model_len={model_limit}), or "
    return message + "shorten the prompt, or let SamplingParams(truncate_prompt_tokens=-1) keep only its end"
