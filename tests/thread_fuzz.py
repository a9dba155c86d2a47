"""Random calls from several threads at once answer what the same calls answer one after the other.

    python tests/thread_fuzz.py --threads 8 --calls 200 --device cpu

Prints a summary; the exit status is 1 after a difference or if something is left over, which it names.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import SHAPE, Checkpoint
from integrity import check_integrity
from transformers import Qwen3Config

import nanovllm.demo
from nanovllm import LLM, SamplingParams
from nanovllm.sampling_params import RequestOutputKind

VOCAB_SIZE = 3328  # that of the demo's tokenizer
DEMO = Path(nanovllm.demo.__file__).parent
STOPS = [None, None, None, "e", ["th", "a"]]
KINDS = [RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY]


def make_checkpoint(folder: Path) -> None:
    """A random model that babbles in the demo's tokens, and can be asked through its chat template."""
    Checkpoint(Qwen3Config(**SHAPE | {"vocab_size": VOCAB_SIZE}), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)


def make_engine(folder: str, device: str = "cpu", **options: object) -> LLM:
    """An engine whose few blocks make requests preempt each other, and whose small steps cut prompts to pieces."""
    options = {"max_num_seqs": 12, "num_kvcache_blocks": 40, "max_num_batched_tokens": 100} | options
    return LLM(folder, device=device, dtype="float32", kvcache_block_size=16, max_model_len=200, **options)


@dataclass(frozen=True)
class Call:
    """One call of the engine, whose answer does not depend on other calls: greedy or with a seed."""

    kind: str
    prompts: list[Any]
    params: list[SamplingParams]


def answer(result: dict) -> tuple:
    return result["text"], result["token_ids"], result["finish_reason"]


class Caller:
    """Makes calls; what `step` hands out to one thread may be another's, so callers share it."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.handed_out: dict[int, dict] = {}
        self.kinds: dict[str, Callable[[Call], Any]] = {
            "generate": self.generate,
            "iterate": self.iterate,
            "chat": self.chat,
            "stream": self.stream,
            "abandon": self.abandon,
            "add": self.add,
            "abort": self.abort,
            "refuse": self.refuse,
        }

    def make(self, call: Call) -> Any:
        return self.kinds[call.kind](call)

    def generate(self, call: Call) -> Any:
        return [answer(result) for result in self.llm.generate(call.prompts, call.params, use_tqdm=False)]

    def iterate(self, call: Call) -> Any:
        results = dict(self.llm.generate_iter(iter(call.prompts), iter(call.params)))
        return [answer(results[index]) for index in range(len(call.prompts))]

    def chat(self, call: Call) -> Any:
        conversations = [[{"role": "user", "content": f"{prompt[-5:]}"}] for prompt in call.prompts]
        return [answer(result) for result in self.llm.chat(conversations, call.params, use_tqdm=False)]

    def stream(self, call: Call) -> Any:
        return "".join(self.llm.stream(call.prompts[0], call.params[0]))

    def abandon(self, call: Call) -> Any:
        stream = self.llm.stream(call.prompts[0], call.params[0])
        next(stream, None)
        stream.close()

    def add(self, call: Call) -> Any:
        ids = [self.llm.add_request(prompt, param) for prompt, param in zip(call.prompts, call.params, strict=True)]
        while not all(request_id in self.handed_out for request_id in ids):
            self.step()
        return [answer(self.handed_out.pop(request_id)) for request_id in ids]

    def step(self) -> None:
        """Keeps the results of what has finished, of the other threads' requests too."""
        for result in self.llm.step():
            if result["finished"]:
                self.handed_out[int(result["request_id"])] = result

    def abort(self, call: Call) -> Any:
        request_id = self.llm.add_request(call.prompts[0], call.params[0])
        self.step()
        self.llm.abort_request(request_id)
        assert request_id not in self.llm.requests
        self.step()  # hands out its result if it had ended before, by a step of another thread's
        self.handed_out.pop(request_id, None)

    def refuse(self, call: Call) -> Any:
        try:
            self.llm.generate([*call.prompts, [VOCAB_SIZE]], use_tqdm=False)
        except ValueError as error:
            return str(error)


def draw_call(draw: random.Random, bases: list[list[int]]) -> Call:
    """A call of any kind with one to four prompts, some of which share their beginning with others."""

    def draw_prompt() -> list[int]:
        shared = draw.choice(bases)[: draw.choice([0, 16, 48, 90])]
        return shared + [draw.randrange(2, VOCAB_SIZE) for _ in range(draw.randint(1, 20))]

    def draw_params() -> SamplingParams:
        how = (
            {"temperature": 0}
            if draw.random() < 0.6
            else {"seed": draw.randrange(100), "top_k": draw.choice([-1, 20])}
        )
        how |= {"stop": draw.choice(STOPS), "output_kind": draw.choice(KINDS)}
        return SamplingParams(max_tokens=draw.randint(1, 20), ignore_eos=True, **how)

    kind = draw.choice(["generate", "generate", "iterate", "chat", "stream", "abandon", "add", "abort", "refuse"])
    number = draw.randint(1, 4)
    return Call(kind, [draw_prompt() for _ in range(number)], [draw_params() for _ in range(number)])


def draw_calls(num_threads: int, num_calls: int, seed: int) -> list[list[Call]]:
    """The calls of each thread."""
    draw = random.Random(seed)
    bases = [[draw.randrange(2, VOCAB_SIZE) for _ in range(90)] for _ in range(3)]
    return [[draw_call(draw, bases) for _ in range(num_calls)] for _ in range(num_threads)]


def answer_in_threads(llm: LLM, calls: list[list[Call]]) -> list[list[Any]]:
    """The answers of all calls, each list of calls made by a thread of its own."""
    caller = Caller(llm)
    answers: list[list[Any]] = [[] for _ in calls]

    def work(index: int) -> None:
        for call in calls[index]:
            try:
                answers[index].append(caller.make(call))
            except BaseException as error:
                answers[index].append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def find_differences(want: list[list[Any]], got: list[list[Any]], calls: list[list[Call]]) -> list[str]:
    """A line for each call that was answered otherwise."""
    return [
        f"thread {thread}, call {number}: {call} gave {a!r}, not {b!r}"
        for thread, group in enumerate(calls)
        for number, call in enumerate(group)
        if (a := got[thread][number]) != (b := want[thread][number])
    ]


def check_nothing_left(llm: LLM) -> None:
    check_integrity(llm.scheduler)
    manager = llm.scheduler.block_manager
    if (
        not llm.is_finished()
        or llm.requests.progressed
        or llm.turns.asked
        or len(manager.free_block_ids) != len(manager.blocks)
    ):
        raise RuntimeError(f"requests {sorted(llm.requests)} are left, results {sorted(llm.requests.results)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    calls = draw_calls(arguments.threads, arguments.calls, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder))
        with make_engine(folder, arguments.device, gpu_memory_utilization=0.3) as llm:
            start = time.monotonic()
            want = [[Caller(llm).make(call) for call in group] for group in calls]
            between = time.monotonic()
            llm.reset_prefix_cache()
            got = answer_in_threads(llm, calls)
            end = time.monotonic()
            check_nothing_left(llm)
    differences = find_differences(want, got, calls)
    print(*differences[:10], sep="\n", end="\n" * bool(differences))
    number = f"{arguments.threads} threads x {arguments.calls} calls on {arguments.device}"
    print(f"{number}: {len(differences)} differences; {between - start:.0f} s in turn, {end - between:.0f} s at once")
    return bool(differences)


if __name__ == "__main__":
    sys.exit(main())
