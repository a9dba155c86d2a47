"""What vLLM's calls, prompts and parameters may bring that is not here, and why. Knows nothing of what is here."""

from collections.abc import Mapping
from typing import Any

TEXT_ONLY = "the models take text only"
REFUSED_ARGUMENTS = {  # of calls and prompts
    "lora_request": "the weights are those of the checkpoint; merge the adapter into it",
    "multi_modal_data": TEXT_ONLY,
    "multi_modal_uuids": TEXT_ONLY,
    "mm_processor_kwargs": TEXT_ONLY,
    "prompt_embeds": "a prompt's embeddings are looked up by its token ids",
    "cache_salt": "all requests share cached prefixes; enable_prefix_caching=False keeps them apart",
    "encoder_prompt": "the models have no encoder",
    "tokenization_kwargs": "truncate_prompt_tokens of SamplingParams cuts prompts, and all else is the tokenizer's",
    "decoder_prompt": "the models have no encoder, so that a prompt has one part",
}
REFUSED_PARAMS = {  # of SamplingParams
    "logits_processors": "a Python function called for each token would leave the CUDA graphs and the overlap of "
    "steps; use logit_bias, allowed_token_ids, bad_words or structured_outputs",
    "best_of": "use n and choose among its texts; only best_of=n asks for nothing more",
    "extra_args": "nothing here would read them",
}


def refuse(given: Mapping[str, Any], reasons: Mapping[str, str] = REFUSED_ARGUMENTS) -> None:
    """Raises ValueError if something given that has a reason to be refused is neither None nor empty."""
    for name, reason in reasons.items():
        value = given.get(name)
        if value is not None and not (hasattr(value, "__len__") and len(value) == 0):
            raise ValueError(f"{name} is not supported: {reason}; got {value!r:.200}")


def refuse_params(params: Any) -> None:
    """Raises TypeError or ValueError for an option of SamplingParams that asks for what is not here."""
    if params.extra_args is not None and not isinstance(params.extra_args, dict):
        raise TypeError(f"extra_args must be a dict, got {params.extra_args!r}")
    given = {name: getattr(params, name) for name in REFUSED_PARAMS}
    if params.best_of == params.n:
        del given["best_of"]
    refuse(given, REFUSED_PARAMS)
