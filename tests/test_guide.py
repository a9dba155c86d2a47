"""The guide: its pointers, links, programs, pictures, and that both languages say the same."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import nanovllm
from nanovllm.engine.block_manager import BlockManager
from nanovllm.timeline.svg import draw_svg
from tools.guide_pictures import FOLDER, PICTURES

PACKAGE = Path(nanovllm.__file__).parent
ROOT = PACKAGE.parent
GUIDE = ROOT / "docs" / "guide"
CHAPTERS = sorted(GUIDE.glob("[0-9]*.md"))
PAGES = sorted(GUIDE.rglob("*.md"))
TRANSLATED = [path for path in PAGES if path.parent.name == "zh"]
POINTER = re.compile(r"`([\w/]+\.py):([\w.]+)`")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?", re.A)


def name(path: Path) -> str:
    return path.relative_to(GUIDE).as_posix()


def prose(text: str) -> str:
    return FENCE.sub("", text)


def bodies(node: ast.AST) -> dict[str, ast.AST]:
    """What is defined directly in a module or class, or assigned to self in its methods, by name."""
    found: dict[str, ast.AST] = {}
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
            found[child.name] = child
        targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
        for target in targets:
            for part in ast.walk(target) if target is not None else []:
                if isinstance(part, ast.Name):
                    found[part.id] = child
        if isinstance(child, ast.FunctionDef) and isinstance(node, ast.ClassDef):
            for part in ast.walk(child):
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                    found.setdefault(part.attr, child)
    return found


def resolve(file: str, dotted: str) -> None:
    """Raises if a pointer leads nowhere; files are below the package, or below the repository."""
    path = PACKAGE / file if (PACKAGE / file).exists() else ROOT / file
    node: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for part in dotted.split("."):
        node = bodies(node)[part]


def programs(text: str) -> list[tuple[str, str, str | None]]:
    """(language, program, what it prints or None) of each program of a page: the text block directly behind it."""
    blocks = list(FENCE.finditer(text))
    found = []
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block[1] not in ("python", "sh"):
            continue
        is_output = after is not None and after[1] == "text" and text[block.end() : after.start()].strip() == ""
        found.append((block[1], block[2], after[2] if is_output else None))
    return found


def run_python(program: str, names: dict) -> str:
    """What a block prints; the blocks of a page share their names."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "guide", "exec"), names)
    return out.getvalue()


def run_shell(command: str) -> str:
    """What a command prints; only Python's modules are run."""
    python, *arguments = shlex.split(command)
    assert python == "python"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=250, check=True
    )
    return done.stdout


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_pointers_resolve(path):
    pointers = POINTER.findall(path.read_text(encoding="utf-8"))
    if path.name != "README.md":
        assert len(set(pointers)) >= 5, "a chapter points at the code"
    for file, dotted in pointers:
        resolve(file, dotted)


def test_a_pointer_that_leads_nowhere_is_found():
    resolve("engine/scheduler.py", "Scheduler.running")
    with pytest.raises(KeyError):
        resolve("engine/scheduler.py", "Scheduler.walking")
    with pytest.raises(FileNotFoundError):
        resolve("engine/planner.py", "Scheduler")


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_hold(path):
    for target in LINK.findall(prose(path.read_text(encoding="utf-8"))):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            assert (path.parent / file).exists(), target
            assert not anchor, "headings are not linked to: they differ between the languages"


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_programs_print_what_the_chapter_says(path, monkeypatch):
    for method in ("compute_hash", "_block_name"):  # which chapters break on purpose: mended whatever happens
        monkeypatch.setattr(BlockManager, method, vars(BlockManager)[method])
    names: dict = {}
    checked = 0
    for language, program, expected in programs(path.read_text(encoding="utf-8")):
        if language == "python":
            printed = run_python(program, names)
            assert printed == (expected or ""), program
            checked += expected is not None
        elif expected is not None:  # an excerpt: its lines come in this order
            lines = iter(run_shell(program).splitlines())
            for line in expected.splitlines():
                assert line == "..." or line in lines, line
            checked += 1
    assert checked, "a chapter shows something that was run"


@pytest.mark.parametrize("picture", PICTURES)
def test_pictures_are_of_real_runs(picture):
    """All but the panel of times is what a run gives now."""

    def steady(svg: str) -> list[str]:
        lines = svg.splitlines()
        times = next(i for i, line in enumerate(lines) if "time to schedule" in line)
        return lines[:times] + lines[times + 4 :]  # its label, two numbers and its outline

    title, make = PICTURES[picture]
    assert steady(draw_svg(make(), title)) == steady((FOLDER / f"{picture}.svg").read_text(encoding="utf-8"))


def test_every_picture_is_shown():
    shown = {Path(target).name for path in PAGES for target in LINK.findall(path.read_text(encoding="utf-8"))}
    assert {f"{picture}.svg" for picture in PICTURES} <= shown


def test_the_map_names_every_folder():
    text = (GUIDE / "01-one-request.md").read_text(encoding="utf-8")
    (architecture,) = (block[2] for block in FENCE.finditer(text) if block[1] == "mermaid" and "subgraph" in block[2])
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {folder.rstrip("/") for folder in re.findall(r"\b\w+/", architecture)} == folders


def test_the_map_s_arrows_are_imports():
    text = (GUIDE / "01-one-request.md").read_text(encoding="utf-8")
    arrows = re.findall(r"^ +(\w+) --> (\w+)$", text, re.M)
    assert len(arrows) > 10
    for source, target in arrows:
        files = [PACKAGE / f"{source}.py"] if (PACKAGE / f"{source}.py").exists() else (PACKAGE / source).rglob("*.py")
        texts = [file.read_text(encoding="utf-8") for file in files]
        assert any(re.search(rf"^ *from nanovllm\.{target}\b", text, re.M) for text in texts), (source, target)


def test_each_chapter_has_its_parts():
    for path in CHAPTERS:
        headings = re.findall(r"^## (.*)", prose(path.read_text(encoding="utf-8")), re.M)
        assert headings == ["The question", "The idea", "In the code", "Without it", "Exercises"], path


@pytest.mark.parametrize("path", TRANSLATED, ids=name)
def test_both_languages_say_the_same(path):
    """Headings, programs, pictures, pointers, links and numbers, section by section."""
    english, chinese = (file.read_text(encoding="utf-8") for file in (GUIDE / path.name, path))
    assert [block.group() for block in FENCE.finditer(chinese)] == [block.group() for block in FENCE.finditer(english)]
    sections = [re.split(r"^(?=#)", prose(text), flags=re.M) for text in (english, chinese)]
    assert len(sections[0]) == len(sections[1])
    for ours, theirs in zip(*sections, strict=True):
        assert re.match(r"#*", ours)[0] == re.match(r"#*", theirs)[0]
        title = ours.splitlines()[:1]
        assert Counter(POINTER.findall(ours)) == Counter(POINTER.findall(theirs)), title
        targets = [sorted(Path(link).name for link in LINK.findall(text)) for text in (ours, theirs)]
        assert targets[0] == targets[1], title
        assert Counter(NUMBER.findall(ours)) == Counter(NUMBER.findall(theirs)), title
