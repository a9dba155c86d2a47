"""JSON schemas as xgrammar is to read them: only keywords that it honours, where it honours them.

xgrammar drops in silence what it does not know, and keywords that it knows beside others. Here a schema is read
keyword by keyword into one that means the same or less, so that what follows it follows the schema, or is refused by
name. Strings with a pattern, a format or a length become holes for rules of our own. Nothing here knows of tokens, of
requests or of xgrammar's Python package.
"""

import json
import math
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from nanovllm.structured.formats import FORMATS
from nanovllm.structured.regex import regex_rules

Schema = dict[str, Any] | bool
# A hole is a constant string, this and a number, in the schema; in the grammar it is replaced by a rule.
HOLE = "nano-vllm hole "
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
APPLICATORS = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
# What only matters to values of a type.
KEYWORDS = {
    "object": (
        "properties",
        "required",
        "additionalProperties",
        "unevaluatedProperties",
        "patternProperties",
        "propertyNames",
        "minProperties",
        "maxProperties",
    ),
    "array": ("items", "prefixItems", "unevaluatedItems", "minItems", "maxItems", "uniqueItems", "contains"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
UNSUPPORTED = ("not", "if", "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef")
DEEPEST = 100  # xgrammar takes seconds over deeper ones
LARGEST_INTEGER = 2**63 - 1  # of xgrammar
LARGEST_MULTIPLE = 1024  # that xgrammar honours
LARGEST_MULTIPLE_RANGE = 10_000
LARGEST_EXCLUSIVE = 2.0**32  # numbers with a bound have up to 6 decimals, which floats beyond do not tell apart


class SchemaReader:
    """Reads one schema.

    Attributes:
        root: the schema as given.
        rules: those of the holes; a hole's first is called by `hole_rule_name`.
    """

    def __init__(self, root: Schema) -> None:
        self.root = root
        self.rules: list[str] = []
        self._holes: dict[str, dict[str, str]] = {}
        self._definitions: dict[tuple[str, tuple[str, ...]], str] = {}
        self._read_definitions: dict[str, Schema] = {}
        self._depth = 0

    def read(self) -> str:
        """The schema for xgrammar, as text.

        Raises:
            ValueError: names what cannot be honoured.
        """
        schema = self._read(self.root, TYPES)
        if not isinstance(schema, dict):
            raise ValueError("the schema false allows nothing")
        return json.dumps(schema | {"$defs": self._read_definitions}, allow_nan=False)

    def _read(self, schema: Any, types: Sequence[str]) -> Schema:
        """A schema at any place, for values of some types."""
        if schema is False:
            return False
        schema = {} if schema is True else schema
        if not isinstance(schema, dict):
            raise ValueError(f"a schema must be an object, true or false, got {schema!r}")
        for name in UNSUPPORTED:
            if name in schema:
                raise ValueError(f"{name!r} is not supported")
        if self._depth == DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        self._depth += 1
        try:
            applicators = [name for name in APPLICATORS if name in schema]
            if applicators:
                return self._read_applicator(applicators, schema, _meet(_named_types(schema), types))
            return self._read_types(schema, types)
        finally:
            self._depth -= 1

    def _read_applicator(self, applicators: list[str], schema: dict[str, Any], types: Sequence[str]) -> Schema:
        """A schema whose values come from elsewhere; xgrammar would ignore what else it says."""
        name, value = applicators[0], schema[applicators[0]]
        others = [other for group in KEYWORDS.values() for other in group if other in schema]
        if applicators[1:] or others:
            raise ValueError(f"{name!r} beside {[*applicators[1:], *others][0]!r} is not supported")
        if name == "$ref":
            return {"$ref": self._define(value, types)}
        if name in ("const", "enum"):
            return {"enum": _values([value] if name == "const" else value, types)}
        if not isinstance(value, list) or not value:
            raise ValueError(f"{name!r} must be a list of schemas, got {value!r}")
        if name == "allOf":
            if len(value) > 1:
                raise ValueError("'allOf' of more than one schema is not supported")
            return self._read(value[0], types)
        if name == "oneOf":
            self._check_disjoint(value)
        choices = [choice for choice in (self._read(part, types) for part in value) if choice is not False]
        return {"anyOf": choices} if choices else False

    def _read_types(self, schema: dict[str, Any], types: Sequence[str]) -> Schema:
        """A schema that speaks of values by their type; of several types, each for itself."""
        own_types = _named_types(schema)
        if "type" not in schema:
            # A value of the first type that is spoken of follows whatever is said of other types.
            spoken_of = [name for name, keywords in KEYWORDS.items() if any(word in schema for word in keywords)]
            own_types = next((kind for name in spoken_of if (kind := _meet([name], types))), types)
        types = _meet(own_types, types)
        if list(types) == list(TYPES):
            return {}
        readers = {
            "object": self._read_object,
            "array": self._read_array,
            "string": self._read_string,
            "number": _read_number,
            "integer": _read_integer,
        }
        choices = [readers[name](schema) if name in readers else {"type": name} for name in types]
        choices = [choice for choice in choices if choice is not False]
        if not choices:
            return False
        return choices[0] if len(choices) == 1 else {"anyOf": choices}

    def _read_object(self, schema: dict[str, Any]) -> Schema:
        """An object. As vLLM's, it has no further properties if it names some and does not speak of others."""
        properties = _member(schema, "properties", dict, {})
        patterns = _member(schema, "patternProperties", dict, {})
        required = _member(schema, "required", list, [])
        is_closed = any(word in schema for word in ("properties", "patternProperties", "propertyNames"))
        others = schema.get("additionalProperties", schema.get("unevaluatedProperties"))
        if others is None:
            others = not is_closed or any(name not in properties for name in required)
            closes = is_closed
        else:
            closes = False
        if len(patterns) + ("propertyNames" in schema) > 1 or (properties and (patterns or "propertyNames" in schema)):
            raise ValueError("'patternProperties' and 'propertyNames' are supported alone and with one pattern only")
        if patterns:
            [(pattern, others)] = patterns.items()
            names = {"type": "string", "pattern": pattern}
        else:
            names = schema.get("propertyNames", True)
        missing = [name for name in required if name not in properties]
        if missing and (names is not True or others is False):
            raise ValueError(f"'required' names {missing[0]!r}, which is not in 'properties'")
        properties = {name: self._read(part, TYPES) for name, part in properties.items()}
        properties |= {name: self._read(others, TYPES) for name in missing}
        impossible = [name for name, part in properties.items() if part is False]
        if any(name in required for name in impossible):
            return False
        others = False if closes else self._read(others, TYPES)
        if impossible and others is not False:
            raise ValueError(f"'properties' forbids {impossible[0]!r}, which is not supported beside other properties")
        result = {"type": "object", "additionalProperties": others}
        if properties:
            result["properties"] = {name: part for name, part in properties.items() if part is not False}
            result["required"] = required
        if names is not True and others is not False:
            result["propertyNames"] = self._read(names, ["string"])
        return result | self._counts(schema, "Properties", is_repeatable=others is not False)
