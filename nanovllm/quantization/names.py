"""Lists of names in quantization_config: which matrices are not quantised, or how."""

import re

from nanovllm.checkpoint.facts import JsonFacts


def names_of(facts: JsonFacts, key: str) -> list[str]:
    """A list of strings; none where there is no key, or null."""
    value = facts.raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise facts.error(f"{key} must be a list of names, got {value!r}")
    for name in value:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise facts.error(f"{key} has {name!r}, which is no regular expression: {error}") from error
    return value


def is_listed(names: list[str], listed_names: list[str]) -> bool:
    """Whether a matrix, which checkpoints call by any of some names, is in a list, or in a module that is.

    A listed name may be whole, such as "model.layers.0.mlp.up_proj", or a part of whole ones, such as "up_proj" and
    "mlp"; with "re:" before it, it is a regular expression that a whole name begins with.
    """
    for listed in listed_names:
        for name in names:
            if listed.startswith("re:"):
                if re.match(listed[3:], name):
                    return True
            elif f".{listed.strip('.')}." in f".{name}.":
                return True
    return False
