"""A model's folder and the JSON files in it. Knows nothing of what they say."""

import json
import os
from typing import Any


def resolve_model_path(model: str | os.PathLike[str], weights: bool) -> str:
    """The local folder of `model`: itself, or the hub's snapshot (only its small files unless `weights`).

    Raises:
        TypeError, ValueError: neither a folder, which may begin with `~`, nor the name of a model that the hub gives.
    """
    name = os.fspath(model) if isinstance(model, os.PathLike) else model
    if not isinstance(name, str) or not name:
        raise TypeError(f"model must be a folder or a hub name, got {model!r}")
    for folder in (name, os.path.expanduser(name)):
        if os.path.isdir(folder):
            return os.path.abspath(folder)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.jinja", "*.model"] + ["*.safetensors"] * weights
    try:
        return snapshot_download(name, allow_patterns=patterns)
    except Exception as error:
        raise ValueError(f"model={name!r} is neither a folder nor a model the hub gives: {error}") from error


def read_object(path: str) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no such file.

    Raises:
        ValueError: naming the file, which holds no JSON or another value than an object.
    """
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (ValueError, RecursionError) as error:  # what json raises for damaged text, bytes and nesting
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def read_json(path: str) -> dict[str, Any]:
    """What `read_object` gives without its nulls, for files where a null is as good as no key."""
    return {name: value for name, value in read_object(path).items() if value is not None}
