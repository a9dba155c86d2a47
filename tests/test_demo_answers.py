"""What the demo answers is true of the code as it is: the files, classes, functions and options that answers name."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import nanovllm
from nanovllm import SamplingParams
from nanovllm.config import Config

PACKAGE = Path(nanovllm.__file__).parent
ROOT = PACKAGE.parent
LINES = [json.loads(line) for line in (PACKAGE / "demo" / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
OPTIONS = {
    field.name: field.default
    for options in (Config, SamplingParams)
    for field in dataclasses.fields(options)
    if field.init and field.default is not dataclasses.MISSING
}

# ASCII only: Chinese text stands beside a name without a space.
PATH = re.compile(r"(?<![\w/:.-])(?:(?:[a-z_]+/)+(?:\w+(?:\.[a-z]+)?)?|\w+\.py\b)", re.A)
MODULE = re.compile(r"python -m (\w+(?:\.\w+)*)", re.A)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+", re.A)
CAMEL_CASE = re.compile(r"\b(?=\w*[a-z])[A-Z]\w*[A-Z]\w*\b", re.A)
SNAKE_CASE = re.compile(r"\b[A-Za-z]\w*_\w+\b", re.A)
CALL = re.compile(r"\b([A-Za-z_]\w*)\(", re.A)
MEMBER = re.compile(r"\b([A-Z]\w*)\.([a-z_]\w*)\b", re.A)
ARGUMENT = re.compile(r"\b([a-z_]\w*)=(?=\S)", re.A)
WORD = re.compile(r"[a-z_]\w*", re.A)
VALUE = r"(\"[^\"]*\"|-?\d[\d.,]*\d|-?\d|True|False|None)"
CHINESE = re.compile(r"[\u4e00-\u9fff]")
DEFAULT = re.compile(rf"{VALUE} by default|默认 {VALUE}")

# Classes whose names are words: at the beginning of a sentence, nothing shows that a word is one.
PLAIN_CLASSES = ("Batch", "Config", "Context", "Detokenizer", "Router", "Sampler", "Scheduler", "Scheme", "Sequence")
# What learners want to know, by the chapter of docs/guide that explains it, in both languages.
TOPICS = {
    "01-one-request": [
        ("What is the overall architecture of nano-vllm?", "nano-vllm 的总体架构是怎样的？"),
        ("How does data flow from a prompt to text?", "数据怎样从提示词变成文本？"),
    ],
    "02-kv-cache": [
        ("Why does a paged KV cache save memory?", "分页缓存为什么省内存？"),
        ("How is the block of a token found?", "怎样找到一个 token 所在的块？"),
        ("What is a slot mapping?", "什么是槽位映射？"),
    ],
    "03-scheduling": [
        ("How does the scheduler choose between prefill and decode?", "调度器怎样在预填充和解码之间选择？"),
        ("What does preemption cost?", "抢占的代价是什么？"),
    ],
    "04-prefix-caching": [
        ("How is a prefix cache hit found?", "怎样找到前缀命中？"),
        ("How is a prefix cache hit confirmed?", "怎样确认前缀命中？"),
        ("What if two different blocks have the same hash?", "两个块的哈希相同会怎样？"),
    ],
    "05-the-model": [
        ("How does RoPE work?", "什么是 RoPE？"),
        ("Why is RoPE precomputed?", "RoPE 为什么预先计算？"),
        ("How is a fused weight such as qkv_proj loaded?", "融合的权重 qkv_proj 怎样加载？"),
        ("How is gate_up_proj loaded?", "gate_up_proj 怎样加载？"),
        ("How do I add a new model architecture?", "怎样添加一个模型？"),
    ],
    "06-attention-kernels": [
        ("What is an online softmax?", "什么是在线 softmax？"),
        ("Why is decode memory-bound?", "为什么解码受限于内存？"),
        ("How do I add a kernel?", "怎样添加一个内核？"),
    ],
    "07-sampling": [
        ("What does the sampler do at temperature 0?", "温度为 0 时采样器做什么？"),
        ("Why does exponential noise draw from the distribution?", "指数噪声为什么按分布抽样？"),
    ],
    "08-graphs-and-overlap": [
        ("For which batch sizes are CUDA graphs captured?", "CUDA 图为哪些批大小录制？"),
        ("When can CUDA graphs not be used?", "什么时候不能用 CUDA 图？"),
    ],
    "09-tensor-parallelism": [
        ("How does tensor parallelism split each layer?", "张量并行怎样拆分每一层？"),
        ("Where do the ranks communicate?", "各个 rank 在哪里通信？"),
        ("How do I run on a second GPU?", "怎样用第二块 GPU？"),
    ],
    "10-roofline": [
        ("Where does the time of a decode step go?", "一步的时间花在哪里？"),
        ("How is throughput measured?", "吞吐和延迟怎样测量？"),
        ("How is latency measured?", "吞吐和延迟怎样测量？"),
    ],
    "11-fewer-bytes": [
        ("What is quantisation?", "什么是量化？"),
        ("What is speculative decoding?", "什么是投机解码？"),
        ("What is a mixture of experts?", "什么是混合专家？"),
        ("How do I add a quantised layer?", "怎样添加量化层？"),
    ],
    "12-testing": [
        ("How is equality with transformers tested?", "怎样保证结果正确？"),
        ("What does vLLM have that nano-vllm has not?", "vLLM 有什么是 nano-vllm 没有的？"),
        ("What does nano-vllm do better than vLLM?", "nano-vllm 比 vLLM 好在哪里？"),
    ],
}

# What looks like a name of the code, and is none.
OTHER_NAMES = {"HF_HUB_OFFLINE", "TRITON_INTERPRET", "im_end"}
OTHER_NAMES |= {"FlashAttention", "LayerNorm", "NaN", "OLMo", "OpenAI", "SmolLM3"}
OTHER_NAMES |= {"CPUs", "FLOPs", "GPUs", "LoRA", "MLPs", "RoPE", "SiLU", "SwiGLU"}
FORMULAS = {"O", "down", "gate", "silu", "up"}


class Code(NamedTuple):
    """What is defined in the package, in bench.py, in example.py and in tools/.

    Attributes:
        classes: the names of each class's members, those of its bases' too.
        functions: names of functions and methods.
        names: of all that is defined, parameters, variables and attributes too; and strings that are names.
        strings: all of them, docstrings too.
    """

    classes: dict[str, set[str]]
    functions: set[str]
    names: set[str]
    strings: set[str]


def members_of(node: ast.ClassDef) -> set[str]:
    """The names of a class's methods and fields, and of what its methods assign to self."""
    found = set()
    for child in ast.walk(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(child.name)
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            found.add(child.target.id)
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            found.add(child.attr)
    return found


def read_code() -> Code:
    code, bases = Code({}, set(), set(), set()), {}
    for path in [*PACKAGE.rglob("*.py"), ROOT / "bench.py", ROOT / "example.py", *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                code.classes.setdefault(node.name, set()).update(members_of(node))
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                code.functions.add(node.name)
            elif isinstance(node, ast.arg):
                code.names.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                code.names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                code.names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                code.strings.add(node.value)
    for name, members in code.classes.items():
        for base in bases[name]:
            members |= code.classes.get(base, set())
    code.names.update(code.classes, code.functions, (text for text in code.strings if text.isidentifier()))
    return code


CODE = read_code()


def exists(path: str) -> bool:
    """Whether a path is one below the package, or below the repository."""
    return any((folder / path).exists() for folder in (PACKAGE, ROOT))


def names_in(text: str) -> list[str]:
    """What looks like a name of the code, paths and modules aside."""
    text = MODULE.sub("", PATH.sub("", text))
    return [*CAMEL_CASE.findall(text), *SNAKE_CASE.findall(text)]


def parse(value: str) -> Any:
    return ast.literal_eval(value.replace(",", ""))


def find_problems(question: str, answer: str) -> list[str]:
    """What a question and its answer say of the code that is not so."""
    text = f"{question} {answer}"
    problems = [f"no file or folder {path}" for path in PATH.findall(text) if not exists(path)]
    for module in MODULE.findall(text):
        path = module.replace(".", "/")
        if not (ROOT / f"{path}.py").exists() and not (ROOT / path / "__main__.py").exists():
            problems.append(f"no module {module}")
    problems += [f"no option {flag}" for flag in FLAG.findall(text) if flag not in CODE.strings]
    for name in names_in(text):
        known = CODE.classes.keys() if CAMEL_CASE.fullmatch(name) else CODE.names
        if name not in known | OTHER_NAMES and not hasattr(builtins, name):
            problems.append(f"no name {name}")
    for name in CALL.findall(text):
        if name not in CODE.functions | CODE.classes.keys() | FORMULAS and not hasattr(builtins, name):
            problems.append(f"no function {name}")
    for owner, member in MEMBER.findall(text):
        if member not in CODE.classes.get(owner, ()):
            problems.append(f"no {member} in {owner}")
    problems += [f"no option {name}" for name in ARGUMENT.findall(text) if name not in CODE.names]
    defaults = list(DEFAULT.finditer(text))
    if len(defaults) != text.count("by default") + text.count("默认"):
        problems.append("a default without a value")
    for default in defaults:
        value = parse(default[1] or default[2])
        name = next((word for word in reversed(WORD.findall(text[: default.start()])) if word in OPTIONS), None)
        if name is None or (OPTIONS[name], type(OPTIONS[name])) != (value, type(value)):
            problems.append(f"{value!r} is not the default of {name}")
    return problems


def test_answers_are_true_of_the_code():
    problems = {line["question"]: find_problems(**line) for line in LINES}
    assert {question: found for question, found in problems.items() if found} == {}


def test_each_chapter_of_the_guide_is_asked_about():
    asked = {line["question"] for line in LINES}
    assert TOPICS.keys() == {path.stem for path in (ROOT / "docs" / "guide").glob("[0-9]*.md")}
    assert [
        question for topics in TOPICS.values() for pair in topics for question in pair if question not in asked
    ] == []


def test_a_question_is_answered_in_its_language():
    is_chinese = [[CHINESE.search(text) is not None for text in line.values()] for line in LINES]
    assert [line["question"] for line, (asks, answers) in zip(LINES, is_chinese, strict=True) if asks > answers] == []
    assert sum(asks for asks, _ in is_chinese) >= 100
    assert len({line["question"] for line in LINES}) == len(LINES)


@pytest.mark.parametrize("name", PLAIN_CLASSES)
def test_classes_whose_names_are_words(name):
    assert name in CODE.classes
    assert any(re.search(rf"\b{name}\b", line["answer"], re.A) for line in LINES)


def test_answers_name_much_of_the_code():
    """What the patterns find: if they found nothing, all answers would do."""
    text = " ".join(part for line in LINES for part in line.values())
    names = set(names_in(text))
    assert len({path for path in PATH.findall(text) if path.endswith(".py")}) >= 10
    assert len(names & CODE.classes.keys()) >= 15
    assert len(names & CODE.names) >= 80
    assert len(DEFAULT.findall(text)) >= 20
    assert names >= OTHER_NAMES
    assert set(CALL.findall(text)) >= FORMULAS


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("It is in engine/planner.py.", "no file or folder engine/planner.py"),
        ("看 engine/planner.py，再看别的。", "no file or folder engine/planner.py"),
        ("They live in planning/, all of them.", "no file or folder planning/"),
        ("Run benchmark.py.", "no file or folder benchmark.py"),
        ("Run python -m nanovllm.planner.", "no module nanovllm.planner"),
        ("Pass --no-such-flag.", "no option --no-such-flag"),
        ("The BlockPlanner does.", "no name BlockPlanner"),
        ("由 BlockPlanner 决定。", "no name BlockPlanner"),
        ("It grows with max_num_plans.", "no name max_num_plans"),
        ("Call plan() first.", "no function plan"),
        ("Scheduler.plan says so.", "no plan in Scheduler"),
        ("Pass planner=2.", "no option planner"),
        ("max_num_seqs is 511 by default.", "511 is not the default of max_num_seqs"),
        ("max_num_seqs，默认 511。", "511 is not the default of max_num_seqs"),
        ("enforce_eager is 0 by default.", "0 is not the default of enforce_eager"),
        ("It is 3 by default.", "3 is not the default of None"),
        ("It is on by default.", "a default without a value"),
    ],
)
def test_what_is_not_so_is_found(answer, problem):
    assert find_problems("What is it?", answer) == [problem]
