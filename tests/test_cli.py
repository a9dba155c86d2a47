"""The command line: chats in a terminal, options of the engine, and what is said where something is missing."""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import nanovllm.demo
from nanovllm import LLM, SamplingParams
from nanovllm.cli import bench, engine_options
from nanovllm.cli.main import COMMANDS, main
from nanovllm.config import Config

DEMO = str(Path(nanovllm.demo.__file__).parent)
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
TABLE, SEQS = "What is a block table?", "What is max_num_seqs?"
GREEDY = '{"temperature": 0, "max_tokens": 40}'
CHAT = ["chat", "demo", "--device", "cpu"]


@pytest.fixture(scope="module")
def llm():
    with LLM(DEMO, device="cpu") as llm:
        yield llm


def answer(llm: LLM, *contents: str) -> str:
    """What the demo says at the end of a conversation."""
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return llm.chat(messages, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)[0].text


# ---- commands ------------------------------------------------------------------------------------------------------


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanovllm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, **options)


def test_help_and_version(capsys):
    for arguments in (["--help"], ["--version"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in COMMANDS) and nanovllm.__version__ in text


@pytest.mark.parametrize("arguments", [[], ["sing"], ["chat"], ["run-batch"], ["chat", "demo", "--max-num-seqs", "x"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "text", "match"),
    [
        ("--params", "{torn", "it is no JSON: Expecting property name.*'{torn'"),
        ("--params", "[1]", r"it must be a JSON object, got '\[1\]'"),
        ("--speculative-config", "ngram", "it is no JSON: .*'ngram'"),
    ],
)
def test_bad_json(option, text, match, capsys):
    with pytest.raises(SystemExit):
        main(["chat", "demo", option, text])
    assert re.search(f"argument {option}: {match}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["chat", "/no/such/folder"], "/no/such/folder"),
        ([*CHAT, "--max-num-seqs", "0"], "max_num_seqs must be between 1"),
        ([*CHAT, "--params", '{"top_p": 3}'], "top_p must be"),
        ([*CHAT, "--params", '{"n": 2}'], "stream yields one text, got n=2"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, match, capsys):
    assert main(arguments) == 1
    text = capsys.readouterr().err
    assert match in text and text.splitlines()[-1].startswith("nanovllm chat: ")


@pytest.mark.parametrize(
    ("command", "package", "extra"), [("serve", "fastapi", "server"), ("run-batch", "pydantic", "batch")]
)
def test_a_command_that_needs_an_extra(command, package, extra):
    """Others do without."""
    program = f"import sys; sys.modules['{package}'] = None; from nanovllm.cli.main import main; "
    done = subprocess.run(
        [sys.executable, "-c", f"{program} sys.exit(main(['{command}', '--help']))"], capture_output=True, text=True,
        env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 1 and f'pip install "nano-vllm[{extra}]"' in done.stderr, done.stderr
    done = subprocess.run(
        [sys.executable, "-c", f"{program} sys.exit(main(['chat', '--help']))"], capture_output=True, env=ENVIRONMENT
    )
    assert done.returncode == 0


def test_importing_the_package_imports_no_command():
    program = "import sys, nanovllm; print([name for name in sys.modules if name.startswith('nanovllm.')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
    assert "nanovllm.engine.scheduler" in done.stdout
    others = ("nanovllm.cli", "run_batch", "nanovllm.server", "nanovllm.openai_api", "nanovllm.ray")
    assert not any(name in done.stdout for name in others)


# ---- options of the engine -----------------------------------------------------------------------------------------


def parse(*arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    engine_options.add_engine_arguments(parser)
    return vars(parser.parse_args(arguments))


def test_every_option_is_there_and_explained():
    parser = argparse.ArgumentParser()
    engine_options.add_engine_arguments(parser)
    options = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert set(options) == {field.name for field in fields(Config) if field.init} - {"model"}
    assert all(action.help for action in options.values()) and parser.format_help()
    assert parse() == {}, "the engine has defaults of its own"


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--max-num-seqs", "7"], {"max_num_seqs": 7}),
        (["--max-model-len", "auto"], {"max_model_len": "auto"}),
        (["--max-model-len", "-1"], {"max_model_len": -1}),
        (["--gpu-memory-utilization", "0.5"], {"gpu_memory_utilization": 0.5}),
        (["--enforce-eager", "--no-async-scheduling"], {"enforce_eager": True, "async_scheduling": False}),
        (["--dtype", "bfloat16", "--kv-cache-dtype", "fp8"], {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}),
        (["--hf-overrides", '{"rope_theta": 5}'], {"hf_overrides": {"rope_theta": 5}}),
        (["--scheduling-policy", "priority", "--seed", "3"], {"scheduling_policy": "priority", "seed": 3}),
        (["--tokenizer", "a/b", "--quantization", "fp8"], {"tokenizer": "a/b", "quantization": "fp8"}),
    ],
    ids=str,
)
def test_options(arguments, options):
    assert parse(*arguments) == options


def test_options_reach_the_engine():
    args = argparse.Namespace(model="demo", system=None, device="cpu", max_num_seqs=3, dtype="float32")
    with LLM(**engine_options.read_options(args)) as llm:
        assert llm.config.max_num_seqs == 3 and llm.config.torch_dtype == torch.float32
        assert os.path.samefile(llm.config.model, DEMO)


@pytest.mark.parametrize(
    ("model", "given", "name"),
    [
        ("demo", None, "demo"),
        (DEMO + "/", None, "demo"),
        ("Qwen/Qwen3-0.6B", None, "Qwen/Qwen3-0.6B"),
        (DEMO, "a", "a"),
    ],
)
def test_the_name_that_requests_call_the_model(model, given, name):
    assert engine_options.served_name(argparse.Namespace(model=model, served_model_name=given)) == name


# ---- chats ---------------------------------------------------------------------------------------------------------


def test_a_conversation(llm):
    """It has a history, until it begins anew."""
    lines = [TABLE, SEQS, "/reset", SEQS, "", "/what", "/exit", "never said"]
    done = run(*CHAT, "--params", GREEDY, input="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    first = answer(llm, TABLE)
    second, third = answer(llm, TABLE, first, SEQS), answer(llm, SEQS)
    shown = [part.strip() for part in done.stdout.split("> ")]
    assert shown[1:5] == [first.strip(), second.strip(), "", third.strip()]
    assert shown[6] == shown[0] and "/reset begins anew" in shown[0], "an unknown command tells which there are"
    assert len(shown) == 8


def test_the_system_has_a_say(llm):
    done = run(*CHAT, "--params", GREEDY, "--system", "Be brief.", input=f"{TABLE}\n")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TABLE}]
    want = llm.chat(messages, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)[0].text
    assert done.stdout.split("> ")[1].strip() == want.strip() and done.returncode == 0


def test_a_conversation_that_becomes_too_long():
    """Its last question is forgotten, and the next one may be shorter."""
    done = run(*CHAT, "--params", GREEDY, "--max-model-len", "64", input=f"{'long ' * 90}\n{TABLE}\n")
    assert done.returncode == 0 and "a prompt must have fewer tokens than max_model_len=64" in done.stderr
    assert "(/reset begins anew)" in done.stderr and "A block table is" in done.stdout


def test_bytes_that_are_no_text():
    """As pasted from a file in another encoding: the line is refused, and the chat goes on."""
    command = [sys.executable, "-m", "nanovllm", *CHAT, "--params", GREEDY]
    environment = ENVIRONMENT | {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:surrogateescape"}
    done = subprocess.run(command, input=b"\xff\n" + TABLE.encode() + b"\n", capture_output=True, env=environment)
    assert done.returncode == 0 and b"whole characters" in done.stderr, done.stderr
    assert b"A block table is" in done.stdout


def test_the_first_answer_is_right():
    """The README tells newcomers to ask this, by the demo's own sampling parameters."""
    done = run("chat", "demo", "--device", "cpu", input=f"{TABLE}\n")
    assert "A block table is a sequence's list of KV cache block numbers" in done.stdout, done.stderr


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, *options: str) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.execve(
                sys.executable, [sys.executable, "-m", "nanovllm", *CHAT, *options], ENVIRONMENT | {"TERM": "dumb"}
            )
        self.rest = ""  # what has been shown and not looked at

    def read_until(self, text: str) -> str:
        """What is shown from here on until `text`, which is left out."""
        deadline = time.monotonic() + 30
        while text not in self.rest:
            assert time.monotonic() < deadline, self.rest
            if select.select([self.descriptor], [], [], 0.1)[0]:
                self.rest += os.read(self.descriptor, 4096).decode().replace("\r", "")
        piece, _, self.rest = self.rest.partition(text)
        return piece

    def say(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait(self) -> int:
        deadline = time.monotonic() + 30
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_ctrl_c_ends_the_answer_and_not_the_program(llm):
    """At the prompt it ends the line; Ctrl-D ends the program."""
    terminal = Terminal("--params", '{"temperature": 0, "ignore_eos": true}')
    try:
        terminal.read_until("\n> ")
        terminal.say(f"{TABLE}\n")
        terminal.read_until("A block table")
        terminal.say("\x03")
        rest = terminal.read_until("\n> ")
        assert rest.endswith(" ...") and len(rest) < 4000
        terminal.say("half a line")
        terminal.read_until("half a line")
        time.sleep(0.5)  # Python's `input` misses a signal that comes just before it waits for the next key
        terminal.say("\x03")
        terminal.read_until("\n> ")
        terminal.say("/reset\n")
        terminal.read_until("\n> ")
        terminal.say(f"{SEQS}\n")
        terminal.read_until("max_num_seqs, 512 by default, is the largest number")
        terminal.say("\x03")
        terminal.read_until("\n> ")
        terminal.say("\x04")
        assert terminal.wait() == 0
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(terminal.pid, signal.SIGKILL)


# ---- bench ---------------------------------------------------------------------------------------------------------


def test_bench_runs_the_script():
    done = run("bench", "--model", "demo", "--num-seqs", "2", "--input-len", "4", "--output-len", "3")
    assert done.returncode == 0, done.stderr
    assert re.search(r"6 output tokens in [\d.]+ s", done.stdout)


def test_bench_without_the_sources(tmp_path, monkeypatch, capsys):
    """Also beside a script of that name that is another's."""
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    (tmp_path / "bench.py").write_text("raise SystemExit(3)")
    assert main(["bench"]) == 1
    assert "bench.py and tools/ are in the sources alone" in capsys.readouterr().err
