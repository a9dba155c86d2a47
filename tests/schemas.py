"""Random JSON schemas, of all that is supported, such that random texts by them end soon."""

from __future__ import annotations

import random
from typing import Any


def random_schema(rng: random.Random, depth: int = 0, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """A schema; `names` of $defs may be referred to."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format"]
    if depth < 3:
        kinds += ["object", "object", "array", "array", "anyOf", "types", "tuple", "allOf", "map"]
    if names:
        kinds.append("ref")
    return MAKERS[rng.choice(kinds)](rng, depth, names)


def with_definitions(rng: random.Random) -> dict[str, Any]:
    """A random object, array or other schema, some with $defs that refer to each other."""
    if rng.random() < 0.6:
        return random_schema(rng)
    names = ("Name", "with space", "node")
    schema = random_schema(rng, names=names[:2])
    node = {"value": random_schema(rng, 2), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}
    schema["$defs"] = {
        "Name": random_schema(rng, 2),
        "with space": random_schema(rng, 2, names[:1]),
        "node": {"type": "object", "properties": node, "required": ["value", "next"]},
    }
    return schema


def make_object(rng: random.Random, depth: int, names: tuple[str, ...]) -> dict[str, Any]:
    keys = rng.sample(["a", "name", "title", "b c", 'q"', "ü", "type", "$ref?", "0"], rng.randint(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {key: random_schema(rng, depth + 1, names) for key in keys},
        "required": rng.sample(keys, rng.randint(0, len(keys))),
        "description": "some",
    }
    if rng.random() < 0.5:
        schema["additionalProperties"] = rng.choice([False, True, {"type": "integer"}])
    return schema


def make_integer(rng: random.Random, depth: int, names: tuple[str, ...]) -> dict[str, Any]:
    low = rng.randint(-500, 500)
    bounds = {"minimum": low, "maximum": low + rng.randint(0, 300)}
    if rng.random() < 0.3:
        bounds = {"exclusiveMinimum": low, "exclusiveMaximum": low + rng.randint(2, 300)}
    return {"type": "integer"} | (bounds if rng.random() < 0.7 else {})


def make_number(rng: random.Random, depth: int, names: tuple[str, ...]) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    return {"type": "number"} | ({"minimum": low, "maximum": low + rng.randint(1, 30)} if rng.random() < 0.5 else {})


def make_string(rng: random.Random, depth: int, names: tuple[str, ...]) -> dict[str, Any]:
    least = rng.randint(0, 3)
    return {"type": "string", "maxLength": least + rng.randint(0, 5)} | ({"minLength": least} if least else {})


def make_array(rng: random.Random, depth: int, names: tuple[str, ...]) -> dict[str, Any]:
    least = rng.randint(0, 2)
    items = {"items": random_schema(rng, depth + 1, names)} if rng.random() < 0.9 else {}
    return {"type": "array", "minItems": least, "maxItems": least + rng.randint(0, 2)} | items


VALUES = [
    None,
    True,
    False,
    0,
    -3,
    12345678901,
    2.5,
    "",
    "x",
    'say "hi"\n\\',
    "größer 👋",
    [1, "a"],
    {"k": [None]},
    [],
]
PATTERNS = ["^[a-z]{2,5}$", r"^\d{3}-\d{4}$", "^(ab|cd)+x?$", r"^[^a-z]{1,4}$", r"^\w+@\w+\.com$", "^$"]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "email"]
TYPES = ["integer", "boolean", "null"]
MAKERS = {
    "object": make_object,
    "integer": make_integer,
    "number": make_number,
    "string": make_string,
    "array": make_array,
    "boolean": lambda rng, depth, names: {"type": "boolean", "title": "yes or no"},
    "null": lambda rng, depth, names: {"type": "null"},
    "const": lambda rng, depth, names: {"const": rng.choice(VALUES)},
    "enum": lambda rng, depth, names: {"enum": rng.sample(VALUES, rng.randint(1, 5))},
    "pattern": lambda rng, depth, names: {"type": "string", "pattern": rng.choice(PATTERNS)},
    "format": lambda rng, depth, names: {"type": "string", "format": rng.choice(FORMATS)},
    "anyOf": lambda rng, depth, names: {
        "anyOf": [random_schema(rng, depth + 1, names) for _ in range(rng.randint(1, 3))]
    },
    "allOf": lambda rng, depth, names: {"allOf": [random_schema(rng, depth + 1, names)]},
    "types": lambda rng, depth, names: {"type": rng.sample(TYPES, rng.randint(1, 3))},
    "tuple": lambda rng, depth, names: {
        "type": "array",
        "prefixItems": [random_schema(rng, depth + 1, names) for _ in range(rng.randint(1, 3))],
        "items": False,
    },
    "map": lambda rng, depth, names: {"type": "object", "additionalProperties": make_integer(rng, depth, names)},
    "ref": lambda rng, depth, names: {"$ref": f"#/$defs/{rng.choice(names)}"},
}
