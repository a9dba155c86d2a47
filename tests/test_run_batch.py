"""Batches in files: each line answered once, whatever is wrong with it, and whatever ends a run."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from engines import check_idle

import nanovllm.demo
from nanovllm import LLM, SamplingParams
from nanovllm.batch import files
from nanovllm.batch.files import ResultFile, find_todo
from nanovllm.batch.iterate import LOOK_AHEAD
from nanovllm.cli.main import main

pytest.importorskip("pydantic", reason="needs pydantic, which the extra [batch] brings")
from nanovllm.batch.run_batch import Counts, run_batch

DEMO = Path(nanovllm.demo.__file__).parent
QUESTIONS = [json.loads(line)["question"] for line in (DEMO / "questions.jsonl").read_text().splitlines()]
OPTIONS = {"device": "cpu", "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8}
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def llm():
    with LLM(str(DEMO), **OPTIONS) as llm:
        yield llm
        check_idle(llm)


@pytest.fixture
def files_of(tmp_path):
    """Writes a file of requests; returns its path and that of the results."""

    def write(*lines: dict | str | bytes) -> tuple[Path, Path]:
        as_bytes = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
                    for line in lines]  # fmt: skip
        (tmp_path / "in.jsonl").write_bytes(b"\n".join(as_bytes) + b"\n")
        return tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    return write


def chat(custom_id: str, question: str = "What is a block table?", **body) -> dict:
    messages = [{"role": "user", "content": question}]
    body = {"model": "demo", "messages": messages, "max_tokens": 12} | GREEDY | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion(custom_id: str, prompt: object, **body) -> dict:
    body = {"model": "demo", "prompt": prompt, "max_tokens": 12} | GREEDY | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def read(path: Path) -> list[dict]:
    """The lines of a file of results, all of which must be whole."""
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def answers(path: Path) -> dict[str, str]:
    """The texts by custom_id; each line must have been answered once."""
    found = {}
    for record in read(path):
        assert record["error"] is None and record["response"]["status_code"] == 200
        (choice,) = record["response"]["body"]["choices"]
        assert record["custom_id"] not in found
        found[record["custom_id"]] = choice["message"]["content"] if "message" in choice else choice["text"]
    return found


def errors(path: Path) -> dict[str | None, str]:
    found = {}
    for record in read(path):
        if record["error"] is not None:
            assert record["response"]["status_code"] in (400, 404, 500)
            error = record["response"]["body"]["error"]
            assert error["message"] == record["error"]["message"] and error["type"] == record["error"]["code"]
            found[record["custom_id"] or record["id"]] = error["message"]
    return found


# ---- answers -------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_engine(llm, files_of):
    paths = files_of(
        *(chat(f"chat {index}", question) for index, question in enumerate(QUESTIONS[:20])),
        *(completion(f"text {index}", question) for index, question in enumerate(QUESTIONS[:20])),
    )
    assert run_batch(llm, *paths, "demo", use_tqdm=False) == Counts(0, 40, 0)
    params = SamplingParams(temperature=0, max_tokens=12)
    chats = llm.chat([[{"role": "user", "content": question}] for question in QUESTIONS[:20]], params, use_tqdm=False)
    texts = llm.generate(QUESTIONS[:20], params, use_tqdm=False)
    want = {f"chat {index}": result.text for index, result in enumerate(chats)}
    want |= {f"text {index}": result.text for index, result in enumerate(texts)}
    assert answers(paths[1]) == want
    usage = {record["custom_id"]: record["response"]["body"]["usage"] for record in read(paths[1])}
    assert usage["text 3"]["prompt_tokens"] == len(texts[3].prompt_token_ids)
    for index, result in enumerate(texts):
        assert usage[f"text {index}"]["completion_tokens"] == len(result.token_ids)
    assert max(len(result.token_ids) for result in texts) == 12


def test_samples_prompts_and_logprobs(llm, files_of):
    paths = files_of(
        chat("samples", n=3, temperature=1.0, seed=5, logprobs=True, top_logprobs=2),
        completion("prompts", ["The scheduler", [40, 41], "A block"], logprobs=1),
    )
    assert run_batch(llm, *paths, "demo", use_tqdm=False) == Counts(0, 2, 0)
    bodies = {record["custom_id"]: record["response"]["body"] for record in read(paths[1])}
    messages = [{"role": "user", "content": "What is a block table?"}]
    (want,) = llm.chat(messages, SamplingParams(n=3, seed=5, max_tokens=12), use_tqdm=False)
    choices = bodies["samples"]["choices"]
    assert [choice["message"]["content"] for choice in choices] == [output.text for output in want.outputs]
    assert all(len(entry["top_logprobs"]) == 2 for choice in choices for entry in choice["logprobs"]["content"])
    greedy = SamplingParams(temperature=0, max_tokens=12)
    want = llm.generate(["The scheduler", [40, 41], "A block"], greedy, use_tqdm=False)
    assert [choice["text"] for choice in bodies["prompts"]["choices"]] == [result.text for result in want]
    assert all("".join(choice["logprobs"]["tokens"]) == choice["text"] for choice in bodies["prompts"]["choices"])


def test_results_are_written_as_they_finish(llm, files_of):
    paths = files_of(chat("long", max_tokens=60, ignore_eos=True), *(chat(f"{i}", max_tokens=1) for i in range(9)))
    run_batch(llm, *paths, "demo", use_tqdm=False)
    assert read(paths[1])[-1]["custom_id"] == "long"


def test_no_more_lines_are_held_than_are_needed(llm, files_of, monkeypatch):
    """Neither are all read before the first is answered."""
    paths = files_of(*(chat(f"{index}", max_tokens=1 + index % 3) for index in range(150)))
    num_written, num_ahead, most = [0], [], LOOK_AHEAD * OPTIONS["max_num_seqs"]
    write, read_requests = ResultFile.write, files.read_requests

    def counted_write(self, record):
        num_written[0] += 1
        write(self, record)

    def counted_read(path):
        for number, line in read_requests(path):
            num_ahead.append(number - num_written[0])
            assert len(llm.requests) <= most
            yield number, line

    monkeypatch.setattr(ResultFile, "write", counted_write)
    monkeypatch.setattr("nanovllm.batch.run_batch.read_requests", counted_read)
    assert run_batch(llm, *paths, "demo", use_tqdm=False).num_answered == 150
    assert max(num_ahead) <= most


# ---- bad lines -----------------------------------------------------------------------------------------------------

BAD = {
    "batch_req_1": (b"{torn", "line 1: it is no JSON"),
    "batch_req_2": (b"[]", "line 2: it must be a JSON object"),
    "batch_req_3": (b"\xff\xfe", "line 3: it is no JSON"),
    "batch_req_4": (json.dumps({"method": "POST"}).encode(), "line 4: custom_id must be a string, got None"),
    "batch_req_5": (chat(5), "line 5: custom_id must be a string, got 5"),
    "method": (chat("method") | {"method": "GET"}, "line 6: method must be POST, got 'GET'"),
    "url": (chat("url") | {"url": "/v1/embeddings"}, "line 7: url must be one of /v1/completions, /v1/chat"),
    "list url": (chat("list url") | {"url": []}, "line 8: url must be one of"),
    "field": (chat("field") | {"priority": 1}, "line 9: unknown field 'priority'"),
    "body": (chat("body") | {"body": "text"}, "line 10: the body must be an object"),
    "model": (chat("model", model="gpt-4o"), "line 11: the model 'gpt-4o' does not exist, only 'demo'"),
    "unknown": (chat("unknown", temprature=1), "line 12: temprature is not supported"),
    "stream": (chat("stream", stream=True), "line 13: stream=true is not served in a batch"),
    "range": (chat("range", top_p=2), "line 14: top_p must be"),
    "messages": (chat("messages", messages={"role": "user"}), "line 15: messages: "),
    "role": (chat("role", messages=[{"content": "Hi"}]), "line 16: a message must be a dict with a role"),
    "image": (chat("image", messages=[{"role": "user", "content": [{"type": "image"}]}]), "line 17: the model takes"),
    "long": (completion("long", [5] * 300), "line 18: a prompt must have fewer tokens"),
    "one of them": (completion("one of them", ["good", [10**6]]), "line 19: a prompt's token ids must be"),
    "priority": (chat("priority", priority=3), "line 20: priority=3 needs LLM"),
    "deep": (b'{"custom_id": "deep", "body": ' + b"[" * 10**5, "line 21: it is no JSON"),
    "kwargs": (chat("kwargs", chat_template_kwargs=5), "line 22: chat_template_kwargs: "),
}  # fmt: skip


def test_a_bad_line_gets_an_error_and_the_others_go_on(llm, files_of):
    lines = [line for line, _ in BAD.values()]
    paths = files_of(*lines, chat("good"), b"  ", chat("good"), chat("last"))
    assert run_batch(llm, *paths, "demo", use_tqdm=False) == Counts(0, 2, len(BAD) + 1)
    found = errors(paths[1])
    repeated = "line 25: custom_id 'good' is that of an earlier line"
    want = {("batch_req_21" if name == "deep" else name): text for name, (_, text) in BAD.items()}
    want["batch_req_25"] = repeated
    assert set(found) == set(want)
    for name, text in want.items():
        assert found[name].startswith(text), found[name]
    assert {record["custom_id"] for record in read(paths[1]) if record["error"] is None} == {"good", "last"}
    # All of these are done.
    assert run_batch(llm, *paths, "demo", resumes=True, use_tqdm=False) == Counts(len(BAD) + 3, 0, 0)
    assert len(read(paths[1])) == len(BAD) + 3


def test_a_request_that_fails_is_no_bad_line(llm, files_of, monkeypatch):
    """Its error is the server's."""
    paths = files_of(chat("a"), completion("b", ["x", "y"]))
    output = nanovllm.requests.request.Request.output

    def failing_output(self, tokenizer):
        result = output(self, tokenizer)
        if self.prompt == "y":
            result["error"] = "the logits are NaN"
        return result

    monkeypatch.setattr(nanovllm.requests.request.Request, "output", failing_output)
    assert run_batch(llm, *paths, "demo", use_tqdm=False) == Counts(0, 1, 1)
    assert errors(paths[1]) == {"b": "line 2: the logits are NaN"}
    (status,) = {record["response"]["status_code"] for record in read(paths[1]) if record["custom_id"] == "b"}
    assert status == 500


@pytest.mark.parametrize("content", [b"", b"\n\n"], ids=["nothing", "blank lines"])
def test_an_empty_file(llm, files_of, content):
    paths = files_of()
    paths[0].write_bytes(content)
    assert run_batch(llm, *paths, "demo", use_tqdm=False) == Counts(0, 0, 0)
    assert paths[1].read_bytes() == b""


def test_a_last_line_without_its_end(llm, files_of):
    paths = files_of()
    paths[0].write_text(json.dumps(chat("a")) + "\n" + json.dumps(chat("b")))
    run_batch(llm, *paths, "demo", use_tqdm=False)
    assert set(answers(paths[1])) == {"a", "b"}


# ---- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tail", [b"", b'{"id": "batch_req_9", "custom_id": "3', b"\0" * 50], ids=["whole", "torn", "zeros"]
)
def test_a_run_goes_on_where_it_stopped(llm, files_of, tail):
    """By custom_id: the lines may have been put into another order, and others added."""
    requests = [chat(f"{index}", question) for index, question in enumerate(QUESTIONS[:12])]
    paths = files_of(*requests)
    run_batch(llm, *paths, "demo", use_tqdm=False)
    want = answers(paths[1])
    kept = paths[1].read_bytes().splitlines(keepends=True)[:7]
    paths[1].write_bytes(b"".join(kept) + tail)
    more = [*requests[::-1], chat("new", QUESTIONS[20])]
    files_of(*more)
    with pytest.raises(ValueError, match=r"has something in it: resume the batch \(--resume\)"):
        run_batch(llm, *paths, "demo", use_tqdm=False)
    assert paths[1].read_bytes() == b"".join(kept) + tail
    assert run_batch(llm, *paths, "demo", resumes=True, use_tqdm=False) == Counts(7, 6, 0)
    found = answers(paths[1])
    assert found.pop("new") and found == want
    assert paths[1].read_bytes().startswith(b"".join(kept))


def test_resuming_what_is_not_there(llm, files_of):
    paths = files_of(chat("a"))
    assert run_batch(llm, *paths, "demo", resumes=True, use_tqdm=False) == Counts(0, 1, 0)


@pytest.mark.parametrize(
    "line",
    [b"text", b"[]", b'{"custom_id": "a"}', b'{"id": "x", "custom_id": null, "response": {}}', b'{"custom_id": 5}'],
)
def test_a_file_that_holds_something_else_is_left_alone(llm, files_of, line):
    paths = files_of(chat("a"))
    content = line + b"\n" + b"torn"
    paths[1].write_bytes(content)
    with pytest.raises(ValueError, match=r"line 1 of .*out.jsonl is no result of a batch"):
        run_batch(llm, *paths, "demo", resumes=True, use_tqdm=False)
    assert paths[1].read_bytes() == content


def test_requests_from_a_pipe_are_refused(llm, tmp_path):
    """The file is read twice, and a pipe would have nothing left."""
    reading, writing = os.pipe()
    try:
        with pytest.raises(ValueError, match=rf"/dev/fd/{reading} is read twice.*not a pipe"):
            run_batch(llm, f"/dev/fd/{reading}", tmp_path / "out.jsonl", "demo", use_tqdm=False)
    finally:
        os.close(reading)
        os.close(writing)
    assert not list(tmp_path.iterdir())


def test_no_requests_no_results(llm, tmp_path):
    with pytest.raises(FileNotFoundError):
        run_batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "demo", use_tqdm=False)
    assert not list(tmp_path.iterdir())


def test_many_lines_take_little_memory_and_time(tmp_path):
    """Of 200,000 lines, of which half are done."""
    path = tmp_path / "in.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps({"custom_id": str(number % 199_990)}) + "\n" for number in range(200_000))
    done = np.array([files.custom_name(f"{number}") for number in range(0, 200_000, 2)], dtype=np.uint64)
    start = time.monotonic()
    todo = find_todo(path, done)
    assert time.monotonic() - start < 20
    assert todo.num_requests == 200_000 and todo.num_done == todo.is_done.sum() == 99_995
    assert np.flatnonzero(todo.is_repeated).tolist() == list(range(199_990, 200_000))
    assert todo.is_done.nbytes + todo.is_repeated.nbytes == 400_000


# ---- what ends a run -----------------------------------------------------------------------------------------------


def command(paths: tuple[Path, Path], *options: str) -> list[str]:
    arguments = ["run-batch", "-i", str(paths[0]), "-o", str(paths[1]), "--model", "demo", "--device", "cpu"]
    return [sys.executable, "-m", "nanovllm", *arguments, "--max-model-len", "256", "--max-num-seqs", "4", *options]


def run_command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(*arguments, capture_output=True, text=True, timeout=120, env=environment, **options)


def many_chats(number: int) -> list[dict]:
    return [chat(f"{index}", QUESTIONS[index % 50], max_tokens=30) for index in range(number)]


@pytest.fixture(scope="module")
def want(llm):
    """The answers to `many_chats`."""
    conversations = [request["body"]["messages"] for request in many_chats(50)]
    results = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)
    return [result.text for result in results]


def check_answers(path: Path, number: int, want: list[str]) -> None:
    assert answers(path) == {f"{index}": want[index % 50] for index in range(number)}


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
    ids=lambda number: number.name,
)
def test_a_run_that_is_killed_loses_and_doubles_nothing(files_of, want, number):
    paths = files_of(*many_chats(80))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command(paths), env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not paths[1].exists() or paths[1].read_bytes().count(b"\n") < 10:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    num_before = paths[1].read_bytes().count(b"\n")
    assert 10 <= num_before < 80
    if number == signal.SIGINT:
        assert process.returncode == 130 and "the same command with --resume goes on" in stderr
        assert "Traceback" not in stderr
    done = run_command(command(paths, "--resume"))
    assert done.returncode == 0, done.stderr
    assert f"{80 - num_before} answered, 0 failed, {num_before} by an earlier run" in done.stdout
    check_answers(paths[1], 80, want)
    assert "80/80" in done.stderr, "the progress bar counts what was there"


def test_a_full_disk(files_of, want):
    """The results that were written are whole, the error says what to do, and resuming loses nothing."""
    paths = files_of(*many_chats(40))

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))  # which is in the middle of a line

    done = run_command(command(paths), preexec_fn=limit_files)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "File too large; the lines before are whole: make room and resume the batch (--resume)" in done.stderr
    num_before = len(read(paths[1]))
    assert 5 < num_before < 40
    done = run_command(command(paths, "--resume"))
    assert done.returncode == 0, done.stderr
    check_answers(paths[1], 40, want)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
def test_a_disk_that_was_full_before(llm, files_of):
    requests, _ = files_of(chat("a"), chat("b"))
    with pytest.raises(OSError, match="No space left on device; the lines before are whole"):
        run_batch(llm, requests, "/dev/full", "demo", use_tqdm=False)
    check_idle(llm)


def test_a_dead_engine(files_of):
    """What was written before is there."""
    paths = files_of(*many_chats(30))
    with LLM(str(DEMO), **OPTIONS | {"max_num_seqs": 2}) as llm:
        take_in, counts = llm._take_in, Counter()

        def failing_take_in(step):
            counts["steps"] += 1
            if counts["steps"] == 100:
                raise LookupError("the GPU fell off the bus")
            take_in(step)

        llm._take_in = failing_take_in
        with pytest.raises(RuntimeError, match="the GPU fell off the bus"):
            run_batch(llm, *paths, "demo", use_tqdm=False)
    assert 2 <= len(answers(paths[1])) < 30


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command(files_of, capsys):
    paths = files_of(chat("a"), chat("b", model="other"), chat("c", model="mine"))
    arguments = command(paths, "--served-model-name", "mine")[3:]
    assert main(arguments) == 0
    assert "1 answered, 2 failed" in capsys.readouterr().out
    assert set(errors(paths[1])) == {"a", "b"}
    assert main(arguments) == 1
    assert "has something in it: resume the batch (--resume)" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert "0 answered, 0 failed, 3 by an earlier run" in capsys.readouterr().out


def test_two_files_are_needed(files_of, capsys):
    requests, _ = files_of(chat("a"))
    assert main(command((requests, requests))[3:]) == 1
    assert "must be two files" in capsys.readouterr().err
    assert requests.read_bytes()


def test_a_tokenizer_is_needed(files_of, capsys):
    paths = files_of(chat("a"))
    assert main(command(paths, "--skip-tokenizer-init")[3:]) == 1
    assert "the model has no tokenizer" in capsys.readouterr().err and not paths[1].exists()
