"""The tools of a request: functions with a name, and JSON schemas of their arguments.

What calls of them look like in an answer is for `parsing.py` to say. Nothing here knows of engines or HTTP.
"""

from typing import Any


def check_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Raises ValueError for a tool that is no function with a name."""
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"each must have a function with a name, got {tool!r:.200}")
    return tools


def call_schema(functions: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call of one of some functions, with the parameters that it describes."""
    calls = []
    for index, function in enumerate(functions):
        # What its schema refers to is where the schema is now.
        place = f"#/anyOf/{index}/properties/arguments"
        arguments = moved(function.get("parameters") or {"type": "object"}, place)
        properties = {"name": {"const": function["name"]}, "arguments": arguments}
        calls.append({"type": "object", "properties": properties, "required": list(properties)})
    return {"anyOf": calls}


def moved(schema: Any, place: str) -> Any:
    """A schema, or a part of it, as it is to be written at a place within another."""
    if isinstance(schema, list):
        return [moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: moved(part, place) for name, part in schema.items()}
    if isinstance(schema.get("$ref"), str) and schema["$ref"].startswith("#"):
        schema["$ref"] = place + schema["$ref"][1:]
    return schema
