"""The model and the options of `LLM(...)` on the command line: --max-model-len for max_model_len."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import nanovllm.demo
from nanovllm.config import Config
from nanovllm.options.checks import field_kinds

ATTRIBUTE = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)  # of Config's docstring
DEMO = "demo"
MODEL_HELP = "folder, GGUF file or hub name; demo: the bundled one"


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds all options but the model. One that is not given is no attribute of what is parsed."""
    group = parser.add_argument_group("engine options", "as LLM(...) takes them")
    texts = dict(ATTRIBUTE.findall(inspect.getdoc(Config)))
    for name, kinds in field_kinds(Config).items():
        if name != "model":
            text = " ".join(texts[name].split()).partition(" Resolved:")[0].replace("%", "%%")
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, help=text, default=argparse.SUPPRESS, **_kind(kinds))


def add_name_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names the model for requests."""
    parser.add_argument("--served-model-name", help="what requests call the model (default: it, without folders)")


def read_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of LLM that were given; the model `demo` is the bundled one."""
    options = {name: value for name, value in vars(args).items() if name in field_kinds(Config)}
    if args.model == DEMO and not os.path.exists(DEMO):
        options["model"] = str(Path(nanovllm.demo.__file__).parent)
    return options


def served_name(args: argparse.Namespace) -> str:
    """What requests call the model: of a folder or file the last part, as clients need not know where it is."""
    if args.served_model_name:
        return args.served_model_name
    return os.path.basename(os.path.abspath(args.model)) if os.path.exists(args.model) else args.model


def json_object(text: str) -> dict[str, Any]:
    """What reads an option that is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it is no JSON: {error}; got {text!r}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"it must be a JSON object, got {text!r}")
    return value


def _kind(kinds: tuple[Any, ...]) -> dict[str, Any]:
    """How argparse reads an option of a type, which has these alternatives."""
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if bool in kinds and str not in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if int in kinds or float in kinds:
        return {"type": _number(int if int in kinds else float, words)}
    if words:
        return {"choices": words}
    if any(get_origin(kind) is dict for kind in kinds):
        return {"type": json_object, "metavar": "JSON"}
    return {}


def _number(kind: type, words: list[str]) -> Callable[[str], Any]:
    """What reads a number, or one of some words."""

    def number(text: str) -> Any:
        return text if text in words else kind(text)

    number.__name__ = kind.__name__  # which argparse names in its errors
    return number
