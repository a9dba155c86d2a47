"""What Ray Data makes actors of; and, where Ray is installed, two of them on a local cluster, one of them killed."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nanovllm.demo
from nanovllm import LLM, SamplingParams
from nanovllm.ray import Predictor

DEMO = str(Path(nanovllm.demo.__file__).parent)
ROOT = Path(__file__).parents[1]
QUESTIONS = [json.loads(line)["question"] for line in Path(DEMO, "questions.jsonl").read_text().splitlines()]
GREEDY = SamplingParams(temperature=0, max_tokens=12)
OPTIONS = {"device": "cpu", "max_model_len": 256, "max_num_seqs": 8}
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra .[ray]")


@pytest.fixture(scope="module")
def predictor():
    predictor = Predictor(DEMO, GREEDY, **OPTIONS)
    yield predictor
    predictor.llm.close()


def column(*values: object) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


@pytest.fixture(scope="module")
def want():
    """The answers to all questions, as prompts and as conversations."""
    with LLM(DEMO, **OPTIONS) as llm:
        texts = [result.text for result in llm.generate(QUESTIONS, GREEDY, use_tqdm=False)]
        conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
        return texts, [result.text for result in llm.chat(conversations, GREEDY, use_tqdm=False)]


# ---- without Ray ---------------------------------------------------------------------------------------------------


def test_rows_keep_their_columns_and_order(predictor, want):
    rows = {"id": np.arange(30), "prompt": column(*QUESTIONS[:30])}
    answers = predictor(rows)
    assert answers["id"].tolist() == list(range(30)) and answers["prompt"].tolist() == QUESTIONS[:30]
    assert answers["text"].tolist() == want[0][:30] and set(answers["error"]) == {""}
    assert set(answers["finish_reason"]) <= {"stop", "length"}
    assert answers["num_generated_tokens"].max() == 12 and answers["num_prompt_tokens"].min() > 0
    assert predictor({"prompt": column()})["text"].tolist() == []


def test_prompts_of_every_form(predictor, want):
    """Token ids, and conversations with what Arrow makes of them: arrays, and None where a message lacks a field."""
    token_ids = predictor.llm.tokenizer.encode(QUESTIONS[0])
    message = {"role": "user", "content": QUESTIONS[1], "name": None, "tool_calls": None}
    answers = predictor({"prompt": column(np.array(token_ids), token_ids, column(message), [message])})
    assert answers["text"].tolist() == [want[0][0]] * 2 + [want[1][1]] * 2


def test_a_bad_row_says_what_is_wrong(predictor, want):
    bad = column("", None, 5, [10**6], [5] * 300, [{"content": "Hello"}], QUESTIONS[0])
    answers = predictor({"prompt": bad})
    assert answers["text"].tolist() == [""] * 6 + [want[0][0]]
    assert answers["finish_reason"].tolist()[:6] == ["error"] * 6 and answers["error"][6] == ""
    matches = (
        "must have tokens",
        "must be a string",
        "must be a string",
        "between 0 and",
        "max_model_len=256",
        "role",
    )
    assert all(match in error for match, error in zip(matches, answers["error"], strict=False))


def test_bad_arguments():
    with pytest.raises(ValueError, match="a row has one text, got n=2"):
        Predictor(DEMO, SamplingParams(n=2), **OPTIONS)
    with pytest.raises(TypeError, match="unknown option 'colum'"):
        Predictor(DEMO, GREEDY, colum="text", **OPTIONS)


def test_another_column(predictor):
    with pytest.raises(KeyError, match="prompt"):
        predictor({"question": column("Hello")})


def test_parameters_reach_other_machines():
    assert pickle.loads(pickle.dumps(GREEDY)) == GREEDY


# ---- with Ray ------------------------------------------------------------------------------------------------------


class Killed(Predictor):
    """Of all its actors one kills itself once, when it has computed its first batch."""

    def __init__(self, marker: str, *args, **options) -> None:
        super().__init__(*args, **options)
        self.marker = marker

    def __call__(self, rows):
        answers = super().__call__(rows)
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return {**answers, "pid": np.full(len(answers["text"]), os.getpid())}
        Path(self.marker).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def environment():
    """What processes of Ray must be told: where the tests and the package are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


@needs_ray
@pytest.mark.timeout(120)
def test_a_killed_actor_loses_and_doubles_no_row(environment, tmp_path, want):
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        rows = [{"id": index, "prompt": question} for index, question in enumerate(QUESTIONS)]
        marker = str(tmp_path / "killed")
        answers = ray.data.from_items(rows, override_num_blocks=12).map_batches(
            Killed,
            fn_constructor_kwargs={"marker": marker, "model": DEMO, "sampling_params": GREEDY} | OPTIONS,
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=0,
            batch_size=16,
        )
        answers.write_parquet(str(tmp_path / "answers"))
        found = ray.data.read_parquet(str(tmp_path / "answers")).take_all()
    finally:
        ray.shutdown()
    assert sorted(row["id"] for row in found) == list(range(len(QUESTIONS)))
    assert all(row["text"] == want[0][row["id"]] for row in found)
    killed, pids = int(Path(marker).read_text()), {row["pid"] for row in found}
    assert killed not in pids and len(pids) == 2, "its place was taken by another"


@needs_ray
@pytest.mark.timeout(120)
def test_the_example(environment, tmp_path, want):
    """Conversations in, Parquet out."""
    with open(tmp_path / "in.jsonl", "w") as file:
        for index, question in enumerate(QUESTIONS[:40]):
            messages = [{"role": "user", "content": question}]
            file.write(json.dumps({"id": index, "messages": messages}) + "\n")
    command = [sys.executable, "examples/ray_batch.py", tmp_path / "in.jsonl", tmp_path / "out", "--model", DEMO]
    command += ["--column", "messages", "--num-engines", "2", "--num-gpus", "0", "--batch-size", "16"]
    command += ["--options", json.dumps(OPTIONS), "--params", '{"temperature": 0, "max_tokens": 12}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "answers to 40 rows" in done.stdout
    import pyarrow.parquet

    found = pyarrow.parquet.read_table(tmp_path / "out").to_pylist()
    assert {row["id"]: row["text"] for row in found} == dict(enumerate(want[1][:40])) and len(found) == 40
