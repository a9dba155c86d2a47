"""JSON schemas as xgrammar can honour them: what it would pass over in silence is refused by name.

A grammar may be narrower than its schema, never wider: whatever text it gives is valid. So an object that names its
properties gets no others, the properties come in the schema's order, and a pattern holds for the whole string.

xgrammar turns the schema into a grammar, but misspells some strings there (those with non-ASCII characters) and reads
patterns and lengths otherwise than they are meant. So it is given a placeholder for each string, and the grammar gets
a rule for it. Nothing here knows of tokens or of xgrammar's Python package.
"""

import json
import re
from typing import Any

from nanovllm.structured.expressions import regex_rule

Schema = dict[str, Any]
ANNOTATIONS = {
    *("$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples"),
    *("deprecated", "readOnly", "writeOnly"),
}
NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
KEYWORDS = {  # that count for each type
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": NUMBERS,
    "number": NUMBERS,
    "boolean": set(),
    "null": set(),
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
FORMS = ("$ref", "const", "enum", "anyOf", "allOf")  # a schema has one of them, or a type
MOST = 10_000  # of a repetition, which xgrammar would spend minutes on
DEEPEST = 64
EMPTY: Schema = {"type": "array", "maxItems": 0, "items": {}}


def honourable_schema(schema: Any) -> tuple[Schema, list[str]]:
    """The schema, in a form that xgrammar honours as a whole, and the rules of its strings.

    The string number i stands as `placeholder(i)` in the schema; its rule is the right side of one in a grammar.

    Raises:
        ValueError: a keyword, or a use of one, that cannot be honoured, with its place.
    """
    if not isinstance(schema, dict):
        raise ValueError(f"a JSON schema must be an object, got {schema!r}")
    reader = _Reader(schema)
    honoured = reader.read(schema, "#", 0)
    definitions = {
        name: reader.read(reader.target(reference, "#"), reference, 0) for reference, name in reader.names.items()
    }
    if not reader.can_end(schema, frozenset()):
        raise ValueError("the JSON schema refers to itself so that no text is ever complete")
    return honoured | ({"$defs": definitions} if definitions else {}), reader.rules


def placeholder(number: int) -> str:
    """What stands for a string of a schema, in ASCII."""
    return f"@@{number}@@"


class _Reader:
    """Reads the schemas within a root schema, which references go by."""

    def __init__(self, root: Schema) -> None:
        self.root = root
        self.rules: list[str] = []
        self.names: dict[str, str] = {}  # of definitions, by what refers to them
        for section in ("$defs", "definitions"):
            definitions = root.get(section, {})
            if not isinstance(definitions, dict):
                raise ValueError(f"#/{section} must be an object, got {definitions!r}")
            for key in definitions:
                self.names[f"#/{section}/{key}"] = f"d{len(self.names)}"

    def string(self, rule: str) -> str:
        """The placeholder of a new string."""
        self.rules.append(rule)
        return placeholder(len(self.rules) - 1)

    def literal(self, text: str) -> str:
        """The placeholder of this very string."""
        return self.string(regex_rule(re.escape(json.dumps(text, ensure_ascii=False))))

    def read(self, schema: Any, place: str, depth: int) -> Schema:
        """A schema in the form that is honoured."""
        if schema is True or schema == {}:
            return {}
        if not isinstance(schema, dict):
            raise ValueError(f"{place} must be a schema that something matches, got {schema!r}")
        if depth > DEEPEST:
            raise ValueError(f"{place[:80]}... is nested too deeply, more than {DEEPEST} schemas")
        forms = [form for form in FORMS if form in schema]
        if not forms:
            return self._read_type(schema, place, depth)
        form = forms[0]
        self._refuse_others(schema, {form, "type"} if form in ("const", "enum") else {form}, place)
        if form == "$ref":
            self.target(schema["$ref"], place)
            return {"$ref": "#" if schema["$ref"] == "#" else f"#/$defs/{self.names[schema['$ref']]}"}
        if form in ("const", "enum"):
            return self._read_values(schema, form, place)
        options = schema[form]
        if not isinstance(options, list) or not options or (form == "allOf" and len(options) > 1):
            limit = "one schema, as several cannot be met together" if form == "allOf" else "schemas"
            raise ValueError(f"{place}/{form} must be a list of {limit}, got {options!r:.200}")
        read = [self.read(option, f"{place}/{form}/{index}", depth + 1) for index, option in enumerate(options)]
        return read[0] if form == "allOf" else {"anyOf": read}

    def target(self, reference: Any, place: str) -> Any:
        """The schema that a reference names."""
        if reference == "#":
            return self.root
        if not isinstance(reference, str) or reference not in self.names:
            raise ValueError(f"{place}/$ref must be '#' or name one of $defs or definitions, got {reference!r}")
        _, section, key = reference.split("/", 2)
        return self.root[section][key]

    def can_end(self, schema: Any, visited: frozenset[str]) -> bool:
        """Whether some text of a finite length matches a schema that was read."""
        if not isinstance(schema, dict):
            return True
        if "$ref" in schema:
            reference = schema["$ref"]
            is_new = reference not in visited
            return is_new and self.can_end(self.target(reference, ""), visited | {reference})
        if "anyOf" in schema:
            return any(self.can_end(option, visited) for option in schema["anyOf"])
        inner = [*schema.get("allOf", []), *schema.get("prefixItems", [])]
        inner += [schema["items"]] if schema.get("minItems", 0) > 0 and "items" in schema else []
        inner += [schema.get("properties", {}).get(name) for name in schema.get("required", [])]
        return all(self.can_end(part, visited) for part in inner)

    def _refuse_others(self, schema: Schema, allowed: set[str], place: str) -> None:
        for keyword in schema:
            if keyword not in allowed | ANNOTATIONS:
                beside = ", ".join(sorted(allowed & schema.keys())) or "a schema without a type"
                raise ValueError(f"{place}/{keyword} is not supported beside {beside}")

    def _read_values(self, schema: Schema, form: str, place: str) -> Schema:
        values = schema["enum"] if form == "enum" else [schema["const"]]
        if not isinstance(values, list) or not values:
            raise ValueError(f"{place}/enum must be a list of values, got {values!r}")
        kinds = schema.get("type")
        if kinds is not None:
            kinds = [kinds] if isinstance(kinds, str) else kinds
            values = [value for value in values if any(_is_of_type(value, kind) for kind in kinds)]
            if not values:
                raise ValueError(f"{place} has no value of its type {schema['type']!r}")
        return {"anyOf": [self._read_value(value) for value in values]}

    def _read_value(self, value: Any) -> Schema:
        """The schema of one value."""
        if isinstance(value, str):
            return {"const": self.literal(value)}
        if isinstance(value, list):
            parts = [self._read_value(part) for part in value]
            return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)} if parts else EMPTY
        if isinstance(value, dict):
            properties = {self.literal(name): self._read_value(part) for name, part in value.items()}
            return {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        return {"const": value}

    def _read_type(self, schema: Schema, place: str, depth: int) -> Schema:
        kinds = schema.get("type")
        if kinds is None:
            self._refuse_others(schema, set(), place)
            return {}
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or not kinds or not all(kind in KEYWORDS for kind in kinds):
            raise ValueError(f"{place}/type must be one of {', '.join(KEYWORDS)} or a list of them, got {kinds!r}")
        self._refuse_others(schema, {"type"}.union(*(KEYWORDS[kind] for kind in kinds)), place)
        read = []
        for kind in kinds:
            own = {"type": kind} | {keyword: schema[keyword] for keyword in KEYWORDS[kind] if keyword in schema}
            read.append(getattr(self, f"_read_{kind}", lambda own, place, depth: own)(own, place, depth))
        return read[0] if len(read) == 1 else {"anyOf": read}

    def _read_string(self, schema: Schema, place: str, depth: int) -> Schema:
        least, most = self._bounds(schema, "minLength", "maxLength", place)
        pattern = schema.get("pattern")
        given = [name for name in ("pattern", "format") if name in schema] + ["length"] * (
            least > 0 or most is not None
        )
        if len(given) > 1:
            raise ValueError(f"{place} has {' and '.join(given)}; only one of them is supported at once")
        if pattern is None and "length" in given:
            pattern = f".{{{least},{'' if most is None else most}}}"
        if pattern is None:
            return schema
        if not isinstance(pattern, str):
            raise ValueError(f"{place}/pattern must be a regular expression, got {pattern!r}")
        return {"const": self.string(f'"\\"" ({regex_rule(pattern, in_json=True)}) "\\""')}

    def _read_array(self, schema: Schema, place: str, depth: int) -> Schema:
        least, most = self._bounds(schema, "minItems", "maxItems", place)
        read: Schema = {"type": "array"} | ({"minItems": least} if least else {})
        if most is not None:
            read["maxItems"] = most
        if "prefixItems" in schema:
            first = schema["prefixItems"]
            if not isinstance(first, list) or least > len(first) or (most is not None and most < len(first)):
                raise ValueError(f"{place}/prefixItems must be a list of all items, got {first!r:.200}")
            parts = [self.read(part, f"{place}/prefixItems/{i}", depth + 1) for i, part in enumerate(first)]
            return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
        if schema.get("items") is False:
            if least:
                raise ValueError(f"{place}/minItems must be 0 where items are false, got {least}")
            return EMPTY
        return read | {"items": self.read(schema.get("items", {}), f"{place}/items", depth + 1)}

    def _read_object(self, schema: Schema, place: str, depth: int) -> Schema:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict):
            raise ValueError(f"{place}/properties must be an object, got {properties!r}")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise ValueError(f"{place}/required must be a list of names, got {required!r}")
        properties = properties | {name: {} for name in required if name not in properties}
        others = schema.get("additionalProperties", True)
        if others is not False:
            others = self.read(others, f"{place}/additionalProperties", depth + 1)
        if not properties:
            return {"type": "object", "additionalProperties": others}
        read, required_read = {}, []
        for name, value in properties.items():
            if value is False and name not in required:
                continue
            key = self.literal(name)
            read[key] = self.read(value, f"{place}/properties/{name}", depth + 1)
            required_read += [key] * (name in required)
        # Beside named ones, another property could have such a name again, with any value.
        return {"type": "object", "properties": read, "required": required_read, "additionalProperties": False}

    def _bounds(self, schema: Schema, low: str, high: str, place: str) -> tuple[int, int | None]:
        least, most = schema.get(low, 0), schema.get(high)
        for name, value in ((low, least), (high, most)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST):
                raise ValueError(f"{place}/{name} must be an integer between 0 and {MOST}, got {value!r}")
        if most is not None and most < least:
            raise ValueError(f"{place}/{high} must be at least {low}={least}, got {most}")
        return least, most


def _is_of_type(value: Any, kind: str) -> bool:
    if kind in ("array", "object"):
        return isinstance(value, list if kind == "array" else dict)
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
