"""The table of docs/models.md that says which models are supported, made from the code.

python -m tools.supported_models
"""

from __future__ import annotations

import sys

from nanovllm.checkpoint.families import FAMILIES
from nanovllm.models import ARCHITECTURES


def table() -> str:
    """A row for each architecture: where it is, what the file says that it is, and what its layers can have."""
    rows = ["| architecture | file | what it is | windows | experts |", "|---|---|---|---|---|"]
    for name, model in ARCHITECTURES.items():
        family, module = FAMILIES[name], sys.modules[model.__module__]
        summary = " ".join(module.__doc__.split("\n\n")[0].split()).split(":")[0].rstrip(".")
        windows = "no" if family.slides == "in the cache" else "yes"
        experts = "no" if family.num_experts is None else "yes"
        file = "/".join(module.__name__.split(".")[1:]) + ".py"
        rows.append(f"| `{name}` | `{file}` | {summary} | {windows} | {experts} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
