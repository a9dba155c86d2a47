"""Random requests, batched in engines of every kind, give what each of them gives alone.

    python tests/params_fuzz.py --requests 5000 --seed 1 --device cuda --no-structured

Any parameter meets any other, in batches that preempt each other, cut prompts to pieces, hit cached prefixes, run on
one or two ranks, are generated at once or driven step by step. Alone means an engine of one row that does nothing of
that. Float32 sums depend on a batch's shape in their last bits, which may decide between two tokens: such a draw is
told from a wrong one by shaking the logits a little. Prints a summary; the exit status is 1 after a difference, which
it names, or where rounding decided more often than is credible.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from engines import Trace, check_idle
from sampling_oracle import random_params
from thread_fuzz import VOCAB_SIZE, make_checkpoint

from nanovllm import LLM, RequestError, SamplingParams
from nanovllm.kernels.sampling import unpack_token_ids
from nanovllm.kernels.sampling_torch import sample as draw_tokens
from nanovllm.outputs import Logprob, RequestOutput
from nanovllm.sampling.adjustments import bad_word_tokens
from nanovllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from nanovllm.text.detokenizer import REPLACEMENT
from nanovllm.text.tokenizer import Tokenizer

Entries = Sequence[dict[int, Logprob] | None] | None
MAX_LEN = 112
TOLERANCE = {"cpu": 1e-4, "cuda": 5e-4}  # of logprobs
MOST_ROUNDED = 0.002  # of the samples
NUM_SHAKES = 256
REQUESTS_OF_AN_ENGINE = {"cpu": 90, "cuda": 600}  # on a GPU, engines capture graphs of each kind of step
TWO_RANKS_AFTER = 8  # engines of one rank there is one of two, which take seconds to start
TWO_RANKS_REQUESTS = 3  # times as many has such an engine
ENDS = [1, 2, 40, 43]  # some of the tokens that end a text: by the checkpoint's files, and by the tokenizer's
STRUCTURES = [
    {"choice": ["yes", "no", "the end", "there"]},
    {"regex": r"[a-e]{2,6}"},
    {"regex": r"\d{1,3}(-\d\d)?"},
    {"json": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}},
    {"json": {"type": "array", "items": {"type": "integer"}, "maxItems": 3}, "disable_any_whitespace": True},
    {"json_object": True},
]


class Case(NamedTuple):
    """A request, and the number that the engine gave its first sample."""

    prompt: str | list[int]
    params: SamplingParams
    number: int


class Drawer:
    """Draws requests and engines."""

    def __init__(self, seed: str, tokenizer: Tokenizer, has_structures: bool) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        self.has_structures = has_structures
        self.bases = [self._tokens(80) for _ in range(3)]
        self.change_mood()

    def options(self) -> Iterator[dict[str, Any]]:
        """Options of engines without end: all combinations of one rank, and now and then one of two ranks."""
        while True:
            combinations = list(itertools.product([True, False], repeat=5))
            self.rng.shuffle(combinations)
            for number, (is_async, has_cache, has_few_blocks, has_small_steps, has_few_rows) in enumerate(
                combinations
            ):
                options = {
                    "async_scheduling": is_async,
                    "enable_prefix_caching": has_cache,
                    "num_kvcache_blocks": self.rng.choice([7, 10]) if has_few_blocks else 400,
                    "max_num_batched_tokens": self.rng.choice([6, 6, 12, 40]) if has_small_steps else 4096,
                    "max_num_seqs": self.rng.choice([2, 5]) if has_few_rows else 24,
                }
                yield options
                if number % TWO_RANKS_AFTER == TWO_RANKS_AFTER - 1:
                    yield options | {"tensor_parallel_size": 2}
                    yield options | {"pipeline_parallel_size": 2}

    def change_mood(self) -> None:
        """What the requests of a batch have in common, as evenly mixed ones rarely meet a batch of their own kind."""
        self.is_short = self.rng.random() < 0.5
        self.share_plain = self.rng.choice([0.0, 0.0, 0.3, 0.9])
        self.share_bound = self.rng.choice([0.0, 0.3, 0.3])

    def prompt(self) -> str | list[int]:
        """Some share their beginning with others, some are text, and some nearly as long as the model takes."""
        rng = self.rng
        if self.is_short:
            return self._tokens(rng.randint(1, 3))
        shared = rng.choice(self.bases)[: rng.choice([0, 0, 16, 32, 48, 64, 80])]
        prompt = shared + self._tokens(rng.choice([1, 2, 5, 16, 20, 37]))
        if rng.random() < 0.15:
            return self.tokenizer.decode(prompt[:50])  # tokens that are no characters become three each
        return prompt[: MAX_LEN - 1]

    def params(self) -> SamplingParams:
        """Anything that can be asked for; at times of a few tokens only, so that words and stops really come up."""
        rng = self.rng
        params = random_params(rng, rng.choice([3, 8, 8, 40, 70]))
        if rng.random() < self.share_plain:
            plain = SamplingParams(temperature=params.temperature, seed=params.seed, max_tokens=params.max_tokens)
            plain.top_k = rng.choice([-1, -1, params.top_k])
            return plain
        tokens = self._tokens(6)
        if rng.random() < 0.3:
            params.allowed_token_ids = [*tokens, rng.choice(ENDS)]
        elif rng.random() < 0.3:
            params.logit_bias = {token_id: rng.uniform(4, 30) for token_id in [*tokens, rng.choice(ENDS)]}
        if params.temperature > 0 and rng.random() < 0.2:
            params.n = rng.choice([2, 3])
        if rng.random() < 0.15:
            params.seed = None
        if rng.random() < 0.3:
            params.stop = [self._piece(self._words(tokens, 2)) for _ in range(rng.randint(1, 3))]
        elif rng.random() < 0.1:
            params.detokenize = False
        self._bind(params, tokens)
        params.include_stop_str_in_output = rng.random() < 0.3
        params.skip_special_tokens = rng.random() < 0.7
        params.spaces_between_special_tokens = rng.random() < 0.7
        params.output_kind = rng.choice(list(RequestOutputKind))
        params.truncate_prompt_tokens = rng.choice([None, None, None, None, -1, 3, 40])
        if rng.random() < 0.02:
            params.max_tokens = None
        params.check()
        return params

    def _bind(self, params: SamplingParams, tokens: list[int]) -> None:
        """Lets the next token depend on those before it: by bad words and structures. Few rule each other out."""
        rng = self.rng
        if rng.random() < 0.1:
            params.bad_words = [self._words(tokens, 1) for _ in range(rng.randint(1, 3))]
        if rng.random() < self.share_bound:
            params.bad_words = [self._words(tokens, rng.randint(1, 3)) for _ in range(rng.randint(1, 3))]
        if self.has_structures and rng.random() < self.share_bound:
            params.structured_outputs = rng.choice(STRUCTURES)
            params.allowed_token_ids = params.allowed_token_ids if rng.random() < 0.1 else None

    def _tokens(self, number: int) -> list[int]:
        return [self.rng.randrange(2, VOCAB_SIZE) for _ in range(number)]

    def _words(self, tokens: list[int], number: int) -> str:
        """The text of some of the tokens; never empty."""
        return self.tokenizer.decode([self.rng.choice(tokens) for _ in range(number)]) or "e"

    def _piece(self, text: str) -> str:
        """A few characters out of a text."""
        start = self.rng.randrange(len(text))
        return text[start : start + self.rng.randint(1, 4)]


def make_engine(folder: str, device: str, **options: Any) -> LLM:
    """A float32 engine; on a GPU as its users have it, with CUDA graphs."""
    options = {"device": device, "dtype": "float32", "kvcache_block_size": 16, "max_model_len": MAX_LEN} | options
    return LLM(folder, gpu_memory_utilization=0.3, **options)


# ---- batched ------------------------------------------------------------------------------------------------------


def generate(llm: LLM, prompts: list[str | list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
    """`LLM.generate`; the results of requests that fail are among the others'."""
    try:
        return llm.generate(prompts, params, use_tqdm=False)
    except RequestError as error:
        return error.results


def answer_at_once(llm: LLM, drawer: Drawer, number: int) -> list[tuple[Case, RequestOutput]]:
    """So many requests of one call, and their results."""
    cases, num_seqs = [], llm.num_seqs
    for _ in range(number):
        cases.append(Case(drawer.prompt(), drawer.params(), num_seqs))
        num_seqs += cases[-1].params.n
    results = generate(llm, [case.prompt for case in cases], [case.params for case in cases])
    return list(zip(cases, results, strict=True))


def answer_by_steps(llm: LLM, drawer: Drawer, number: int) -> list[tuple[Case, RequestOutput]]:
    """So many requests that come one after the other, and what `step` hands out of them; some are dropped."""
    rng, name = drawer.rng, 0
    cases: dict[str, Case] = {}
    outputs: dict[str, list[RequestOutput]] = {}
    aborted = set()
    while name < number or llm.has_unfinished_requests():
        for _ in range(rng.choice([0, 1, 1, 2, 6])):
            if name < number:
                case = cases[str(name)] = Case(drawer.prompt(), drawer.params(), llm.num_seqs)
                outputs[str(name)] = []
                llm.add_request(str(name), case.prompt, case.params)
                name += 1
        if name and rng.random() < 0.05:
            aborted.add(str(rng.randrange(name)))
            llm.abort_request(list(aborted))
        for output in llm.step():
            if output.request_id in aborted:
                raise AssertionError(f"{output} is handed out though it was aborted")
            outputs[output.request_id].append(output)
    finished = [key for key, parts in outputs.items() if parts and parts[-1].finished]
    if not set(outputs) - set(finished) <= aborted:
        raise AssertionError(f"no results of requests {set(outputs) - set(finished) - aborted}")
    return [(cases[key], joined(outputs[key], cases[key].params)) for key in finished]


def joined(parts: list[RequestOutput], params: SamplingParams) -> RequestOutput:
    """The result that the parts of a request make up, which were handed out one after the other."""
    last = parts[-1]
    if any(part.finished for part in parts[:-1]):
        raise AssertionError(f"{parts} are handed out behind the end")
    if params.output_kind is RequestOutputKind.FINAL_ONLY and len(parts) > 1:
        raise AssertionError(f"{parts} are handed out before the end")
    for index, completion in enumerate(last.outputs):
        samples = [part.outputs[index] for part in parts]
        if params.output_kind is RequestOutputKind.DELTA:
            completion.text = "".join(sample.text for sample in samples)
            completion.token_ids = [token_id for sample in samples for token_id in sample.token_ids]
            if params.logprobs is not None:
                completion.logprobs = [entry for sample in samples for entry in sample.logprobs]
        for sample in samples if params.output_kind is RequestOutputKind.CUMULATIVE else []:
            is_beginning = sample.token_ids == completion.token_ids[: len(sample.token_ids)]
            if not is_beginning or not completion.text.startswith(sample.text):
                raise AssertionError(f"{sample} is no beginning of {completion}")
    last.text, last.token_ids = last.outputs[0].text, last.outputs[0].token_ids
    return last


# ---- alone --------------------------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """The arguments of `AdjustedSampler.sample_whole` in a step of one row."""

    logits: torch.Tensor
    rows: torch.Tensor
    row_ints: torch.Tensor
    row_floats: torch.Tensor
    positions: torch.Tensor
    is_filtered: bool

    def may_give(self, token_id: int, tolerance: float) -> bool:
        """Whether this token might be drawn if the logits, or where a filter cuts, were a little different."""
        generator = torch.Generator(self.logits.device).manual_seed(0)

        def shaken(values: torch.Tensor, how_much: float) -> torch.Tensor:
            noise = torch.rand(values.shape, generator=generator, device=values.device)
            return values + how_much * (2 * noise - 1)

        ints, floats = (
            table[:, self.rows].repeat(1, NUM_SHAKES).contiguous() for table in (self.row_ints, self.row_floats)
        )
        is_inside = (floats[1:3] > 0) & (floats[1:3] < 1)  # a filter that is not used must not be
        floats[1:3] = torch.where(is_inside, shaken(floats[1:3], tolerance / 10), floats[1:3]).clamp(min=0)
        logits = shaken(self.logits.float().repeat(NUM_SHAKES, 1), tolerance)
        rows = torch.arange(NUM_SHAKES, device=logits.device)
        packed = draw_tokens(logits, rows, ints, floats, self.positions.repeat(NUM_SHAKES), 0, self.is_filtered)
        return bool((unpack_token_ids(packed) == token_id).any())


class Alone:
    """An engine of one row, which answers one sample after the other, and can say how near a draw was to another."""

    def __init__(self, folder: str, device: str) -> None:
        self.tolerance = TOLERANCE[device]
        self.llm = make_engine(
            folder,
            device,
            max_num_seqs=1,
            max_num_batched_tokens=4096,
            async_scheduling=False,
            enable_prefix_caching=False,
            enforce_eager=True,
            max_logprobs=-1,
            num_kvcache_blocks=8,
        )

    def answer(self, case: Case, index: int, **changes: int | None) -> RequestOutput:
        """What one sample of a request is alone, where its seed is what it is among the others."""
        params = case.params.clone()
        params.n = 1
        if index > 0:
            params.prompt_logprobs = None
        if params.seed is not None:
            params.seed += index
        for name, value in changes.items():
            setattr(params, name, value)
        self.llm.intake.num_seqs = case.number + index  # of which the seed is made otherwise
        return generate(self.llm, [case.prompt], [params])[0]

    def recount(self, case: Case, index: int) -> tuple[RequestOutput, list[Draw]]:
        """The same once more, with the logprobs of the whole vocabulary where any are asked for, and its draws."""
        draws: list[Draw] = []
        sampler = self.llm.ranks.runner.adjusted_sampler

        def recorded(*arguments: Any) -> torch.Tensor:
            draws.append(Draw(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)))
            return type(sampler).sample_whole(sampler, *arguments)

        sampler.sample_whole = recorded
        prompt_logprobs = -1 if index == 0 and case.params.prompt_logprobs is not None else None
        result = self.answer(case, index, logprobs=-1, prompt_logprobs=prompt_logprobs)
        del sampler.sample_whole
        return result, draws


# ---- comparison ---------------------------------------------------------------------------------------------------


def same_entries(got: Entries, want: Entries, tolerance: float) -> bool:
    """Whether logprobs have the same ids, ranks and texts in the same order, and nearly the same values."""
    if got is None or want is None:
        return got is want
    return len(got) == len(want) and all(
        x is y
        if x is None or y is None
        else list(x) == list(y)
        and all(
            abs(a.logprob - b.logprob) <= tolerance and a[1:] == b[1:]
            for a, b in zip(x.values(), y.values(), strict=True)
        )
        for x, y in zip(got, want, strict=True)
    )


def find_difference(got: RequestOutput, want: RequestOutput, index: int, tolerance: float) -> str | None:
    """In what one sample of a request is not what it is alone."""
    a, b = got.outputs[index], want.outputs[0]
    for name in ("token_ids", "finish_reason", "stop_reason", "text"):
        if a[name] != b[name]:
            return f"{name} {a[name]!r}, not {b[name]!r}"
    if not same_entries(a.logprobs, b.logprobs, tolerance):
        return f"logprobs {a.logprobs}, not {b.logprobs}"
    if index == 0 and not same_entries(got.prompt_logprobs, want.prompt_logprobs, tolerance):
        return f"prompt_logprobs {got.prompt_logprobs}, not {want.prompt_logprobs}"
    if (a.cumulative_logprob is None) != (b.cumulative_logprob is None) or (
        a.logprobs and abs(a.cumulative_logprob - b.cumulative_logprob) > tolerance * len(a.logprobs)
    ):
        return f"cumulative_logprob {a.cumulative_logprob}, not {b.cumulative_logprob}"
    if index == 0 and (got.prompt_token_ids, got.prompt) != (want.prompt_token_ids, want.prompt):
        return f"prompt {got.prompt_token_ids}, not {want.prompt_token_ids}"
    return None


def is_near(entry: dict[int, Logprob], token_id: int, num_top: int, every: dict[int, Logprob], far: float) -> bool:
    """Whether logprobs are those of a token and the most likely ones, if values of `every` token may be a bit off."""
    values = torch.tensor([every[i].logprob for i in range(len(every))])
    own, best = values[token_id], values.topk(num_top).values.tolist()
    ranks = range(1 + int((values > own + far).sum()), 2 + int((values > own - far).sum()))
    others = list(entry.items())[1:]
    return (
        next(iter(entry)) == token_id
        and entry[token_id].rank in ranks
        and num_top <= len(entry) <= num_top + 1
        and all(abs(logprob.logprob - values[i]) <= far for i, logprob in entry.items())
        and all(abs(logprob.logprob - best[logprob.rank - 1]) <= 2 * far for _, logprob in others)
        and [logprob.rank for _, logprob in others] == sorted({logprob.rank for _, logprob in others})
        and all(logprob.decoded_token == every[i].decoded_token for i, logprob in entry.items())
    )


def is_rounding(alone: Alone, case: Case, got: RequestOutput, want: RequestOutput, index: int) -> bool:
    """Whether the last bits of logits explain that one sample of a request is not what it is alone."""
    every, draws = alone.recount(case, index)
    a, b, params = got.outputs[index], want.outputs[0], case.params
    num_alike = next(
        (i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y), len(b.token_ids)
    )
    if a.token_ids == b.token_ids:
        if any(a[name] != b[name] for name in ("text", "finish_reason", "stop_reason")):
            return False
    elif num_alike >= min(len(a.token_ids), len(b.token_ids)):
        return False  # only the end is another
    elif not draws[num_alike].may_give(a.token_ids[num_alike], alone.tolerance):
        return False
    if every.outputs[0].token_ids != b.token_ids:
        return False
    known = list(zip(a.logprobs or [], a.token_ids, every.outputs[0].logprobs, strict=False))[: num_alike + 1]
    if not all(is_near(x, i, params.logprobs, y, alone.tolerance) for x, i, y in known):
        return False
    if index > 0 or params.prompt_logprobs is None:
        return True
    known = zip(got.prompt_logprobs, got.prompt_token_ids, every.prompt_logprobs, strict=True)
    return all(
        x is y if x is None or y is None else is_near(x, i, params.prompt_logprobs, y, alone.tolerance)
        for x, i, y in known
    )


def has_structure(text: str, structure: StructuredOutputsParams | None) -> bool:
    """Whether a whole text has the form that it must have, as far as this is looked at here."""
    if structure is None:
        return True
    if structure.choice is not None:
        return text in structure.choice
    if structure.regex is not None:
        return re.fullmatch(structure.regex, text, re.ASCII) is not None
    try:
        value = json.loads(text)
    except ValueError:
        return False
    kind = {"object": dict, "array": list}["object" if structure.json_object else structure.json["type"]]
    return isinstance(value, kind)


def find_nonsense(llm: LLM, case: Case, result: RequestOutput, index: int) -> str | None:
    """In what a sample is not what its parameters say, as far as its tokens and its text alone show that."""
    params, sample, tokenizer = case.params, result.outputs[index], llm.tokenizer
    ids, text, reason = sample.token_ids, sample.text, sample.finish_reason
    stop = sample.stop_reason if isinstance(sample.stop_reason, str) else None
    ends = {*params.stop_token_ids} | (set() if params.ignore_eos else llm.scheduler.eos_token_ids)
    has_end_token = bool(ids) and ids[-1] in ends
    is_full = len(ids) == params.max_tokens or len(result.prompt_token_ids) + len(ids) == MAX_LEN
    shown = ids[:-1] if has_end_token and not params.include_stop_str_in_output else ids
    whole = tokenizer.decode(shown, params.skip_special_tokens).rstrip(REPLACEMENT) if params.detokenize else ""
    words = [tuple(ids[i:j]) for i in range(len(ids)) for j in range(i + 1, len(ids) + 1)]
    is_free = params.structured_outputs is None
    wrong = {
        "a token that ends the text is inside": ends.intersection(ids[:-1]),
        "it ends before min_tokens": reason == "stop" and is_free and len(ids) <= params.min_tokens,
        "nothing stopped it": reason == "stop" and is_free and not has_end_token and stop is None,
        "it ends too early or late": reason == "length" and not is_full,
        "a token is not allowed": not set(ids) <= set(params.allowed_token_ids or ids),
        "it is not of its structure": sample.stop_reason is None
        and reason == "stop"
        and not has_structure(tokenizer.decode(ids[:-1]), params.structured_outputs),
        "there is a bad word": set(bad_word_tokens(params.bad_words, tokenizer, VOCAB_SIZE)) & set(words),
        f"the text of its tokens is {whole!r}": stop is None and text != whole,
        "it keeps or lacks the stop string": stop
        and not params.min_tokens
        and text.endswith(stop) != params.include_stop_str_in_output,
        "a stop string is inside": not params.min_tokens
        and not has_end_token
        and any(s in text.removesuffix(stop or "") for s in params.stop),
    }
    return next((message for message, is_so in wrong.items() if is_so), None)


# ---- the fuzz -----------------------------------------------------------------------------------------------------


def check_result(alone: Alone, case: Case, got: RequestOutput) -> tuple[Counter[str], list[str]]:
    """Compares the samples of a request with what they are alone: counts of what there was, and what was wrong."""
    counts, wrong = Counter(requests=1, hits=got.num_cached_tokens > 0), []
    if not got.finished or [sample.index for sample in got.outputs] != list(range(case.params.n)):
        wrong.append(f"its samples are {got.outputs}")
    for index, sample in enumerate(got.outputs):
        end = "stopped by words" if isinstance(sample.stop_reason, str) else sample.finish_reason
        counts += Counter({"samples": 1, end: 1, "tokens": len(sample.token_ids)})
        want = alone.answer(case, index)
        difference = find_difference(got, want, index, alone.tolerance)
        if difference is not None and is_rounding(alone, case, got, want, index):
            is_token = sample.token_ids != want.outputs[0].token_ids
            counts["decided by rounding" if is_token else "equal but for ties"] += 1
        elif difference is not None:
            wrong.append(f"sample {index} has {difference}")
        nonsense = find_nonsense(alone.llm, case, got, index)
        if nonsense is not None:
            wrong.append(f"sample {index}: {nonsense}; {sample}")
    return counts, wrong


def fuzz_engine(alone: Alone, drawer: Drawer, llm: LLM, num_requests: int) -> tuple[Counter[str], list[str]]:
    """Batches of random requests through one engine, which is idle before and after each."""
    trace, counts, wrong = Trace(llm), Counter(), []
    while counts["requests"] < num_requests:
        answer = drawer.rng.choice([answer_at_once, answer_by_steps])
        drawer.change_mood()
        number = 60 if drawer.is_short else drawer.rng.choice([3, 20, 40])
        number = min(number, num_requests - counts["requests"])
        try:
            answered = answer(llm, drawer, number)
            check_idle(llm)
        except (AssertionError, RuntimeError):
            wrong.append(f"{answer.__name__}: {traceback.format_exc()}")
            break  # what such an engine goes on with says nothing
        for case, result in answered:
            more_counts, more_wrong = check_result(alone, case, result)
            counts += more_counts
            wrong += [f"{answer.__name__}, {case}: {message}" for message in more_wrong]
    return counts + Counter(preemptions=trace.num_preemptions, chunks=trace.num_chunks), wrong


def fuzz(
    num_requests: int,
    seed: int,
    device: str = "cpu",
    has_structures: bool = True,
    requests_of_an_engine: int | None = None,
) -> tuple[Counter[str], list[str]]:
    """Engines after each other until so many requests were made: what happened how often, and what was wrong."""
    counts, wrong = Counter(), []
    num_gpus = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder))
        alone = Alone(folder, device)
        with alone.llm:
            drawer = Drawer(str(seed), alone.llm.tokenizer, has_structures)
            for options in drawer.options():
                num_left = num_requests - counts["requests"]
                num_ranks = max(options.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
                if num_left <= 0:
                    break
                if device == "cuda" and num_ranks > num_gpus:
                    continue
                number = (requests_of_an_engine or REQUESTS_OF_AN_ENGINE[device]) * (
                    TWO_RANKS_REQUESTS if num_ranks > 1 else 1
                )
                with make_engine(folder, device, **options) as llm:
                    more_counts, more_wrong = fuzz_engine(alone, drawer, llm, min(number, num_left))
                counts += more_counts + Counter(engines=1)
                wrong += [f"{options}: {message}" for message in more_wrong]
            check_idle(alone.llm)
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-structured", action="store_true", help="without structured outputs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    has_structures = not arguments.no_structured and importlib.util.find_spec("xgrammar") is not None
    start = time.monotonic()
    counts, wrong = fuzz(arguments.requests, arguments.seed, arguments.device, has_structures)
    print(*wrong[:10], sep="\n", end="\n" * bool(wrong))
    rounded = counts["decided by rounding"]
    print(f"{arguments.requests} requests on {arguments.device} in {time.monotonic() - start:.0f} s:", end=" ")
    print(f"{len(wrong)} differences, {rounded} samples decided by rounding;", end=" ")
    print(", ".join(f"{number} {name}" for name, number in counts.items() if name != "decided by rounding"))
    return bool(wrong) or rounded > MOST_ROUNDED * counts["samples"]


if __name__ == "__main__":
    sys.exit(main())
