"""vLLM's spellings of engine options.

An option of vLLM is one of ours, another name of one of ours, or in the table of what is not here. Nothing here knows
what our options mean, or checks their values.
"""

import difflib
from collections.abc import Collection
from typing import Any

from nanovllm.compat.vllm_options import ACCEPTED

OTHER_NAMES = {"block_size": "kvcache_block_size", "num_gpu_blocks_override": "num_kvcache_blocks"}
OTHER_VALUES = {  # of options that have one name in both
    "attention_backend": {None: "auto", "FLASH_ATTN": "flash_attn", "TRITON_ATTN": "triton", "TORCH_SDPA": "torch"}
}


def translate(options: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The options that are given in our spelling, of which `known` has all names.

    Raises:
        TypeError: an option that neither we nor vLLM have.
        ValueError: one that asks for what is not here, or one that is given by two names.
    """
    ours: dict[str, Any] = {}
    for name, value in options.items():
        if name in known:
            ours[name] = _spell(name, value)
        elif name in OTHER_NAMES:
            own = OTHER_NAMES[name]
            if value is None:  # the engine's choice
                continue
            if own in options:
                raise ValueError(f"{name}={value!r} and {own}={options[own]!r} are two names of one option; pass one")
            ours[own] = value
        elif name in ACCEPTED:
            values, reason = ACCEPTED[name]
            if not any(_accepts(entry, value) for entry in values):
                raise ValueError(f"{name}={value!r:.200} is not supported: {reason}")
        else:
            nearest = difflib.get_close_matches(name, [*known, *OTHER_NAMES, *ACCEPTED], n=1, cutoff=0.6)
            raise TypeError(f"unknown option {name!r}" + "".join(f"; did you mean {near!r}?" for near in nearest))
    return ours


def _spell(name: str, value: Any) -> Any:
    """The value of one of our options as we spell it."""
    values = OTHER_VALUES.get(name, {})
    return values.get(value, value) if value is None or isinstance(value, str) else value


def _accepts(entry: Any, value: object) -> bool:
    """Whether an entry of `Accepted` takes a value; True is not taken for 1."""
    if isinstance(entry, type):
        return isinstance(value, entry)
    return entry(value) if callable(entry) else type(value) is type(entry) and value == entry
