"""What a request must be like: checked before anything is queued, so that a refused call leaves no trace.

Parameters are checked by SamplingParams itself; here, whether they fit the model and the prompt. Nothing here knows
what becomes of a request.
"""

from collections.abc import Sequence as Items

import numpy as np

from nanovllm.config import Config
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.tokenizer import Tokenizer

Prompt = str | Items[int]
Params = SamplingParams | Items[SamplingParams] | None  # for all prompts, one for each, or the defaults
LISTS = (list, tuple, np.ndarray)  # the types of a list of prompts or token ids


def list_requests(prompts: Prompt | Items[Prompt], sampling_params: Params) -> list[tuple[Prompt, SamplingParams]]:
    """The prompts of a call, each with its parameters; they are not checked yet.

    Raises:
        TypeError, ValueError: parameters that are no list, or one of another length.
    """
    if not isinstance(prompts, LISTS) or (len(prompts) and isinstance(prompts[0], (int, np.integer))):
        prompts = [prompts]
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        sampling_params = [sampling_params or SamplingParams()] * len(prompts)
    if not isinstance(sampling_params, (list, tuple)):
        raise TypeError(f"sampling_params must be SamplingParams or a list of them, got {sampling_params!r}")
    if len(sampling_params) != len(prompts):
        raise ValueError(f"sampling_params has {len(sampling_params)} entries for {len(prompts)} prompts")
    return list(zip(prompts, sampling_params, strict=True))


def check_request(
    prompt: Prompt, params: SamplingParams, config: Config, tokenizer: Tokenizer | None
) -> tuple[list[int], SamplingParams]:
    """The prompt's token ids and the parameters of a request that can be completed.

    Raises:
        TypeError, ValueError: naming what is wrong, its value and the limit.
    """
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params must be SamplingParams, got {params!r}")
    if params.stop and tokenizer is None:
        raise ValueError(f"stop={params.stop!r} needs a tokenizer, the model has none")
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"the model has no tokenizer: a prompt must be token ids, got {prompt[:50]!r}")
        prompt = tokenizer.encode(prompt)
    if not isinstance(prompt, LISTS):
        raise TypeError(f"a prompt must be a string or a list of token ids, got {prompt!r}")
    token_ids = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
    vocab_size, limit = config.model_config.vocab_size, config.max_model_len
    if not 0 < len(token_ids) < limit:
        raise ValueError(f"a prompt must have tokens, but fewer than max_model_len={limit}, got {len(token_ids)}")
    kinds = set(map(type, token_ids))
    for kind in kinds:
        if kind is bool or not issubclass(kind, (int, np.integer)):
            raise TypeError(f"a prompt's token ids must be ints, got a {kind.__name__} in {token_ids!r}")
    wrong = [token_id for token_id in token_ids if not 0 <= token_id < vocab_size]
    if wrong:
        raise ValueError(f"a prompt's token ids must be between 0 and {vocab_size - 1}, got {wrong[0]}")
    if not isinstance(token_ids, list) or kinds != {int}:
        token_ids = list(map(int, token_ids))
    return token_ids, params
