"""What the results of a program are made of, without their values: to be compared between two engines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

SCALARS = (type(None), bool, int, float, str)


def describe(value: Any) -> Any:
    """The types, names and lengths of which something is made.

    A scalar is the name of its type. A list, or a dict that is not by names, has its length and its items: one of them
    if all have the same description. Anything else has its fields.
    """
    kind = type(value).__name__
    if isinstance(value, SCALARS):
        return kind
    named = fields_of(value)
    if named is not None:
        return {"type": kind, "fields": {name: describe(entry) for name, entry in named.items()}}
    described = {"type": kind, "length": len(value)}
    if isinstance(value, Mapping):
        described["keys"] = summarise(value.keys())
        value = value.values()
    return described | {"items": summarise(value)}


def fields_of(value: Any) -> dict[str, Any] | None:
    """What something has by names; None for a collection."""
    if isinstance(value, Mapping):
        return dict(value) if all(isinstance(key, str) for key in value) else None
    if hasattr(value, "_asdict"):
        return value._asdict()
    if isinstance(value, (list, tuple)):
        return None
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: entry for name, entry in vars(value).items() if not name.startswith("_")}


def summarise(values: Iterable[Any]) -> list[Any]:
    """The descriptions of some values, or the only one there is."""
    described = [describe(value) for value in values]
    return described[:1] if all(entry == described[0] for entry in described) else described


def report(results: dict[str, Any]) -> None:
    """Prints the description of a program's results: its last line."""
    print(json.dumps(describe(results)))
