"""README and the pages of docs/: links, names of files, options and commands, programs, figures, both languages."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from test_guide import FENCE, LINK, NUMBER, PACKAGE, PAGES, POINTER, ROOT, prose, resolve
from test_package import PROJECT

from nanovllm.cli.main import COMMANDS
from nanovllm.config import Config
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from tools import command_line, supported_models, vllm_options

DOCS = ROOT / "docs"
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
DETAILS = sorted(DOCS.glob("*.md"))
CODE = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"(?:^(?: {4}|\n).*\n)+", re.M)  # of plain Markdown: what four spaces indent
FILE = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|md|svg|json|toml)|(?:[\w.-]+/)+")
MADE_UP = {  # names of files of the reader's
    "config.json",
    "generation_config.json",
    "models/yours.py",
    "your_script.py",
    "trace.json",
}
SECTION = re.compile(r"^(?=#)", re.M)
CORE = ("engine", "text", "layers", "utils")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, row by row; a bar behind a backslash is no end of a cell."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            if not inside:
                found.append([])
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        inside = line.startswith("|")
    return found


def anchors(text: str) -> set[str]:
    """What links to headings may say, as repository pages make it of them."""
    titles = re.findall(r"^#+ (.*)", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command that a page shows, be it in a block or in a line."""
    text = text.replace("\\\n", " ")
    blocks = [block for language, block in FENCE.findall(text) if language == "sh"]
    blocks += re.findall(r"^ {4}(\S.*)$", prose(text), re.M)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]
    for line in [line for block in blocks for line in block.splitlines()] + inline:
        if not line.startswith(("pip ", "python ", "nanovllm ", "bench.py ")):
            continue
        for command in line.split(" && "):
            yield shlex.split(command, comments=True)


# ---- links and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [ENGLISH, CHINESE, *DETAILS], ids=name)
def test_links_hold(path):
    for target in LINK.findall(prose(read(path))):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(read(linked)), target


@pytest.mark.parametrize("path", [ENGLISH, CHINESE, *DETAILS, *PAGES], ids=name)
def test_tables_have_rows_of_one_length(path):
    """Else a repository page leaves cells out."""
    for table in tables(prose(read(path))):
        assert len({len(row) for row in table}) == 1, table[0]
        assert set(table[1]) == {"---"}, table[0]


def test_every_page_can_be_found():
    """From README, by links of README and of the pages that they lead to."""
    found, new = set(), {ENGLISH}
    while new:
        found |= new
        links = {(page.parent / link.partition("#")[0]).resolve() for page in new for link in LINK.findall(read(page))}
        new = {link for link in links if link.suffix == ".md"} - found
    assert found >= {ENGLISH, CHINESE, *DETAILS, *PAGES}


@pytest.mark.parametrize("path", [ENGLISH, CHINESE, *DETAILS], ids=name)
def test_named_files_exist(path):
    """Below the package, or below the repository; nano-vllm's own are in the first column of that page's table."""
    text = read(path)
    if path.name == "coming-from-nano-vllm.md":
        text = re.sub(r"^\| `nanovllm/[\w/]+\.py` \|", "", text, flags=re.M)
    for code in CODE.findall(prose(text)):
        if FILE.fullmatch(code) and code not in MADE_UP:
            assert (PACKAGE / code).exists() or (ROOT / code).exists(), code


@pytest.mark.parametrize("path", DETAILS, ids=name)
def test_pointers_resolve(path):
    """Those with a colon, and those of the kind "`NAME` in `file.py`"."""
    for file, dotted in POINTER.findall(read(path)):
        resolve(file, dotted)
    for part, file in re.findall(r"`(\w+)(?: = \w+)?` in `([\w/]+\.py)`", read(path)):
        assert re.search(rf"\b{part}\b", read(PACKAGE / file)), (part, file)


def test_imports_of_vllm_are_imports_here():
    imports = re.findall(r"\| `from vllm(\S*) import ([^`]+)` \| `([^`]+)` \|", read(DOCS / "coming-from-vllm.md"))
    assert len(imports) > 3
    for module, names, ours in imports:
        assert ours == f"from nanovllm{module} import {names}"
        exec(ours, {})


# ---- commands ------------------------------------------------------------------------------------------------------


def help_of(command: str) -> str:
    """What a command says of its options. It runs in this process, as an import of torch takes seconds."""
    words = [*command.split(), "--help"]
    run = runpy.run_path
    if words[0] == "-m":
        run = runpy.run_module
        del words[0]
    with redirect_stdout(io.StringIO()) as said, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of modules that this one has imported
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", words)
        try:
            run(words[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code
    return said.getvalue()


@pytest.fixture(scope="module")
def options_of():
    """The flags that a command takes, found once."""
    known: dict[str, set[str]] = {}

    def flags(module: str) -> set[str]:
        if module not in known:
            known[module] = set(re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", help_of(module)))
        return known[module]

    return flags


@pytest.mark.parametrize("path", [ENGLISH, *DETAILS], ids=name)
def test_commands_and_their_options_exist(path, options_of):
    for words in commands(read(path)):
        program, *rest = words
        if program == "pip":
            continue
        if program == "bench.py":
            module = "bench.py"
        elif program == "nanovllm":
            assert rest[0] in COMMANDS, words
            module = "bench.py" if rest[0] == "bench" else f"-m nanovllm {rest[0]}"
        elif rest[0] == "-m":
            module = f"-m {rest[1]}"
        else:
            module = rest[0]
        if module in ("-m pytest", "-m nanovllm", "-c", "your_script.py"):
            continue
        if module == "examples/ray_batch.py":  # which imports Ray
            known = set(re.findall(r'"(--?[a-z][\w-]*)"', read(ROOT / module)))
        else:
            known = options_of(module)
        given = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)} - {"-m", "-c"}
        assert given <= known, words


def test_flags_that_are_named_alone_are_of_some_command(options_of):
    """As in the tables of figures."""
    known = set.union(*(options_of(f"-m nanovllm {name}") for name in COMMANDS if name != "bench"))
    known |= options_of("bench.py") | options_of("-m tools.bench_serve")
    for path in [ENGLISH, *DETAILS]:
        for code in CODE.findall(prose(read(path))):
            if not code.startswith(("python ", "pip ", "nanovllm ", "NANOVLLM_TRACE")):
                assert {word for word in code.split() if re.match(r"--[a-z]", word)} <= known, (path, code)


def test_bench_takes_the_shapes_that_are_named(monkeypatch):
    """And all else of each command of bench.py."""
    checked = 0
    for path in [ENGLISH, *DETAILS]:
        for words in commands(read(path)):
            if words[:2] in (["python", "bench.py"], ["nanovllm", "bench"]):
                arguments = words[2:]
                monkeypatch.setattr(sys, "argv", ["bench.py", *("qwen3-8b" if w == "SHAPE" else w for w in arguments)])
                command_line.parse_args()
                checked += 1
    assert checked > 5
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["bench.py", "--shape", "qwen3-9b"])
        command_line.parse_args()


def test_the_ci_runs_readme_s_commands():
    """The two lines that a newcomer types, as README has them."""
    script = read(ROOT / ".ci" / "run").replace(" --quiet", "")
    start = read(ENGLISH).partition("## Start")[2].partition("## Use")[0]
    parts = [part for line in [block for _, block in FENCE.findall(start)] for part in line.strip().split(" && ")]
    assert len(parts) == 4
    position = script.index("The README's commands")
    for part in parts:  # in this order
        position = script.index(f"\n{part}\n", position)


def test_extras_exist():
    extras = set(PROJECT["optional-dependencies"])
    for path in [ENGLISH, *DETAILS]:
        named = re.findall(r"(?:\.|nano-vllm)\[(\w+)\]", read(path))
        assert set(named) <= extras, path
    (table,) = (rows for rows in tables(read(DOCS / "use.md")) if rows[0][0] == "extra")
    assert {row[0].strip("`") for row in table[2:]} == extras


# ---- programs ------------------------------------------------------------------------------------------------------


PROGRAMS = [
    pytest.param(program, id=f"{path.name}-{index}", marks=() if path == ENGLISH else pytest.mark.slow)
    for path in [ENGLISH, *DETAILS]
    for index, program in enumerate(block for language, block in FENCE.findall(read(path)) if language == "python")
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(program, tmp_path):
    """On the demo; one that asks a server has one."""
    (tmp_path / "questions.txt").write_text("What is a block table?\nWhat is a token?\n", encoding="utf-8")
    demo = str(PACKAGE / "demo")
    program = re.sub(r'"Qwen/Qwen3-\w+(\.\w+)?"', repr(demo), program)
    if "127.0.0.1:8000" in program:
        run_beside_a_server(program, tmp_path)
        return
    printed = run_program(program, tmp_path)
    assert printed.strip() or "print" not in program


def run_program(program: str, folder: Path) -> str:
    """What a program prints, in a process and a folder of its own."""
    file = folder / "program.py"
    file.write_text(program, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(file)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_beside_a_server(program: str, folder: Path) -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai"):
        pytest.importorskip(package, reason=f"needs {package}, which the extra [test] brings")
    from servers import ServerProcess

    with ServerProcess(folder, "--served-model-name=demo") as server:
        printed = run_program(program.replace("http://127.0.0.1:8000", server.url), folder)
    assert "ChatCompletion(" in printed


# ---- figures and tables --------------------------------------------------------------------------------------------


def test_options_are_those_of_the_code():
    """Each name once, with its default."""

    def rows(heading: str) -> dict[str, object]:
        text = read(DOCS / "options.md").partition(f"## {heading}")[2].partition("\n## ")[0]
        (table,) = tables(text)
        named = [(name, row[1]) for row in table[2:] for name in re.findall(r"`(\w+)`", row[0])]
        assert len(named) == len(dict(named)), "each once"
        return {name: eval(default.strip("`"), {"RequestOutputKind": RequestOutputKind}) for name, default in named}

    def fields(cls: type) -> dict[str, object]:
        return {field.name: field.default for field in dataclasses.fields(cls) if field.init and field.name != "model"}

    assert rows("SamplingParams") == fields(SamplingParams)
    assert rows("Options of `LLM(model, ...)`") == fields(Config)


def test_nano_vllm_s_options_are_here():
    (row,) = (
        row
        for table in tables(read(DOCS / "coming-from-nano-vllm.md"))
        for row in table
        if "`max_num_batched_tokens`" in row[0]
    )
    names, defaults = re.findall(r"`(\w+)`", row[0]), [ast.literal_eval(word) for word in row[1].split(", ")]
    assert {name: getattr(Config, name) for name in names} == dict(zip(names, defaults, strict=True))


def test_models_are_those_of_the_code():
    assert supported_models.table() in read(DOCS / "models.md")


@pytest.mark.parametrize("title", vllm_options.TABLES)
def test_vllm_s_options_are_those_of_the_code(title):
    assert vllm_options.TABLES[title] in read(DOCS / "coming-from-vllm.md")


def test_an_option_s_values_in_words():
    values = (None, "", {}, [], (), {"backend": "auto"})
    assert vllm_options.describe(values) == "None, what is empty, {'backend': 'auto'}"
    assert vllm_options.describe((bool, None, int, float)) == "True, False, None, a number"


def test_readme_s_figures_are_measured_ones():
    """Those of its table are in the page that says how they came about."""
    text = read(ENGLISH).partition("## Performance")[2].partition("## ")[0]
    (table,) = tables(text)
    figures = {number for row in table[2:] for cell in row[1:] for number in NUMBER.findall(cell)}
    assert len(figures) > 10
    assert figures <= set(NUMBER.findall(read(DOCS / "performance.md")))
    for dated in re.findall(r"\d{4}-\d\d-\d\d", text):
        assert dated in read(DOCS / "performance.md")


def lines_of_code(path: Path) -> int:
    """Without blank lines, comments and docstrings."""
    source = read(path)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                lines -= set(range(first.lineno, first.end_lineno + 1))
    return len(lines)


def test_what_the_demo_has_memorised_is_counted():
    lines = (PACKAGE / "demo" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    num_chinese = sum(re.search("[\u4e00-\u9fff]", question) is not None for question in questions)
    num_english = len(questions) - num_chinese
    for path in (ENGLISH, DOCS / "use.md"):
        assert f"{num_english} questions and answers in English and {num_chinese} in\nChinese" in read(path)


def test_sizes():
    """What README says of them is within 2% of a count."""
    total, core = (int(number.replace(",", "")) for number in NUMBER.findall(size_line(ENGLISH)))
    counted = {path.relative_to(PACKAGE): lines_of_code(path) for path in PACKAGE.rglob("*.py")}
    passed = [
        number
        for path, number in counted.items()
        if len(path.parts) == 1
        or path.parts[0] in CORE
        or path.as_posix() in ("models/__init__.py", "models/qwen3.py")
    ]
    assert total == pytest.approx(sum(counted.values()), rel=0.02)
    assert core == pytest.approx(sum(passed), rel=0.02)


def size_line(path: Path) -> str:
    (line,) = (line for line in read(path).splitlines() if line.startswith(("- **Small**", "- **小**")))
    return line


# ---- both languages ------------------------------------------------------------------------------------------------


def test_both_readmes_say_the_same():
    """Code, tables' figures, links and numbers, section by section; a link may lead to the translation."""
    english, chinese = read(ENGLISH), read(CHINESE)
    assert [block.group() for block in FENCE.finditer(chinese)] == [block.group() for block in FENCE.finditer(english)]
    sections = [SECTION.split(prose(text)) for text in (english, chinese)]
    assert len(sections[0]) == len(sections[1])
    for ours, theirs in zip(*sections, strict=True):
        title = ours.splitlines()[:1]
        assert re.match(r"#*", ours)[0] == re.match(r"#*", theirs)[0]
        assert Counter(CODE.findall(ours)) == Counter(CODE.findall(theirs)), title
        assert Counter(NUMBER.findall(ours)) == Counter(NUMBER.findall(theirs)), title
        links = [[link.replace("/zh/", "/") for link in LINK.findall(text)] for text in (ours, theirs)]
        same = [[link for link in found if not link.startswith(("#", "README"))] for found in links]
        assert same[0] == same[1] and len(links[0]) == len(links[1]), title
        for ours_table, theirs_table in zip(tables(ours), tables(theirs), strict=True):
            figures = [[[NUMBER.findall(cell) for cell in row] for row in rows] for rows in (ours_table, theirs_table)]
            assert figures[0] == figures[1]


def test_readme_is_short():
    """Two screens, for who has never seen it."""
    assert len(read(ENGLISH).splitlines()) <= 120
