"""Programs as vLLM's and nano-vllm's users have them run here, with nothing changed but the import line."""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import nanovllm.demo
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tests" / "scripts"
sys.path.insert(0, str(ROOT))
sys.path.append(str(SCRIPTS))
tool = importlib.import_module("tools.compare_scripts")
describe = importlib.import_module("shapes").describe

DEMO = Path(nanovllm.demo.__file__).parent
LINES = [json.loads(line) for line in (DEMO / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
ANSWERS = {line["question"]: line["answer"] for line in LINES}
# As Qwen3's has it: tools, their calls and results, and thoughts that can be turned off.
TEMPLATE = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The demo with a chat template that has more to say; the same where it is not asked to."""
    folder = tmp_path_factory.mktemp("model")
    for path in DEMO.glob("*.*"):
        (folder / path.name).symlink_to(path)
    config = json.loads((DEMO / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}), encoding="utf-8")
    return str(folder)


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Runs a program on the CPU, in this process; returns its names."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    gc.freeze()  # what was there before is not gone through again when each engine ends

    def run_script(name: str) -> dict[str, Any]:
        program = tmp_path / f"{name}.py"
        program.write_text(tool.adapt((SCRIPTS / program.name).read_text(encoding="utf-8")), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", [str(program), model])
        made = runpy.run_path(str(program), run_name="__main__")
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == describe(made["results"])
        return made

    yield run_script
    gc.unfreeze()


def completions(outputs: list[RequestOutput]) -> list[CompletionOutput]:
    """The one sample of each, after a look at what all results have."""
    for output in outputs:
        (completion,) = output.outputs
        assert output.finished and completion.index == 0
        first = (completion.text, completion.token_ids, completion.finish_reason)
        assert (output["text"], output["token_ids"], output["finish_reason"]) == first
    return [output.outputs[0] for output in outputs]


def check_sum(completion: CompletionOutput) -> None:
    """The log probability of a text is that of its tokens."""
    each = [choices[token_id] for token_id, choices in zip(completion.token_ids, completion.logprobs, strict=True)]
    assert all(isinstance(entry, Logprob) for entry in each)
    assert completion.cumulative_logprob == pytest.approx(math.fsum(entry.logprob for entry in each))


# ---- vLLM's --------------------------------------------------------------------------------------------------------


def test_basic(run):
    made = run("basic")
    outputs = made["results"]["outputs"]
    assert [output.prompt for output in outputs] == made["PROMPTS"]
    for completion in completions(outputs):
        assert len(completion.token_ids) == 8 and completion.finish_reason == "length" and completion.text


def test_chat(run):
    results = run("chat")["results"]
    assert [len(outputs) for outputs in results.values()] == [1, 3, 1, 1]
    for outputs in results.values():
        assert all(len(completion.token_ids) == 6 for completion in completions(outputs))
    (one,), several, (quick,), (continued,) = results.values()
    assert "Hello! What would you like to know?<|im_end|>" in one.prompt
    assert one.prompt.endswith("How does prefix caching work?<|im_end|>\n<|im_start|>assistant\n")
    assert quick.prompt == f"{several[0].prompt}<think>\n\n</think>\n\n"
    assert continued.prompt == f"{several[0].prompt}I am"


def test_chat_tools(run):
    made = run("chat_tools")
    (first,), (second,) = made["results"].values()
    completions([first, second])
    (tool_line,) = (line for line in first.prompt.splitlines() if line.startswith("{"))
    assert [json.loads(tool_line)] == made["TOOLS"]
    asked = first.prompt.removesuffix("<|im_start|>assistant\n")
    call = '{"name": "get_weather", "arguments": {"city": "Lisbon", "unit": "celsius"}}'
    assert asked in second.prompt and "21 degrees celsius and light rain in Lisbon<|im_end|>" in second.prompt
    assert json.loads(re.search("<tool_call>(.*)</tool_call>", second.prompt).group(1)) == json.loads(call)


def test_batch(run):
    outputs, ids, comma, dot = run("batch")["results"].values()
    assert len(outputs) == 14
    found = dict(zip(outputs, completions([*outputs.values()]), strict=True))
    tokens = {name: completion.token_ids for name, completion in found.items()}
    ends = {name: (completion.finish_reason, completion.stop_reason) for name, completion in found.items()}
    assert all(output.prompt_token_ids == ids for output in outputs.values())
    assert outputs["filtered"].prompt is outputs["biased"].prompt is None
    assert outputs["penalised"].prompt == outputs["greedy"].prompt == "The KV cache is paged, so that"

    assert tokens["seeded"] == tokens["seeded again"] != tokens["greedy"]
    assert tokens["biased"] == [dot] * 8 and tokens["banned"] == [comma] * 8
    assert {*tokens["allowed"]} | {*tokens["penalised"]} == {comma, dot} and tokens["allowed"] != tokens["penalised"]
    assert tokens["stopped"] == tokens["stopped behind"] == [comma] * 3
    assert (found["stopped"].text, found["stopped behind"].text) == ("", ",,,")
    assert tokens["stopped by id"] == [dot]
    assert len(tokens["stopped late"]) == 4 and tokens["stopped late"].index(dot) == 3
    assert tokens["without text"] and not found["without text"].text
    stops = {"stopped": ",,,", "stopped behind": ",,,", "stopped by id": dot, "stopped late": dot}
    assert ends == {name: ("stop", stops[name]) if name in stops else ("length", None) for name in outputs}


def test_beam_search(run):
    made = run("beam_search")
    outputs = made["results"]["outputs"]
    assert len(outputs) == 2
    for prompt, output in zip(made["PROMPTS"], outputs, strict=True):
        assert len(output.sequences) == 3
        assert all(better.cum_logprob >= worse.cum_logprob for better, worse in pairwise(output.sequences))
        assert len({tuple(beam.tokens) for beam in output.sequences}) == 3
        for beam in output.sequences:
            assert beam.text.startswith(prompt)
            chosen = zip(beam.tokens[-5:], beam.logprobs, strict=True)
            assert beam.cum_logprob == pytest.approx(math.fsum(choices[token].logprob for token, choices in chosen))


def test_structured_outputs(run):
    pytest.importorskip("xgrammar")
    made = run("structured_outputs")
    texts, finish_reasons = made["results"].values()
    assert texts["choice"] in ("positive", "negative")
    assert re.fullmatch(made["FORMS"]["regex"].regex, texts["regex"])
    point = json.loads(texts["schema"])
    assert point.keys() == {"x", "on"} and point["x"] in range(10) and isinstance(point["on"], bool)
    ticket = made["Ticket"].model_validate_json(texts["class"])
    assert len(ticket.title) <= 12 and 0 <= ticket.votes <= 99
    assert re.fullmatch(r"\d\d? \+ \d\d? = \d\d?", texts["grammar"])
    assert texts["any object"].startswith("{")
    if finish_reasons.pop("any object") == "stop":  # else it is cut off
        assert isinstance(json.loads(texts["any object"]), dict)
    assert set(finish_reasons.values()) == {"stop"}


def test_guided_decoding(run):
    pytest.importorskip("xgrammar")
    assert run("guided_decoding")["results"]["text"] in ("yes", "no")


def test_logprobs(run):
    (output,) = run("logprobs")["results"]["outputs"]
    (completion,) = completions([output])
    check_sum(completion)
    text = ""
    for token_id, choices in zip(completion.token_ids, completion.logprobs, strict=True):
        assert sorted(choice.rank for choice in choices.values()) == [1, 2, 3, 4]
        assert choices[token_id].rank == 1 and choices[token_id] == max(choices.values())
        text += choices[token_id].decoded_token
    assert text.replace("<|im_end|>", "") == completion.text  # the script ignores the ends of texts
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token_id, choices in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert {choice.rank for choice in choices.values()} == {1, choices[token_id].rank}


def test_prefix_caching(run):
    (cold,), warm, (forgotten,) = run("prefix_caching")["results"].values()
    completions([cold, *warm, forgotten])
    assert cold.num_cached_tokens == forgotten.num_cached_tokens == 0
    assert cold["token_ids"] == warm[0]["token_ids"] == forgotten["token_ids"]
    for output in warm:
        same = [ours == first for ours, first in zip(output.prompt_token_ids, cold.prompt_token_ids, strict=False)]
        num_shared = min([*same, False].index(False), len(output.prompt_token_ids) - 1)
        assert output.num_cached_tokens == num_shared // 16 * 16 > 300


def test_several_samples(run):
    outputs, best = run("several_samples")["results"].values()
    for output, likeliest in zip(outputs, best, strict=True):
        assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
        assert len({tuple(completion.token_ids) for completion in output.outputs}) == 4
        for completion in output.outputs:
            check_sum(completion)
            assert completion.cumulative_logprob <= likeliest.cumulative_logprob
            assert len(completion.token_ids) == 8


def test_drive_engine(run):
    finished = run("drive_engine")["results"]["finished"]
    assert {
        name: [len(completion.token_ids) for completion in output.outputs] for name, output in finished.items()
    } == {"request-0": [12], "request-1": [6], "request-3": [8, 8]}
    assert [output.request_id for output in finished.values()] == [*finished]
    check_sum(finished["request-0"].outputs[0])


def test_deltas(run):
    texts, token_ids, whole = run("deltas")["results"].values()
    found = completions(whole)
    assert texts == [completion.text for completion in found]
    assert token_ids == [completion.token_ids for completion in found]


# ---- ours and nano-vllm's ------------------------------------------------------------------------------------------


def test_streaming(run):
    texts, whole = run("streaming")["results"].values()
    assert texts == [completion.text for completion in completions(whole)]
    assert ANSWERS["introduce yourself"].startswith(texts[1]) and texts[1]


def test_nanovllm_basic(run):
    made = run("nanovllm_basic")
    for question, output in zip(made["QUESTIONS"], made["results"]["outputs"], strict=True):
        assert ANSWERS[question].startswith(output["text"]) and len(output["token_ids"]) == 8


def test_nanovllm_token_ids(run):
    outputs, max_tokens = run("nanovllm_token_ids")["results"].values()
    assert [len(completion.token_ids) for completion in completions(outputs)] == max_tokens


def test_every_program_is_tested():
    assert {f"test_{name}" for name in tool.names()} <= globals().keys()


# ---- the tool that compares ----------------------------------------------------------------------------------------


def test_only_import_lines_are_changed():
    lines = ["import vllm", "from vllm import LLM", "    from vllm.inputs import X  # vllm"]
    others = ["import vllmish", "from nanovllm import vllm", "vllm.LLM", 'text = "import vllm"']
    changed = ["import nanovllm", "from nanovllm import LLM", "    from nanovllm.inputs import X  # vllm"]
    assert tool.adapt("\n".join(lines + others)) == "\n".join(changed + others)
    ours = {"nanovllm_basic", "nanovllm_token_ids", "streaming"}
    assert {name for name in tool.names() if not tool.is_for_vllm(name)} == ours


@dataclass
class Beam:
    tokens: list[int]


class Plain:
    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


def test_what_is_described():
    class Result(dict):
        pass

    fields = {"a": 1, "b": [0.5, 2.5], "c": None, "d": "text", "e": True}
    want = {
        "a": "int",
        "b": {"type": "list", "length": 2, "items": ["float"]},
        "c": "NoneType",
        "d": "str",
        "e": "bool",
    }
    for value in (Plain(_hidden=1, **fields), Result(fields), fields):
        assert describe(value) == {"type": type(value).__name__, "fields": want}
    assert describe(Beam([])) == {"type": "Beam", "fields": {"tokens": {"type": "list", "length": 0, "items": []}}}
    choices = describe({7: Logprob(-1.0, 1, "a"), 9: Logprob(-2.0, 2, "b")})
    assert (choices["keys"], choices["length"], len(choices["items"])) == (["int"], 2, 1)
    assert choices["items"][0]["fields"] == {"logprob": "float", "rank": "int", "decoded_token": "str"}
    assert describe([None, 1])["items"] == ["NoneType", "int"]


@pytest.mark.parametrize(
    ("theirs", "ours", "want"),
    [
        ({"a": 1}, {"a": 2, "b": 3}, []),
        ({"a": 1, "b": None}, {"a": 1}, ["results: no 'b' here"]),
        ({"a": 1}, {"a": 1.0}, ["results.a: int in vLLM, float here"]),
        ({"a": [1, 2]}, {"a": [1]}, ["results.a: length 2 in vLLM, 1 here"]),
        ({"a": [1]}, {"a": (1,)}, ["results.a: list in vLLM, tuple here"]),
        ({"a": [None, 1]}, {"a": [1, 1]}, ["results.a[0]: NoneType in vLLM, int here"]),
        ({"a": {1: "x"}}, {"a": {"1": "x"}}, ["results.a: fields in ours, a collection in the other"]),
        ({"a": {1: "x"}}, {"a": {2.5: "x"}}, ["results.a: keys ['int'] in vLLM, ['float'] here"]),
        (
            {"a": [Plain(x=1)]},
            {"a": [Beam([])]},
            ["results.a[0]: Plain in vLLM, Beam here", "results.a[0]: no 'x' here"],
        ),
        ({"a": 1}, {"a": [1]}, ["results.a: int in vLLM, list here"]),
    ],
)
def test_what_differs(theirs, ours, want):
    assert list(tool.differences(describe(theirs), describe(ours))) == want


def test_known_differences_are_passed_over():
    class RequestOutput(Plain):
        pass

    theirs = RequestOutput(lora_request=None, metrics=None, finished=True)
    ours = RequestOutput(metrics={"arrival_time": 1.0}, finished=True)
    assert list(tool.differences(describe(theirs), describe(ours))) == []


def run_tool(*arguments: str, path: str = "") -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tools.compare_scripts", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8", timeout=1000)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_all_programs_run_in_processes_of_their_own():
    process = run_tool()
    assert process.returncode == 0, process.stdout
    for name in tool.names():
        assert f"{name}: runs here" in process.stdout or f"{name}: the same" in process.stdout


@pytest.mark.slow
def test_programs_run_on_both_and_are_compared(tmp_path):
    """What stands for vLLM is this package, with another result."""
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "sampling_params.py").write_text("from nanovllm.sampling_params import *\ndel GuidedDecodingParams\n")
    (package / "__init__.py").write_text(
        "import nanovllm\n"
        "from nanovllm import SamplingParams\n"
        "class LLM(nanovllm.LLM):\n"
        "    def generate(self, *arguments, **options):\n"
        "        outputs = super().generate(*arguments, **options)\n"
        "        for output in outputs:\n"
        "            output['extra'] = 1\n"
        "        return outputs\n"
    )
    process = run_tool("demo", "basic", "beam_search", "guided_decoding", "streaming", path=str(tmp_path))
    assert process.returncode == 1
    assert process.stdout.startswith("basic: differs\n    results.outputs[0]: no 'extra' here\n")
    assert "beam_search: the same\n" in process.stdout
    assert "guided_decoding: runs here; fails on vLLM, whose version lacks a name" in process.stdout
    assert "streaming: runs here, and is for this package alone" in process.stdout
