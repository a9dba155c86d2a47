"""A model's folder and the JSON files in it. Knows nothing of what they say."""

import json
import os
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]
LFS_START = b"version https://git-lfs"
OTHER_WEIGHTS = ["consolidated*", "*/*.safetensors"]  # the same weights once more, in Mistral's layout or for others


def resolve_model_path(
    model: str | os.PathLike[str],
    weights: bool = False,
    *,
    option: str = "model",
    revision: str | None = None,
    download_dir: str | os.PathLike[str] | None = None,
    hf_token: str | bool | None = None,
) -> str:
    """The local folder of `model`: itself, or the hub's snapshot (only its small files unless `weights`).

    A GGUF file of this machine is its own path, as `model` alone.

    The other arguments are for the hub: which version, where to keep it, by whose leave. `option` is what errors call
    the model.

    Raises:
        TypeError, ValueError: neither a folder, which may begin with `~`, nor the name of a model that the hub gives.
    """
    name = os.fspath(model) if isinstance(model, os.PathLike) else model
    if not isinstance(name, str) or not name:
        raise TypeError(f"{option} must be a folder or a hub name, got {model!r}")
    version = "revision" if option == "model" else f"{option}_revision"
    if not isinstance(revision, str | None):
        raise TypeError(f"{version} must be a string, got {revision!r}")
    if not isinstance(download_dir, str | os.PathLike | None):
        raise TypeError(f"download_dir must be a folder, got {download_dir!r}")
    if not isinstance(hf_token, str | bool | None):  # no part of a token is to be shown
        raise TypeError(f"hf_token must be a string or a bool, got a {type(hf_token).__name__}")
    is_file = option == "model" and name.endswith(".gguf")
    for path in (name, os.path.expanduser(name)):
        if os.path.isdir(path) or (is_file and os.path.isfile(path)):
            return os.path.abspath(path)
    if is_file:
        raise ValueError(f"model={name!r} is no file; GGUF files of the hub must be downloaded before")
    from huggingface_hub import snapshot_download

    wanted = {"allow_patterns": SMALL_FILES + ["*.safetensors"] * weights, "ignore_patterns": OTHER_WEIGHTS}
    try:
        return snapshot_download(name, revision=revision, cache_dir=download_dir, token=hf_token, **wanted)
    except Exception as error:
        what = f"{option}={name!r}" + (f" of {version}={revision!r}" if revision is not None else "")
        raise ValueError(f"{what} is neither a folder nor a model the hub gives: {error}") from error


def find_tokenizer(tokenizer: str | os.PathLike[str], **hub: Any) -> str:
    """The local folder of the tokenizer that the option `tokenizer` names; raises what `resolve_model_path` raises."""
    return _find("tokenizer", tokenizer, TOKENIZER_FILES, hub)


def has_tokenizer(folder: str) -> bool:
    """Whether a folder has one of the files by which a tokenizer is known."""
    return any(os.path.isfile(os.path.join(folder, file)) for file in TOKENIZER_FILES)


def find_generation_config(generation_config: str | os.PathLike[str], **hub: Any) -> str:
    """The same of the option `generation_config`."""
    return _find("generation_config", generation_config, ("generation_config.json",), hub)


def _find(option: str, name: str | os.PathLike[str], files: tuple[str, ...], hub: dict[str, Any]) -> str:
    """The folder that an option names, which has one of some files."""
    folder = resolve_model_path(name, option=option, **hub)
    if not any(os.path.isfile(os.path.join(folder, file)) for file in files):
        raise ValueError(f"{option}={name!r} has no {' or '.join(files)}")
    return folder


def why_damaged(path: str) -> str:
    """What an error about a file that cannot be read has to add: a clone without Git LFS has a few lines in its place.

    Empty where the file is none such.
    """
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        is_pointer = file.read(len(LFS_START)) == LFS_START
    return " (it is a pointer of Git LFS, `git lfs pull` brings the file itself)" if is_pointer else ""


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
