"""The options of SamplingParams that are lists or a dict: their forms, and what may stand in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.options.checks import check, check_text, check_token_id, checked_tuple

if TYPE_CHECKING:
    from nanovllm.sampling_params import SamplingParams

LARGEST_BIAS = 100.0


def check_lists(params: SamplingParams) -> None:
    """Checks stop, stop_token_ids, bad_words, allowed_token_ids and logit_bias, and brings each to one form.

    Raises:
        TypeError, ValueError: naming the option and its value.
    """
    stop = [params.stop] if isinstance(params.stop, str) else params.stop
    params.stop = checked_tuple("stop", () if stop is None else stop, check_text)
    for name, check_entry in (("stop_token_ids", check_token_id), ("bad_words", check_text)):
        value = getattr(params, name)
        setattr(params, name, checked_tuple(name, () if value is None else value, check_entry))
    if params.allowed_token_ids is not None:
        params.allowed_token_ids = checked_tuple("allowed_token_ids", params.allowed_token_ids, check_token_id)
        if not params.allowed_token_ids:
            raise ValueError("allowed_token_ids must hold at least one id, got none")
    if params.logit_bias is not None:
        params.logit_bias = _checked_bias(params.logit_bias)


def _checked_bias(value: object) -> dict[int, float]:
    """logit_bias with ids that are ints and numbers that are within [-LARGEST_BIAS, LARGEST_BIAS]."""
    if not isinstance(value, dict):
        raise TypeError(f"logit_bias must be a dict of token ids and numbers, got {value!r}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        is_digits = isinstance(key, str) and key.isascii() and key.isdigit()
        token_id = int(key) if is_digits else key
        check("a token id of logit_bias", token_id, int, 0)
        check(f"logit_bias[{key!r}]", bias, float)
        if token_id in biases:
            raise ValueError(f"logit_bias must name a token once, got {key!r} twice")
        biases[token_id] = float(min(max(bias, -LARGEST_BIAS), LARGEST_BIAS))
    return biases
