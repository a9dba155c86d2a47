"""Random requests, aborts and interrupts on random engines: every request must end exactly once, and nothing be lost.

    python tests/soak.py --seconds 600 --ranks 2 --seed 0

Prints a summary; the exit status is 1 after a violation, which it names together with the options of the engine.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from integrity import check_integrity

import nanovllm.demo
from nanovllm import LLM, SamplingParams
from nanovllm.sampling_params import RequestOutputKind

VOCAB_SIZE = 3328  # that of the demo's tokenizer
STOPS = ["a", "e", "th", "\n", "zq", "�"]
PARTS = {"token_ids": [], "text": "", "logprobs": []}  # of a sample that may come piece by piece
DEMO = Path(nanovllm.demo.__file__).parent


class Violation(Exception):
    """The engine broke a promise."""


def require(condition: bool, promise: str) -> None:
    if not condition:
        raise Violation(promise)


def make_checkpoint(folder: Path) -> None:
    """A random model that babbles in the demo's tokens."""
    from checkpoints import SHAPE, Checkpoint
    from transformers import Qwen3Config

    Checkpoint(Qwen3Config(**SHAPE | {"vocab_size": VOCAB_SIZE}), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)


class Soak:
    """One run: the random source, the counts, and what greedy requests answered before."""

    def __init__(self, folder: str, ranks: int, stages: int, seed: int) -> None:
        self.folder = folder
        self.ranks = ranks
        self.stages = stages
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.answers: dict[tuple, list[int]] = {}
        self.bases = [self.tokens(300) for _ in range(4)]
        self.is_armed = False
        self.timed: set[int] = set()  # of the engine's requests, those that have a deadline
        self.options: dict = {}
        signal.signal(signal.SIGINT, self.on_interrupt)

    def tokens(self, length: int) -> list[int]:
        return [self.random.randrange(2, VOCAB_SIZE) for _ in range(length)]

    # ---- interrupts -----------------------------------------------------------------------------------------------

    def on_interrupt(self, number: int, frame: object) -> None:
        """A late signal hits nothing, as it would not come from a user who sees the prompt again."""
        if self.is_armed:
            self.is_armed = False
            raise KeyboardInterrupt

    @contextmanager
    def interrupted(self, probability: float):
        """Sometimes sends Ctrl-C while the block runs, at times more than one."""
        is_over = threading.Event()
        delays = [self.random.expovariate(8)] + [self.random.expovariate(200)] * self.random.choice([0, 0, 0, 1, 4])

        def send() -> None:
            for delay in delays:
                if not is_over.wait(delay):
                    os.kill(os.getpid(), signal.SIGINT)

        sender = threading.Thread(target=send)
        self.is_armed = self.random.random() < probability
        if self.is_armed:
            sender.start()
        try:
            yield
        finally:
            self.is_armed = False
            is_over.set()
            if sender.ident is not None:
                sender.join()

    # ---- requests -------------------------------------------------------------------------------------------------

    def draw_prompt(self) -> list[int]:
        limit = self.options["max_model_len"] - 1
        if self.random.random() < 0.2:  # what drafts can be looked up in
            return (self.tokens(self.random.choice([1, 3, 7])) * 40)[: self.random.randint(1, limit)]
        if self.random.random() < 0.7:
            shared = self.random.choice(self.bases)[: self.random.choice([16, 40, 64, 100, 200, 300])]
            return (shared + self.tokens(self.random.choice([0, 0, 1, 5, 20])))[:limit]
        return self.tokens(self.random.randint(1, min(limit, 80)))

    def draw_params(self) -> SamplingParams:
        pick = self.random.choice
        temperature = pick([0, 0, 0.7, 1.0, 5.0])
        return SamplingParams(
            temperature=temperature,
            n=pick([1, 1, 2, 3]) if temperature else 1,
            top_k=pick([-1, -1, 1, 20]),
            top_p=pick([1.0, 1.0, 0.9]),
            min_p=pick([0.0, 0.0, 0.1]),
            max_tokens=pick([1, 2, 3, 8, 20, 60]),
            ignore_eos=pick([False, True]),
            seed=pick([None, 1, 2]),
            stop=pick([None, None, pick(STOPS), STOPS[:3]]),
            stop_token_ids=pick([None, None, [5, 6, 7]]),
            logprobs=pick([None, None, None, 0, 3]),
            output_kind=pick(list(RequestOutputKind)),
        )

    def draw_requests(self, most: int) -> tuple[list[list[int]], list[SamplingParams]]:
        number = self.random.randint(1, most)
        self.counts["requests"] += number
        return [self.draw_prompt() for _ in range(number)], [self.draw_params() for _ in range(number)]

    def check_samples(self, prompt: list[int], params: SamplingParams, samples: list[dict]) -> None:
        require(len(samples) == params.n, f"{params.n} samples, not {len(samples)}")
        for sample in samples:
            self.check_sample(prompt, params, sample)
        self.counts["finished"] += 1

    def check_sample(self, prompt: list[int], params: SamplingParams, result: dict) -> None:
        tokens, room = result["token_ids"], self.options["max_model_len"] - len(prompt)
        require(result["finish_reason"] in ("stop", "length"), f"a finish reason, not {result['finish_reason']!r}")
        if params.logprobs is not None:
            require([next(iter(entry)) for entry in result["logprobs"]] == tokens, "a logprob of each token")
        require(1 <= len(tokens) <= min(params.max_tokens, room), f"1 to {params.max_tokens} tokens, not {tokens}")
        if result["finish_reason"] == "length":
            require(len(tokens) == min(params.max_tokens, room), f"all tokens up to the limit, not {tokens}")
        require(not any(stop in result["text"] for stop in params.stop), f"no stop string in {result['text']!r}")
        if params.temperature == 0:  # what was computed in between must not show
            key = (tuple(prompt), params.max_tokens, room, params.ignore_eos, params.stop, params.stop_token_ids)
            require(self.answers.setdefault(key, tokens) == tokens, f"{self.answers[key]} again, not {tokens}")

    # ---- rounds ---------------------------------------------------------------------------------------------------

    def generate(self, llm: LLM) -> None:
        prompts, params = self.draw_requests(most=12)
        first = llm.num_seqs
        try:
            with self.interrupted(0.5):
                results = self.random.choice([self.complete, self.iterate])(llm, prompts, params)
        except KeyboardInterrupt:
            self.counts["interrupts"] += 1
            self.counts["aborted"] += len(prompts)
            left = [i for i in (*llm.requests, *llm.requests.results, *llm.requests.progressed) if i >= first]
            require(llm.failure is not None or not left, f"nothing left of an interrupted call, not {left}")
            return
        for prompt, param, result in zip(prompts, params, results, strict=True):
            require(result["finished"] and "error" not in result, f"a result, not {result}")
            self.counts["accepted drafts"] += result["num_accepted_tokens"]
            self.check_samples(prompt, param, result["outputs"])

    def complete(self, llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[dict]:
        return llm.generate(prompts, params, use_tqdm=False)

    def iterate(self, llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[dict]:
        with closing(llm.generate_iter(iter(prompts), iter(params))) as pairs:
            results = dict(pairs)
        return [results[index] for index in range(len(prompts))]

    def refuse(self, llm: LLM) -> None:
        prompts, params = self.draw_requests(most=4)
        bad = self.random.choice([[], [VOCAB_SIZE], [-1], [1.5], None, [3] * self.options["max_model_len"]])
        prompts[self.random.randrange(len(prompts))] = bad
        before = llm.num_seqs, len(llm.scheduler.waiting)
        try:
            llm.generate(prompts, params, use_tqdm=False)
        except (TypeError, ValueError):
            self.counts["refused"] += len(prompts)
        else:
            raise Violation(f"{bad!r:.50} refused")
        require((llm.num_seqs, len(llm.scheduler.waiting)) == before, "nothing queued of a refused list")

    def drive(self, llm: LLM) -> None:
        """Requests that come and go between steps."""
        prompts, params = self.draw_requests(most=20)
        todo, asked, ended, so_far = list(zip(prompts, params, strict=True)), {}, set(), {}
        while todo or not llm.is_finished():
            for _ in range(self.random.choice([0, 0, 1, 3])):
                if todo:
                    prompt, param = todo.pop()
                    has_priorities = self.options["scheduling_policy"] == "priority"
                    priority = self.random.choice([-1, 0, 5]) if has_priorities else 0
                    timeout = self.random.choice([None, None, None, 0.0, 0.02])
                    number = llm.add_request(prompt, param, priority=priority, timeout=timeout)
                    asked[number] = prompt, param
                    if timeout is not None:
                        self.timed.add(number)
            if asked and self.random.random() < 0.1:
                request_id = self.random.choice(list(asked))
                if request_id in llm.requests:
                    ended.add(request_id)
                    self.counts["aborted"] += 1
                llm.abort_request(request_id)
            self.step(llm, asked, ended, so_far)
            check_integrity(llm.scheduler)
        require(ended == set(asked), f"an end of {set(asked) - ended}")

    def step(
        self, llm: LLM, asked: dict[int, tuple[list[int], SamplingParams]], ended: set[int], so_far: dict[int, list]
    ) -> None:
        """Makes a step and checks what it hands out of the requests `asked`; `ended` and `so_far` grow by it.

        `ended` has the requests that finished or were aborted, `so_far` the samples of each as they were before.
        """
        for output in llm.step():
            request_id = int(output["request_id"])
            require(request_id in asked and request_id not in ended, f"one end of request {request_id}, not two")
            prompt, params = asked[request_id]
            is_finished = all(sample["finish_reason"] is not None for sample in output["outputs"])
            require(output["finished"] == is_finished and "error" not in output, f"a result, not {output}")
            require(is_finished or params.output_kind is not RequestOutputKind.FINAL_ONLY, "the end only")
            before = so_far.get(request_id, [PARTS] * params.n)
            so_far[request_id] = [dict(sample) for sample in output["outputs"]]
            for old, new in zip(before, so_far[request_id], strict=True):
                if params.output_kind is RequestOutputKind.DELTA:
                    new |= {name: old[name] + new[name] for name in PARTS if new[name] is not None}
                require(new["token_ids"][: len(old["token_ids"])] == old["token_ids"], "tokens that stay")
                # What is the beginning of a stop string is text until the rest has come.
                require(bool(params.stop) or new["text"].startswith(old["text"]), "text that stays")
            if is_finished:
                ended.add(request_id)
                if any(sample["finish_reason"] == "timeout" for sample in so_far[request_id]):
                    require(request_id in self.timed, f"request {request_id} without a deadline")
                    self.counts["timed out"] += 1
                else:
                    self.check_samples(prompt, params, so_far[request_id])

    def stream(self, llm: LLM) -> None:
        """A stream beside queued requests, read to its end, given up or interrupted."""
        self.counts["requests"] += 1
        others, params = self.draw_requests(most=4)
        asked = {llm.add_request(*request): request for request in zip(others, params, strict=True)}
        most = self.random.choice([1, 3, 10**6])
        try:
            with self.interrupted(0.3):
                pieces = llm.stream(self.draw_prompt(), replace(self.draw_params(), n=1))
                is_over = all(number < most for number, _ in enumerate(pieces, start=1))
                pieces.close()
            self.counts["finished" if is_over else "aborted"] += 1
        except KeyboardInterrupt:
            self.counts["interrupts"] += 1
            self.counts["aborted"] += 1
        pieces = None  # ends one that was interrupted outside of the engine
        if llm.failure is not None:
            self.counts["aborted"] += len(asked)
            return
        ended, so_far = set(), {}
        while not llm.is_finished():
            self.step(llm, asked, ended, so_far)
        require(ended == set(asked), f"results of {set(asked)}, not {ended}")

    def check_idle(self, llm: LLM) -> None:
        manager = llm.scheduler.block_manager
        check_integrity(llm.scheduler)
        require(llm.is_finished() and llm.scheduler.is_finished() and not llm.requests.progressed, "no request left")
        require(len(manager.free_block_ids) == len(manager.blocks), "all blocks free")
        require(len(llm.scheduler.free_rows) == llm.config.max_num_seqs, "all rows free")

    def check_dead(self, llm: LLM) -> None:
        """Only a second Ctrl-C within a step ends an engine."""
        require("KeyboardInterrupt" in llm.failure, f"an engine that lives, not {llm.failure}")
        require(not llm.ranks.processes, "no process left of a dead engine")
        self.counts["engines ended by a second interrupt"] += 1

    def engine(self, rounds: int, deadline: float) -> None:
        """A random engine for some rounds."""
        pick = self.random.choice
        block_size, max_model_len = pick([16, 32, 64]), pick([64, 130, 256])
        self.options = {
            "max_model_len": max_model_len,
            "kvcache_block_size": block_size,
            "num_kvcache_blocks": -(-max_model_len // block_size) + pick([0, 1, 3, 10, 100]),
            "max_num_batched_tokens": pick([1, 7, 16, 50, 4096]),
            "long_prefill_token_threshold": pick([0, 0, 5, 30]),
            "max_num_seqs": pick([1, 2, 5, 16]),
            "enable_prefix_caching": pick([True, True, False]),
            "async_scheduling": pick([True, True, False]),
            "scheduling_policy": pick(["fcfs", "priority"]),
            "tensor_parallel_size": self.ranks,
            "pipeline_parallel_size": self.stages,
        }
        num_drafts = pick([0, 0, 1, 4, 10]) if self.stages == 1 else 0
        if 0 < num_drafts < self.options["max_num_batched_tokens"]:
            lookup = {"prompt_lookup_max": pick([1, 3]), "prompt_lookup_min": 1}
            drafter = pick([{"method": "ngram"} | lookup, {"method": "ngram"} | lookup, {"model": self.folder}])
            self.options["speculative_config"] = {"num_speculative_tokens": num_drafts} | drafter
        self.counts["engines"] += 1
        self.timed = set()
        with LLM(self.folder, device="cpu", **self.options) as llm:
            for _ in range(rounds):
                if time.monotonic() > deadline:
                    break
                self.counts["rounds"] += 1
                pick([self.generate, self.generate, self.refuse, self.drive, self.stream])(llm)
                if llm.failure is not None:
                    self.check_dead(llm)
                    break
                self.check_idle(llm)
                if self.random.random() < 0.05:
                    llm.reset_prefix_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--ranks", type=int, default=1, help="of each stage")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder))
        soak = Soak(folder, arguments.ranks, arguments.stages, arguments.seed)
        start = time.monotonic()
        try:
            while (now := time.monotonic()) - start < arguments.seconds:
                rounds = 20 * arguments.ranks * arguments.stages
                soak.engine(rounds, deadline=min(now + 60, start + arguments.seconds))
            counts = soak.counts
            ended = counts["finished"] + counts["aborted"] + counts["refused"] + counts["timed out"]
            require(ended == counts["requests"], f"{counts['requests']} ends, not {ended}")
        except Exception:
            traceback.print_exc()
            print(f"VIOLATION with seed {arguments.seed}, {soak.options}", file=sys.stderr)
            return 1
        finally:
            counts = ", ".join(f"{number} {name}" for name, number in sorted(soak.counts.items()))
            print(
                f"soak: {time.monotonic() - start:.0f} s, {arguments.ranks} ranks, {arguments.stages} stages: {counts}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
