"""The tables of docs/coming-from-vllm.md that say what becomes of vLLM's options and methods, made from the code.

python -m tools.vllm_options
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from nanovllm.compat.engine_options import OTHER_NAMES, OTHER_VALUES
from nanovllm.compat.refused_arguments import REFUSED_ARGUMENTS, REFUSED_PARAMS
from nanovllm.compat.refused_methods import REFUSED as REFUSED_METHODS
from nanovllm.compat.vllm_options import EMPTY, NOT_HERE, has_only_zeros, is_size

WORDS = {  # for values that are not listed one by one
    object: "anything",
    bool: "True, False",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    is_size: "a size",
    has_only_zeros: "numbers that are 0",
}


def translated() -> str:
    """Options and values that have another name here."""
    rows = ["| vLLM | here |", "|---|---|"]
    rows += [f"| `{theirs}` | `{ours}` |" for theirs, ours in OTHER_NAMES.items()]
    for name, values in OTHER_VALUES.items():
        rows += [f"| `{name}={theirs!r}` | `{name}={ours!r}` |" for theirs, ours in values.items()]
    return "\n".join(rows)


def accepted() -> str:
    """Options of what is not here, with the values that ask for nothing, and why others are refused."""
    rows = ["| options, and what they are passed over at | else they are refused |", "|---|---|"]
    for reason, options in NOT_HERE.items():
        groups = []
        for values, names in groupby(options, key=options.get):
            groups.append(f"{', '.join(f'`{name}`' for name in names)}: {describe(values)}")
        rows.append(f"| {'; '.join(groups)} | {reason} |")
    return "\n".join(rows)


def describe(values: tuple[Any, ...]) -> str:
    """The values in words."""
    is_empty = values[: len(EMPTY)] == EMPTY
    told = ["None", "what is empty"] if is_empty else []
    for value in values[len(EMPTY) :] if is_empty else values:
        told.append(WORDS[value] if callable(value) else f"{value!r}")
    return ", ".join(dict.fromkeys(told))


def refused(reasons: Mapping[str, str]) -> str:
    """Names that are refused whatever they are given."""
    return "\n".join(["| | why |", "|---|---|", *(f"| `{name}` | {reason} |" for name, reason in reasons.items())])


TABLES = {
    "Other names": translated(),
    "Options": accepted(),
    "Methods of LLM": refused(REFUSED_METHODS),
    "Arguments of calls and keys of prompts": refused(REFUSED_ARGUMENTS),
    "SamplingParams": refused(REFUSED_PARAMS),
}

if __name__ == "__main__":
    for title, table in TABLES.items():
        print(f"{title}:\n\n{table}\n")
