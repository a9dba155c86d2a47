"""Measures how fast an engine completes a list of requests that are all submitted at once.

The default is the workload of the public nano-vllm benchmark: 256 requests, prompts and outputs of 100 to 1,024 tokens
each, drawn with seed 0, at temperature 0.6, on the shape of Qwen3-0.6B with random weights. Repeats keep the lengths
and draw new prompts, so that no cache helps. A short request before the first repeat warms up and is not timed; the
time of a repeat goes from the first request's submission to the last one's text.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.command_line import parse_args
from tools.dummy_model import QUANTIZATIONS, write_dummy_model
from tools.floor import Floor
from tools.other_engines import run_hf, run_llamacpp, run_vllm, start_hf, start_llamacpp, start_vllm
from tools.runs import Engine, Request, Run
from tools.step_profile import profile
from tools.weight_format import weight_format

if TYPE_CHECKING:  # imported where needed otherwise, since importing is among what is measured
    from nanovllm import LLM
    from nanovllm.engine.sequence import Sequence

DEMO = str(Path(__file__).parent / "nanovllm" / "demo")
MAX_TOKEN_ID = 10_000  # of the public benchmark's prompts


@dataclass(frozen=True)
class Result:
    """All figures of a benchmark; `model` may be a shape's name, `floor` is not known of llama.cpp."""

    engine: str
    model: str
    arguments: list[str]
    prompt_tokens: int
    import_seconds: float
    start_up_seconds: float
    peak_memory_bytes: int
    runs: list[Run]
    median_tokens_per_second: float
    floor: Floor | None


def draw_requests(args: argparse.Namespace, vocab_size: int, repeat: int) -> list[Request]:
    """The requests of a repeat; the first one's are the public benchmark's, drawn in the same order."""
    draw = random.Random(0)
    limit = min(MAX_TOKEN_ID, vocab_size - 1)
    prompts = [[draw.randint(0, limit) for _ in range(draw.randint(*args.input_len))] for _ in range(args.num_seqs)]
    output_lens = [draw.randint(*args.output_len) for _ in range(args.num_seqs)]
    draw = random.Random(repeat + 1)
    prefix = [draw.randint(0, limit) for _ in range(args.shared_prefix)]
    if repeat:
        prompts = [[draw.randint(0, limit) for _ in prompt] for prompt in prompts]
    requests = [Request(prefix + prompt, n) for prompt, n in zip(prompts, output_lens, strict=True)]
    for request in requests[:: args.params_every]:
        request.params.update(args.params)
    return requests


def start_nanovllm(model: str, options: dict[str, Any]) -> LLM:
    """Our engine."""
    from nanovllm import LLM

    return LLM(model, **options)


def submit(llm: LLM, requests: list[Request], sampling: dict[str, Any]) -> list[Sequence]:
    """Queues requests, whose results come when they have finished; returns the engine's sequences."""
    from nanovllm import SamplingParams
    from nanovllm.sampling_params import RequestOutputKind

    common = {"ignore_eos": True, "output_kind": RequestOutputKind.FINAL_ONLY} | sampling
    params = [SamplingParams(max_tokens=r.max_tokens, **common | r.params) for r in requests]
    numbers = [llm.add_request(request.prompt, param) for request, param in zip(requests, params, strict=True)]
    return [seq for number in numbers for seq in llm.requests[number].seqs]


def run_nanovllm(llm: LLM, requests: list[Request], sampling: dict[str, Any]) -> Run:
    """Completes the requests, step by step."""
    start, arrival = time.perf_counter(), time.time()
    submit(llm, requests, sampling)
    results = []
    while not llm.is_finished():
        results += llm.step()
    seconds = time.perf_counter() - start
    total = sum(len(sample.token_ids) for result in results for sample in result.outputs)
    metrics = [(result.metrics, len(result.token_ids)) for result in results]
    first = statistics.mean(times.first_token_time - arrival for times, _ in metrics)
    per_token = [(times.finished_time - times.first_token_time) / (n - 1) for times, n in metrics if n > 1]
    return Run(
        total,
        seconds,
        total / seconds,
        first,
        statistics.mean(per_token) if per_token else None,
        num_draft_tokens=sum(result.num_draft_tokens for result in results),
        num_accepted_tokens=sum(result.num_accepted_tokens for result in results),
        time_to_all_first_tokens=max(times.first_token_time for times, _ in metrics) - arrival,
    )


ENGINES = {
    "nanovllm": Engine("nanovllm", "nano-vllm", start_nanovllm, run_nanovllm),
    "vllm": Engine("vllm", "vllm", start_vllm, run_vllm),
    "hf": Engine("transformers", "transformers", start_hf, run_hf),
    "llamacpp": Engine("llama_cpp", "llama-cpp-python", start_llamacpp, run_llamacpp),
}


def measure(args: argparse.Namespace, model: str, options: dict[str, Any]) -> Result:
    """Starts the engine, completes the repeats and prints what each took."""
    module, package, start_engine, run_engine = ENGINES[args.engine]
    start = time.perf_counter()
    try:
        importlib.import_module(module)
    except ImportError as error:
        sys.exit(f"--engine {args.engine} needs the package {package}: pip install {package} ({error})")
    imported = time.perf_counter()
    engine = start_engine(model, options)
    started = time.perf_counter()

    import torch

    from nanovllm.checkpoint.files import resolve_model_path
    from nanovllm.checkpoint.model_config import ModelConfig

    config = ModelConfig.from_folder(resolve_model_path(model, weights=False))
    quantized = weight_format(config, options.get("quantization"))
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    run_engine(engine, [Request(list(range(16)), 8)], sampling)
    print("warmed up by a request of 16 + 8 tokens, not counted")
    runs: list[Run] = []
    for repeat in range(args.repeats):
        requests = draw_requests(args, config.vocab_size, repeat)
        runs.append(run_engine(engine, requests, sampling))
        print(f"run {repeat + 1}: {describe(runs[-1])}", flush=True)
        asked = sum(request.max_tokens * request.params.get("n", 1) for request in requests)
        if runs[-1].output_tokens != asked:
            raise RuntimeError(f"{asked} tokens asked for, {runs[-1].output_tokens} came: raise --max-model-len?")
    memory = peak_memory()
    if args.profile:
        submit(engine, draw_requests(args, config.vocab_size, args.repeats), sampling)
        profile(engine, first_step=max(request.max_tokens for request in requests) // 2, path=args.profile)
    on_gpu = torch.cuda.is_available()
    if args.engine == "nanovllm":
        dtype = engine.config.dtype
    else:
        dtype = options.get("dtype", config.dtype if on_gpu else "float32")
    del engine
    gc.collect()  # what comes next needs memory of its own
    floor = None
    if args.engine != "llamacpp":  # whose file has types of its own
        num_gpus = options["tensor_parallel_size"] * options.get("pipeline_parallel_size", 1) if on_gpu else 1
        cache_dtype = options.get("kv_cache_dtype", "auto")
        floor = Floor.measure(config, dtype, requests, args.shared_prefix, num_gpus, cache_dtype, quantized)
    return Result(
        engine=args.engine,
        model=args.model or args.shape,
        arguments=sys.argv[1:],
        prompt_tokens=sum(len(request.prompt) for request in requests),
        import_seconds=imported - start,
        start_up_seconds=started - imported,
        peak_memory_bytes=memory,
        runs=runs,
        median_tokens_per_second=statistics.median(run.tokens_per_second for run in runs),
        floor=floor,
    )


def peak_memory() -> int:
    """Bytes in use on the current GPU (engines keep what they took), or the most this process had resident."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe(run: Run) -> str:
    """A repeat in a line; the times of tokens are means over the requests."""
    text = f"{run.output_tokens:,} output tokens in {run.seconds:.3f} s: {run.tokens_per_second:,.0f} tok/s"
    times = ("first token", run.time_to_first_token), ("each further token", run.time_per_output_token)
    text += "".join(f", {name} {1000 * seconds:.2f} ms" for name, seconds in times if seconds is not None)
    if run.num_draft_tokens:
        text += f", {run.num_accepted_tokens:,} of {run.num_draft_tokens:,} drafts accepted"
    return text


def print_summary(result: Result) -> None:
    """What comes after the repeats."""
    num_gib, rate = result.peak_memory_bytes / 2**30, result.median_tokens_per_second
    print(f"import {result.import_seconds:.2f} s, start-up {result.start_up_seconds:.2f} s, memory {num_gib:.2f} GiB")
    print(f"{result.engine}, {result.model}, {result.prompt_tokens:,} prompt tokens: median {rate:,.0f} tok/s")
    if (floor := result.floor) is not None:
        share = floor.seconds * rate / result.runs[0].output_tokens
        units = f"{floor.bandwidth / 1e12:.2f} TB/s and {floor.flops_per_second / 1e12:.0f} TFLOP/s"
        if floor.bandwidth < 1e12:
            units = f"{floor.bandwidth / 1e9:.1f} GB/s and {floor.flops_per_second / 1e9:.0f} GFLOP/s"
        if floor.flops_per_second_in_8_bits is not None:
            units += f", in 8 bits {floor.flops_per_second_in_8_bits / 1e12:.0f}"
        print(f"floor at the measured {units}: {floor.seconds:.3f} s; achieved {share:.1%} of its speed")
        last_first_tokens = [run.time_to_all_first_tokens for run in result.runs if run.time_to_all_first_tokens]
        if last_first_tokens:
            seconds = statistics.median(last_first_tokens)
            share = floor.prefill_seconds / seconds
            print(
                f"prompts are {floor.prefill_seconds:.3f} s of it; all first tokens after {seconds:.3f} s: {share:.1%}"
            )


def main() -> None:
    args, options = parse_args(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        model = DEMO if args.model == "demo" else args.model
        if model is None:
            stored = QUANTIZATIONS.get(options.get("quantization"))
            if stored is not None:  # config.json says it, in place of the option
                del options["quantization"]
            write_dummy_model(args.shape, folder, not args.no_tokenizer, stored)
            model, options["load_format"] = folder, "dummy"
        result = measure(args, model, options)
    print_summary(result)
    if args.json:
        Path(args.json).write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
