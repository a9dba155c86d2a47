"""Which GGUF files a model's path stands for, and the package that they need. Knows nothing of what they hold."""

import importlib
import os
import re
from types import ModuleType

SUFFIX = ".gguf"
PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def gguf_package() -> ModuleType:
    """The package gguf, which is not imported before a file needs it.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ValueError('GGUF files need the package gguf: pip install "nano-vllm[gguf]"') from error


def is_gguf(path: str) -> bool:
    """Whether a model's path is a GGUF file rather than a folder."""
    return path.endswith(SUFFIX) and not os.path.isdir(path)


def find_gguf(model: str, load_format: str) -> str | None:
    """The GGUF file of a model's path, the first part of a split one; None: it is a folder with other weights.

    A folder's file counts if there are no safetensors, or load_format="gguf" says so.

    Raises:
        ValueError: load_format contradicts what is there; a folder has several files; or the package gguf is missing.
    """
    if is_gguf(model):
        if load_format == "safetensors":
            raise ValueError(f"load_format='safetensors' does not read model={model!r}")
        gguf_package()
        return model
    files = sorted(os.listdir(model)) if load_format in ("auto", "gguf") else []
    found = [file for file in files if file.endswith(SUFFIX) and not file.startswith(".")]
    if load_format == "auto" and any(file.endswith(".safetensors") for file in files):
        return None
    found = [file for file in found if (part := PART_NAME.fullmatch(file)) is None or int(part[2]) == 1]
    if len(found) > 1:
        raise ValueError(f"model={model!r} has several GGUF files, name one of {', '.join(found)}")
    if not found and load_format == "gguf":
        raise ValueError(f"load_format='gguf', but model={model!r} has no GGUF file")
    if not found:
        return None
    gguf_package()
    return os.path.join(model, found[0])


def parts_of(path: str) -> list[str]:
    """The files of one that is split, named by any part; of another one, itself.

    Raises:
        ValueError: a part is missing.
    """
    part = PART_NAME.fullmatch(path)
    if part is None:
        return [path]
    paths = [f"{part[1]}-{number:05}-of-{part[3]}{SUFFIX}" for number in range(1, int(part[3]) + 1)]
    if missing := [file for file in paths if not os.path.isfile(file)]:
        raise ValueError(f"{path} is one of {len(paths)} parts, of which {missing[0]} is missing")
    return paths
