"""Random JSON schemas of all that structured outputs support, small enough for random texts to end."""

from __future__ import annotations

import random
from typing import Any

PATTERNS = [
    "^[a-z]{2,5}$",
    "^(foo|ba[rz]?)+$",
    r"^\d{3}-\d{4}$",
    r"^[A-Z][a-z]*( [A-Z][a-z]*){0,2}$",
    r'^[\w."-]{1,6}$',
    r"^C:\\\w+$",
    "^[^a-z]{1,4}$",
    "^.{0,70}é?$",
    r"^(a|b{1,3}|\t)*$",
    "^[一-龥👋]{1,3}$",
]
FORMATS = ["date", "time", "date-time", "ipv4", "ipv6", "uuid", "email", "duration", "json-pointer"]
CONSTANTS = ["a", "", 'q"\\\n/é👋', 0, -7, 1.5, 1e-7, 2**53, True, False, None, [1, "x"], {"k": [None, {}]}]
NAMES = ["name", "id", "title", "default", "tags", "größe", 'a"b', "x/y", "description"]


class SchemaMaker:
    """Makes a schema from a seed; those under $defs may refer to each other and to themselves where they may end."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.num_definitions = self.random.choice((0, 0, 1, 2))

    def make(self) -> dict[str, Any]:
        schema = self.schema(3)
        for index in range(self.num_definitions):
            schema.setdefault("$defs", {})[f"d{index}"] = self.schema(2)
        return schema

    def schema(self, depth: int) -> dict[str, Any]:
        kinds = [self.integer, self.number, self.string, self.constant, self.plain]
        if depth:
            kinds += [self.object, self.object, self.array, self.choice, self.types]
        schema = self.random.choice(kinds)(depth)
        if self.random.random() < 0.2:
            schema["description"] = "told to nobody"
        return schema

    def plain(self, depth: int) -> dict[str, Any]:
        return {"type": self.random.choice(["string", "integer", "number", "boolean", "null"])}

    def integer(self, depth: int) -> dict[str, Any]:
        draw = self.random
        low, span = draw.choice((0, -5, 1, -1000, 99, 10**12)), draw.choice((0, 1, 9, 1000))
        bounds = [{}, {"minimum": low}, {"maximum": low}, {"exclusiveMinimum": low - 0.5, "maximum": low + span}]
        bounds += [{"minimum": low, "exclusiveMaximum": low + span + 1}, {"multipleOf": draw.choice((1, 3, 10))}]
        bounds += [{"minimum": low, "maximum": low + 20, "multipleOf": 7}]
        return {"type": "integer"} | draw.choice(bounds)

    def number(self, depth: int) -> dict[str, Any]:
        low = self.random.choice((0, -1.5, 0.001, 100, 12345.678))
        bounds = [{}, {"minimum": low}, {"exclusiveMaximum": low}, {"exclusiveMinimum": low, "maximum": low + 0.25}]
        return {"type": "number"} | self.random.choice(bounds)

    def string(self, depth: int) -> dict[str, Any]:
        draw = self.random
        low = draw.randint(0, 3)
        limits = [{}, {"maxLength": draw.randint(0, 12)}, {"minLength": low, "maxLength": low + draw.randint(0, 9)}]
        limits += [{"minLength": low}, {"pattern": draw.choice(PATTERNS)}, {"format": draw.choice(FORMATS)}]
        return draw.choice([{"type": "string"}, {"type": "string"}, {}]) | draw.choice(limits)

    def constant(self, depth: int) -> dict[str, Any]:
        values = self.random.sample(CONSTANTS, self.random.randint(1, 4))
        return {"const": values[0]} if len(values) == 1 else {"enum": values}

    def object(self, depth: int) -> dict[str, Any]:
        draw = self.random
        if draw.random() < 0.15:
            names = draw.choice([{"propertyNames": {"enum": NAMES}}, {"propertyNames": {"maxLength": 3}}, {}])
            limits = draw.choice([{}, {"maxProperties": 2}, {"minProperties": 1}])
            return {"type": "object", "additionalProperties": self.schema(depth - 1)} | names | limits
        if draw.random() < 0.1:
            return {"patternProperties": {"^[a-c]{1,2}$": self.schema(depth - 1)}, "type": "object"}
        names = draw.sample(NAMES, draw.randint(0, 4))
        schema = {"type": "object", "properties": {name: self.schema(depth - 1) for name in names}}
        schema["required"] = [name for name in names if draw.random() < 0.6]
        if self.num_definitions and draw.random() < 0.4:
            schema["properties"]["next"] = {"$ref": f"#/$defs/d{draw.randrange(self.num_definitions)}"}
        more = [{}, {}, {"additionalProperties": False}, {"additionalProperties": self.schema(0)}]
        if not schema["required"]:
            more.append({"required": ["unlisted"]})
        if len(schema["properties"]) > 2:
            more += [{"minProperties": len(schema["required"])}, {"maxProperties": max(1, len(schema["required"]))}]
        return schema | draw.choice(more)

    def array(self, depth: int) -> dict[str, Any]:
        draw = self.random
        low = draw.randint(0, 2)
        limits = draw.choice([{}, {"maxItems": 3}, {"minItems": low, "maxItems": low + 2}, {"minItems": low}])
        items = {"items": self.schema(depth - 1)}
        first = {"prefixItems": [self.schema(depth - 1) for _ in range(draw.randint(1, 3))]}
        return {"type": "array"} | limits | draw.choice([items, items, first, first | items, {}])

    def choice(self, depth: int) -> dict[str, Any]:
        draw = self.random
        if draw.random() < 0.3:
            tagged = [
                {"type": "object", "properties": {"kind": {"const": tag}, "of": self.schema(depth - 1)}}
                for tag in ("one", "two")
            ]
            return {"oneOf": [schema | {"required": ["kind", "of"]} for schema in tagged]}
        if draw.random() < 0.3:
            return {"oneOf": [self.string(depth), self.integer(depth) | {"type": "integer"}, {"type": "null"}][1:]}
        return {"anyOf": [self.schema(depth - 1) for _ in range(draw.randint(1, 3))]}

    def types(self, depth: int) -> dict[str, Any]:
        return {"type": self.random.sample(["string", "integer", "null", "boolean", "array"], 2), "maxLength": 3}
