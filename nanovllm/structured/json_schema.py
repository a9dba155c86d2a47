"""JSON schemas as xgrammar is to read them: only keywords that it honours, where it honours them.

xgrammar drops in silence what it does not know, and what stands beside some keywords. Here a schema is read keyword by
keyword into one that allows the same or less, so that whatever follows it follows the schema, or is refused by name.
Strings with a pattern, a format or a length become holes, which rules of our own fill. Nothing here knows of tokens,
of requests or of xgrammar's Python package.
"""

import json
import math
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from nanovllm.expressions.formats import FORMATS
from nanovllm.expressions.regex import LOOK_AHEAD, regex_rules

Schema = dict[str, Any] | bool
TYPES = ("object", "array", "string", "number", "boolean", "null")
APPLICATORS = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
# What says something about values of one type only.
OBJECT = "properties required additionalProperties unevaluatedProperties patternProperties propertyNames"
KEYWORDS = {
    "object": (*OBJECT.split(), "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "unevaluatedItems", "minItems", "maxItems", "uniqueItems", "contains"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
UNSUPPORTED = ("not", "if", "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef")
DEEPEST = 100  # xgrammar takes seconds over deeper ones
LARGEST_INTEGER = 2**63 - 1
LARGEST_MULTIPLE, LARGEST_RANGE_OF_MULTIPLES = 1024, 10_000  # that xgrammar honours
LARGEST_EXCLUSIVE = 2.0**32  # it takes up to 6 decimals, which floats beyond do not tell apart
HOLE = "nano-vllm hole {}"  # the constant string that stands for a hole's rule


class SchemaReader:
    """Reads one schema.

    Attributes:
        holes: the rules of each hole; those of the first are called hole_0, hole_0_0 and so on.
    """

    def __init__(self, schema: Any) -> None:
        self.schema = schema
        self.holes: list[str] = []
        self._hole_numbers: dict[tuple[Any, ...], int] = {}
        self._definitions: dict[tuple[str, tuple[str, ...]], str] = {}  # the names of what $ref points to
        self._path: list[str] = []  # to what is being read

    def read(self) -> str:
        """The schema for xgrammar, as text.

        Raises:
            ValueError: names what cannot be honoured, and where it is.
        """
        definitions: dict[str, Schema] = {}
        try:
            schema = self._read(self.schema, TYPES, "#")
            while len(definitions) < len(self._definitions):
                uri, types = list(self._definitions)[len(definitions)]
                definitions[self._definitions[uri, types]] = self._read(self._find(uri), types, uri)
            if schema is False:
                raise ValueError("it allows nothing")
            return json.dumps(schema | ({"$defs": definitions} if definitions else {}), allow_nan=False)
        except ValueError as error:
            raise ValueError(f"{error} (at {'/'.join(self._path) or '#'})") from error

    def _read(self, schema: Any, types: Sequence[str], place: str) -> Schema:
        """A schema at any place, for values of some types; False allows nothing."""
        self._path.append(place)  # stays there if anything is raised
        if schema is True:
            schema = {}
        if schema is not False and not isinstance(schema, dict):
            raise ValueError(f"a schema must be an object, true or false, got {schema!r}")
        if len(self._path) > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        result: Schema = False
        if schema is not False:
            for name in UNSUPPORTED:
                if name in schema:
                    raise ValueError(f"{name!r} is not supported")
            is_applied = any(name in schema for name in APPLICATORS)
            result = self._read_applicator(schema, types) if is_applied else self._read_types(schema, types)
        self._path.pop()
        return result

    def _read_applicator(self, schema: dict[str, Any], types: Sequence[str]) -> Schema:
        """A schema that says where else its values are described; xgrammar would ignore what else it says."""
        found = [name for name in APPLICATORS if name in schema]
        found += [name for names in KEYWORDS.values() for name in names if name in schema]
        if len(found) > 1:
            raise ValueError(f"{found[0]!r} beside {found[1]!r} is not supported")
        name, value, types = found[0], schema[found[0]], _meet(_named_types(schema), types)
        if name == "$ref":
            if not isinstance(value, str):
                raise ValueError(f"'$ref' must be a string, got {value!r}")
            names = self._definitions
            return {"$ref": f"#/$defs/{names.setdefault((value, tuple(types)), f'd{len(names)}')}"}
        if not isinstance(value, list) and name != "const":
            raise ValueError(f"{name!r} must be a list, got {value!r}")
        if name in ("const", "enum"):
            values = [item for item in ([value] if name == "const" else value) if _is_of(item, types)]
            return {"enum": values} if values else False
        if name == "allOf" and len(value) != 1:
            raise ValueError("'allOf' of more than one schema is not supported")
        if name == "oneOf":
            self._check_disjoint(value)
        return _any_of([self._read(part, types, f"{name}/{index}") for index, part in enumerate(value)])

    def _read_types(self, schema: dict[str, Any], types: Sequence[str]) -> Schema:
        """A schema that describes its values itself, type by type."""
        own_types = _named_types(schema)
        if "type" not in schema:
            # A value of one type that is spoken of follows whatever is said of the others.
            spoken_of = [kind for kind in TYPES if any(name in schema for name in KEYWORDS.get(kind, ()))]
            own_types = next(([kind] for kind in spoken_of if _meet([kind], types)), types)
        types = _meet(own_types, types)
        if set(types) == set(TYPES):
            return {}
        readers = {
            "object": self._read_object,
            "array": self._read_array,
            "string": self._read_string,
            "number": _read_number,
            "integer": _read_integer,
        }
        return _any_of([readers[kind](schema) if kind in readers else {"type": kind} for kind in types])

    def _read_object(self, schema: dict[str, Any]) -> Schema:
        """An object; as vLLM's, one that names some properties has no others unless it speaks of them."""
        properties, patterns = (_get(schema, name, dict, {}) for name in ("properties", "patternProperties"))
        required = _get(schema, "required", list, [])
        names, others = schema.get("propertyNames", True), schema.get("additionalProperties")
        others = schema.get("unevaluatedProperties") if others is None else others
        if len(patterns) > 1 or (properties and patterns) or (names is not True and (properties or patterns)):
            raise ValueError("'patternProperties' is supported with one pattern, it and 'propertyNames' alone only")
        if patterns:
            [(pattern, others)] = patterns.items()
            names = {"pattern": pattern}
        missing = [name for name in required if name not in properties]
        if missing and (names is not True or others is False):
            raise ValueError(f"'required' has {missing[0]!r}, which 'properties' has not")
        properties |= {name: True if others is None else others for name in missing}
        if others is None:
            others = "properties" not in schema
        read = {name: self._read(part, TYPES, f"properties/{name}") for name, part in properties.items()}
        others = self._read(others, TYPES, "additionalProperties")
        forbidden = [name for name, part in read.items() if part is False]
        if forbidden and (others is not False or any(name in required for name in forbidden)):
            raise ValueError(f"'properties' forbids {forbidden[0]!r}, which is required or may be added freely")
        least, most = _counts(schema, "minProperties", "maxProperties")
        if others is not False and least > len(required) + 1:
            raise ValueError(f"'minProperties' of {least} is not supported: free names may be the same")
        result = {"type": "object", "additionalProperties": others, "minProperties": least}
        if read:
            result["properties"] = {name: part for name, part in read.items() if part is not False}
            result["required"] = required
        elif names is not True and others is not False:
            result["propertyNames"] = self._read(names, ["string"], "propertyNames")
        return result | ({} if most is None else {"maxProperties": most})

    def _read_array(self, schema: dict[str, Any]) -> Schema:
        """An array; as vLLM's, one that describes its first items has no others unless it speaks of them."""
        least, most = _counts(schema, "minItems", "maxItems")
        if "contains" in schema or (schema.get("uniqueItems") and (most is None or most > 1)):
            raise ValueError(f"{'contains' if 'contains' in schema else 'uniqueItems'!r} is not supported")
        first, items = _get(schema, "prefixItems", list, []), schema.get("items", schema.get("unevaluatedItems"))
        if isinstance(items, list):  # as in drafts up to 2019
            first, items = items, schema.get("additionalItems")
        if items is None:
            items = not first or least > len(first)
        read = [self._read(part, TYPES, f"prefixItems/{index}") for index, part in enumerate(first[:most])]
        items = self._read(items, TYPES, "items")
        if False in read:
            most = read.index(False)
        if most is not None and most <= len(read):
            read, items = read[:most], False
        if items is False and least > len(read):
            return False
        result = {"type": "array", "items": items, "minItems": least} | ({"prefixItems": read} if read else {})
        return result | ({} if most is None else {"maxItems": most})

    def _read_string(self, schema: dict[str, Any]) -> Schema:
        """A string. One with a length has no escapes, so that characters are counted as they are."""
        least, most = _counts(schema, "minLength", "maxLength")
        found = [name for name in ("pattern", "format") if name in schema]
        found += ["minLength" if least else "maxLength"] if least or most is not None else []
        if len(found) > 1:
            raise ValueError(f"{found[0]!r} beside {found[1]!r} is not supported")
        if not found:
            return {"type": "string"}
        name, value = found[0], schema.get(found[0])
        if name in ("pattern", "format") and not isinstance(value, str):
            raise ValueError(f"{name!r} must be a string, got {value!r}")
        if name == "format" and value not in FORMATS:
            raise ValueError(f"'format' of {value!r} is not supported; there are {', '.join(FORMATS)}")
        key = (name, value) if name in ("pattern", "format") else (least, most)
        if key not in self._hole_numbers:
            rule = f"hole_{len(self.holes)}"
            if name in ("pattern", "format"):
                rules = regex_rules(FORMATS[value] if name == "format" else value, rule, in_json=True)
            else:
                count = f"{{{least},{'' if most is None else most}}}"
                rules = rf'{rule} ::= "\"" [^"\\\x00-\x1f\ud800-\udfff]{count} "\""{LOOK_AHEAD}'
            self._hole_numbers[key] = len(self.holes)
            self.holes.append(rules)
        return {"const": HOLE.format(self._hole_numbers[key])}

    def _find(self, uri: str) -> Any:
        """What a reference within the schema points to."""
        if uri != "#" and not uri.startswith("#/"):
            raise ValueError(f"'$ref' to {uri!r} is not supported: it must begin with '#/'")
        target = self.schema
        for part in uri.split("/")[1:]:
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(part) if isinstance(target, list) else part]
            except (KeyError, IndexError, TypeError, ValueError):
                raise ValueError(f"'$ref' to {uri!r} points to nothing") from None
        return target

    def _check_disjoint(self, schemas: Sequence[Any]) -> None:
        """Raises unless no value can follow two schemas of a `oneOf`, as then it is an `anyOf`."""
        for index, schema in enumerate(schemas):
            for other in schemas[:index]:
                if not self._are_disjoint(schema, other):
                    reason = "types, constants, or a required property with constants must tell its schemas apart"
                    raise ValueError(f"'oneOf' is not supported where two may hold: {reason}")

    def _are_disjoint(self, one: Any, other: Any) -> bool:
        one, other = self._without_references(one), self._without_references(other)
        values, other_values = _constants(one), _constants(other)
        if values is not None and other_values is not None:
            return not any(_are_equal(value, other_value) for value in values for other_value in other_values)
        types, other_types = _types_of(one), _types_of(other)
        if not _meet(types, other_types):
            return True
        properties, other_properties = (_get(schema, "properties", dict, {}) for schema in (one, other))
        required, other_required = (_get(schema, "required", list, []) for schema in (one, other))
        shared = [name for name in required if name in other_required]
        return {*types, *other_types} == {"object"} and any(
            _constants(properties[name]) is not None
            and _constants(other_properties[name]) is not None
            and self._are_disjoint(properties[name], other_properties[name])
            for name in shared
            if name in properties and name in other_properties
        )

    def _without_references(self, schema: Any) -> dict[str, Any]:
        """A schema, or what it refers to; {} for one that is no object or refers to itself."""
        for _ in range(DEEPEST):
            if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
                return schema if isinstance(schema, dict) else {}
            schema = self._find(schema["$ref"])
        return {}


def _get(schema: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = schema.get(name, default)
    if not isinstance(value, kind) or (name == "required" and not all(isinstance(item, str) for item in value)):
        raise ValueError(f"{name!r} must be {'an object' if kind is dict else 'a list'}, got {value!r}")
    return type(value)(value)


def _counts(schema: dict[str, Any], least_name: str, most_name: str) -> tuple[int, int | None]:
    """Two counts of a schema, 0 and None without them."""
    least, most = schema.get(least_name, 0), schema.get(most_name)
    for name, value in ((least_name, least), (most_name, 0 if most is None else most)):
        if not _is_number(value) or value != int(value) or not 0 <= value < 2**31:
            raise ValueError(f"{name!r} must be an integer between 0 and {2**31 - 1}, got {value!r}")
    if most is not None and least > most:
        raise ValueError(f"{least_name!r} of {least} is greater than {most_name!r} of {most}")
    return int(least), None if most is None else int(most)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _named_types(schema: dict[str, Any]) -> Sequence[str]:
    """The types that a schema allows by `type`."""
    types = schema.get("type", TYPES)
    types = [types] if isinstance(types, str) else types
    if not isinstance(types, (list, tuple)) or not types or not all(kind in (*TYPES, "integer") for kind in types):
        raise ValueError(f"'type' must be one or some of {', '.join(TYPES)} and integer, got {schema['type']!r}")
    return types


def _meet(types: Sequence[str], other_types: Sequence[str]) -> list[str]:
    """The types that are among both; an integer is a number."""
    met = [kind for kind in types if kind in other_types and kind != "integer"]
    if "number" not in met and all({"integer", "number"} & {*group} for group in (types, other_types)):
        met.append("integer")
    return met


def _type_of(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "integer" if _is_number(value) and value == int(value) else "number"
    return {bool: "boolean", str: "string", list: "array", dict: "object"}.get(type(value), "null")


def _is_of(value: Any, types: Sequence[str]) -> bool:
    """Whether a constant is of some types; raises ValueError for one that xgrammar would not spell as it is."""
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _is_of(part, TYPES)
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError(f"the constant {value} is not supported: its digits are beyond {LARGEST_INTEGER}")
    kind = _type_of(value)
    return kind in types or (kind == "integer" and "number" in types)


def _constants(schema: Any) -> list[Any] | None:
    """The only values that a schema allows, None if it does not list them."""
    if not isinstance(schema, dict):
        return None
    return [schema["const"]] if "const" in schema else _get(schema, "enum", list, []) or None


def _types_of(schema: dict[str, Any]) -> Sequence[str]:
    """The types of a schema's values as far as it is seen at once."""
    values = _constants(schema)
    return _named_types(schema) if values is None else [_type_of(value) for value in values]


def _are_equal(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _any_of(schemas: Sequence[Schema]) -> Schema:
    choices = [schema for schema in schemas if schema is not False]
    if len(choices) < 2:
        return choices[0] if choices else False
    return {"anyOf": choices}


def _bounds(schema: dict[str, Any]) -> dict[str, float]:
    bounds = {name: schema[name] for name in KEYWORDS["number"] if name in schema}
    for name, value in bounds.items():
        if not _is_number(value):
            raise ValueError(f"{name!r} must be a number, got {value!r}")
    return bounds


def _read_number(schema: dict[str, Any]) -> Schema:
    bounds = _bounds(schema)
    if "multipleOf" in bounds:
        raise ValueError("'multipleOf' is supported for integers only")
    for name, value in bounds.items():
        if name.startswith("exclusive") and abs(value) > LARGEST_EXCLUSIVE:
            raise ValueError(f"{name!r} of {value} is not supported: for numbers it is up to {LARGEST_EXCLUSIVE:.0f}")
    return {"type": "number"} | bounds


def _read_integer(schema: dict[str, Any]) -> Schema:
    bounds = _bounds(schema)
    lows = [math.ceil(bounds["minimum"])] if "minimum" in bounds else []
    lows += [math.floor(bounds["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in bounds else []
    highs = [math.floor(bounds["maximum"])] if "maximum" in bounds else []
    highs += [math.ceil(bounds["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in bounds else []
    result: dict[str, Any] = {"type": "integer"}
    if lows:
        result["minimum"] = max(*lows, -LARGEST_INTEGER)
    if highs:
        result["maximum"] = min(*highs, LARGEST_INTEGER)
    if lows and highs and result["minimum"] > result["maximum"]:
        return False
    multiple = bounds.get("multipleOf", 1)
    if multiple == 1:
        return result
    is_open = not lows and not highs
    is_small = lows and highs and result["maximum"] - result["minimum"] <= LARGEST_RANGE_OF_MULTIPLES
    if multiple != int(multiple) or not 1 < multiple <= LARGEST_MULTIPLE or not (is_open or is_small):
        limits = f"it must be an integer up to {LARGEST_MULTIPLE}, with no bounds or a range up to "
        raise ValueError(f"'multipleOf' of {multiple} is not supported: {limits}{LARGEST_RANGE_OF_MULTIPLES}")
    return result | {"multipleOf": int(multiple)}
