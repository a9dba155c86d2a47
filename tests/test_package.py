"""What is shipped: the sdist holds all that the tests need, the wheel all that runs, the metadata what both need."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import inspect
import pydoc
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest

import nanovllm
from nanovllm import LLM
from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = (".ci", "docs", "examples", "nanovllm", "tests", "tools")
FILES = (
    ".gitignore",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "README.zh-CN.md",
    "bench.py",
    "example.py",
    "pyproject.toml",
)


def find_sources() -> set[str]:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return {*FILES, *(str(path.relative_to(ROOT)) for path in paths if path.is_file() and path.suffix != ".pyc")}


SOURCES = find_sources()


class Built(NamedTuple):
    """The names of the files in the sdist and in the wheel that is built from it, and the wheel's metadata."""

    sdist: set[str]
    wheel: set[str]
    metadata: Message


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Built from a copy of the sources by the setuptools of this environment, which needs no network."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools before 77 cannot build the package")
    folder = tmp_path_factory.mktemp("package")

    def build(kind: str, source: Path) -> Path:
        program = f"import setuptools.build_meta as backend; backend.build_{kind}({str(folder)!r})"
        process = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, encoding="utf-8")
        assert process.returncode == 0, process.stderr
        (archive,) = folder.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind])
        return archive

    for name in SOURCES:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    with tarfile.open(build("sdist", folder / "source")) as archive:
        archive.extractall(folder, filter="data")
        top = folder / f"nano_vllm-{PROJECT['version']}"
        sdist = {name.removeprefix(f"{top.name}/") for name in archive.getnames()}
    with zipfile.ZipFile(build("wheel", top)) as archive:
        wheel = set(archive.namelist())
        (metadata,) = (name for name in wheel if name.endswith(".dist-info/METADATA"))
        return Built(sdist, wheel, Parser().parsestr(archive.read(metadata).decode()))


def test_the_sdist_holds_every_file(built):
    missing = SOURCES - built.sdist
    assert not missing


def test_the_wheel_holds_the_package_and_nothing_else(built):
    package = {name for name in SOURCES if name.startswith("nanovllm/")}
    assert {"nanovllm/py.typed", "nanovllm/demo/model.safetensors", "nanovllm/demo/questions.jsonl"} <= package
    assert package == {name for name in built.wheel if ".dist-info/" not in name}


def test_metadata(built):
    assert built.metadata["License-Expression"] == "MIT"
    assert built.metadata.get_all("License-File") == ["LICENSE"]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in built.wheel)
    assert built.metadata["Version"] == PROJECT["version"]


def test_version():
    assert nanovllm.__version__ == PROJECT["version"], "the version that was installed; to be installed anew?"


def test_sources_that_are_not_installed_can_be_imported(monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert runpy.run_path(nanovllm.__file__)["__version__"] == "0+unknown"


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_every_dependency_has_a_lower_bound(requirement):
    """`.ci/oldest` tests these versions; it reads a bound that comes first."""
    assert re.match(r"[\w-]+>=\d", requirement)


def test_what_is_imported_is_a_dependency():
    modules = set()
    for path in Path(nanovllm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module)
    packages = {module.split(".")[0] for module in modules - {"__future__"}} - sys.stdlib_module_names
    packages = {package.replace("_", "-") for package in packages}
    extras = PROJECT["optional-dependencies"]
    optional = extras["cuda"] + extras["gguf"] + extras["structured"] + extras["server"] + extras["batch"]
    required = {re.match(r"[\w-]+", requirement).group() for requirement in PROJECT["dependencies"] + optional}
    assert {"torch", "safetensors"} <= packages
    missing = packages - {"nanovllm"} - required
    assert not missing


def test_importing_the_package_imports_no_extra():
    program = "import sys, nanovllm; print(*{name.split('.')[0] for name in sys.modules})"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    imported = set(process.stdout.split())
    assert "nanovllm" in imported
    extras = {"fastapi", "starlette", "uvicorn", "prometheus_client", "openai", "xgrammar", "gguf", "transformers"}
    assert not imported & extras


# ---- what help() and an editor show --------------------------------------------------------------------------------


def test_the_options_of_llm_are_those_of_config():
    """One keyword each, with the same type and default."""
    own = [option for option in dataclasses.fields(Config) if option.init and option.name != "model"]
    shown = inspect.signature(LLM.__init__).parameters
    assert list(shown) == ["self", "model", *(option.name for option in own), "options"]
    assert list(inspect.signature(LLM).parameters) == list(shown)[1:]
    for option in own:
        assert shown[option.name].default == option.default, option.name
        assert shown[option.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert shown[option.name].annotation == option.type, option.name


def test_every_option_reaches_the_engine(monkeypatch):
    given = {option.name: object() for option in dataclasses.fields(Config) if option.init}
    received = {}
    monkeypatch.setattr(LLMEngine, "__init__", lambda self, model, **options: received.update(options, model=model))
    LLM(**given)
    assert received == given


def test_help_shows_the_options():
    text = pydoc.render_doc(LLM)
    assert all(f"{option.name}: " in text for option in dataclasses.fields(Config) if option.init)
