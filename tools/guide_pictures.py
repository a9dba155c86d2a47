"""Draws the timelines of docs/guide from runs of the bundled demo on the CPU.

    python -m tools.guide_pictures

Which sequence does what in which step is the same on every machine (tests/test_guide.py compares it); times are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nanovllm.demo
from nanovllm import LLM, SamplingParams
from nanovllm.timeline.svg import draw_svg, step_seconds
from nanovllm.trace import Recorder

DEMO = Path(nanovllm.demo.__file__).parent
FOLDER = Path(__file__).parent.parent / "docs" / "guide" / "pictures"
NUM_RUNS = 5
GREEDY = SamplingParams(temperature=0, max_tokens=256)
SHARED = list(range(300, 396))  # 96 tokens: six blocks of 16


def questions() -> list[list[dict[str, str]]]:
    """Those that the demo can answer, as conversations."""
    return [[{"role": "user", "content": line["question"]}] for line in _lines()]


def answers() -> list[str]:
    """The demo's answers, in the order of the questions."""
    return [line["answer"] for line in _lines()]


def _lines() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def record(work: Callable[[LLM], Any], **options: Any) -> dict[str, Any]:
    """The run of an engine that does some work, with blocks of 16 tokens."""
    defaults = {"device": "cpu", "dtype": "float32", "kvcache_block_size": 16, "num_kvcache_blocks": 64}
    with LLM(str(DEMO), **({"max_model_len": 1024} | defaults | options)) as llm:
        recorder = Recorder(llm)
        work(llm)
    return recorder.run


def preemption() -> dict[str, Any]:
    """Twelve questions whose answers do not fit into the cache at once."""
    return record(
        lambda llm: llm.chat(questions()[2:14], GREEDY, use_tqdm=False),
        num_kvcache_blocks=24,
        max_model_len=300,
        max_num_batched_tokens=64,
    )


def shared_prefix(enable_prefix_caching: bool) -> dict[str, Any]:
    """Two waves of six prompts with the same first 96 tokens and 8 of their own."""

    def work(llm: LLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        for wave in range(2):
            prompts = [SHARED + list(range(400 + 10 * i, 408 + 10 * i)) for i in range(6 * wave, 6 * wave + 6)]
            llm.generate(prompts, params, use_tqdm=False)

    return record(work, enable_prefix_caching=enable_prefix_caching, max_num_batched_tokens=128)


def long_prompt(max_num_batched_tokens: int) -> dict[str, Any]:
    """Four answers under way when a prompt of 900 tokens comes, in front of step 8."""

    def work(llm: LLM) -> None:
        for index in range(4):
            llm.add_request([1, 292, 201, 319, 289 + index], SamplingParams(max_tokens=40, ignore_eos=True, seed=0))
        for _ in range(8):
            llm.step()
        llm.add_request(list(range(300, 1200)), SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        while llm.has_unfinished_requests():
            llm.step()

    return record(work, max_num_batched_tokens=max_num_batched_tokens, num_kvcache_blocks=128)


def overlap(async_scheduling: bool) -> dict[str, Any]:
    """Six questions, four at once: a row is free when its answer's end is seen."""
    asked = [conversation for conversation in questions() if len(conversation[0]["content"]) < 18][:6]
    return record(
        lambda llm: llm.chat(asked, GREEDY, use_tqdm=False), async_scheduling=async_scheduling, max_num_seqs=4
    )


PICTURES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "preemption": ("12 questions, a cache of 24 blocks of 16 tokens", preemption),
    "prefix_on": ("twice 6 prompts with 96 equal first tokens, prefix caching on", lambda: shared_prefix(True)),
    "prefix_off": ("twice 6 prompts with 96 equal first tokens, prefix caching off", lambda: shared_prefix(False)),
    "chunked": ("a prompt of 900 tokens among answers, at most 128 tokens a step", lambda: long_prompt(128)),
    "whole": ("a prompt of 900 tokens among answers, at most 2,048 tokens a step", lambda: long_prompt(2048)),
    "overlap_on": ("6 questions, 4 at once, steps overlapped", lambda: overlap(True)),
    "overlap_off": ("6 questions, 4 at once, steps one after the other", lambda: overlap(False)),
}


def main() -> None:
    """Writes all pictures; of several runs that which was disturbed the least."""
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name, (title, make) in PICTURES.items():
        run = min((make() for _ in range(NUM_RUNS)), key=lambda run: sum(step_seconds(run["steps"])))
        (FOLDER / f"{name}.svg").write_text(draw_svg(run, title), encoding="utf-8")
        print(name, len(run["steps"]), "steps")


if __name__ == "__main__":
    main()
