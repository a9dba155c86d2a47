"""Lists of names in quantization_config: which matrices are not quantised."""

import re

from nanovllm.checkpoint.facts import JsonFacts


def names_of(facts: JsonFacts, key: str) -> list[str]:
    """A list of strings; none where there is no key, or null."""
    value = facts.raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise facts.error(f"{key} must be a list of names, got {value!r}")
    return value


def is_listed(name: str, names: list[str]) -> bool:
    """Whether a matrix is among the names of a list, or in a module that is.

    A name may be whole, such as "model.layers.0.mlp.up_proj", or the end of whole ones, such as "up_proj" and "mlp";
    with "re:" before it, it is a regular expression that a whole name begins with.
    """
    for listed in names:
        if listed.startswith("re:"):
            if re.match(listed[3:], name):
                return True
        elif f".{listed}." in f".{name}.":
            return True
    return False
