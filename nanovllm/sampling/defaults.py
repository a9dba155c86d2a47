"""Parameters for requests that bring none: what a checkpoint's authors recommend, as generation_config.json says it.

By the rule of vLLM: six keys count, whatever `do_sample` says, and a null is as good as no key. Which tokens end a
text, which the same file says, is read by checkpoint/model_config.py.
"""

import os
from typing import Any, NamedTuple

from nanovllm.checkpoint.files import read_json
from nanovllm.config import Config
from nanovllm.sampling_params import SamplingParams

KEYS = {  # of the file, and what SamplingParams calls them
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}


class SamplingDefaults(NamedTuple):
    """Parameters for requests that bring none.

    Attributes:
        params: all of them.
        taken: those that the file gave, by their names in SamplingParams.
        path: the file; it need not be there.
    """

    params: SamplingParams
    taken: dict[str, Any]
    path: str


def default_sampling_params(config: Config) -> SamplingDefaults:
    """What config.generation_config says: by the model's file, by another folder's, or by none at all.

    Raises:
        ValueError: the file is no JSON object, or a value in it is of another type or out of its range.
    """
    path = os.path.join(config.generation_folder, "generation_config.json")
    values = {} if config.generation_config == "vllm" else read_json(path)
    taken = {name: values[key] for key, name in KEYS.items() if key in values}
    try:
        return SamplingDefaults(SamplingParams(**taken), taken, path)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error} ({path})") from error
