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
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where needed otherwise, since importing is among what is measured
    from nanovllm import LLM
    from nanovllm.config import ModelConfig

DEMO = str(Path(__file__).parent / "nanovllm" / "demo")
MAX_TOKEN_ID = 10_000  # of the public benchmark's prompts
HF_BATCH_SIZE = 32
PROFILE_WARMUP, PROFILE_STEPS = 3, 20
# Facts of config.json; Llama keeps those of Qwen3 that have no bearing on speed.
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_act": "silu"}
QWEN3 |= {"head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
LLAMA3 = QWEN3 | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {  # facts, SIZES, whether head and embedding are tied
    "qwen3-0.6b": (QWEN3, (1024, 3072, 28, 16, 8), True),
    "qwen3-1.7b": (QWEN3, (2048, 6144, 28, 16, 8), True),
    "qwen3-4b": (QWEN3, (2560, 9728, 36, 32, 8), True),
    "qwen3-8b": (QWEN3, (4096, 12288, 36, 32, 8), False),
    "qwen3-14b": (QWEN3, (5120, 17408, 40, 40, 8), False),
    "qwen3-32b": (QWEN3, (5120, 25600, 64, 64, 8), False),
    "llama-3.1-8b": (LLAMA3, (4096, 14336, 32, 32, 8), False),
}


@dataclass(frozen=True)
class Request:
    """Token ids to complete with exactly `max_tokens` tokens."""

    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Run:
    """What one repeat took: seconds, and means over requests in seconds, None where the engine does not tell."""

    output_tokens: int
    seconds: float
    tokens_per_second: float
    time_to_first_token: float | None = None
    time_per_output_token: float | None = None  # after the first


@dataclass(frozen=True)
class Floor:
    """The least time the requests could take, were the GPU busy with nothing but what cannot be avoided.

    A decode step reads all weights once (of the input embedding only a row a request, which is not counted) and each
    request's keys and values. A request of P prompt and N output tokens takes N - 1 decode steps with contexts of
    P + 1 to P + N - 1 tokens, and there are at least as many steps as the longest output takes. Prefill is bound by
    arithmetic: two FLOPs for each weight and token, four for each head element and pair of tokens that attend, and
    the head for last tokens only; a shared prefix is computed once. So

        seconds = ((kv_bytes + weight_bytes) / bandwidth + prefill_flops / flops_per_second) / number of GPUs

    with the bytes and FLOPs a second that one big read and one big matrix product reach on this device.
    """

    kv_bytes: int
    weight_bytes: int
    prefill_flops: int
    bandwidth: float
    flops_per_second: float
    seconds: float

    @classmethod
    def measure(cls, config: ModelConfig, dtype: str, requests: list[Request], prefix: int, num_gpus: int) -> Floor:
        """Counts the work of requests that share their first `prefix` tokens; measures the current device."""
        layers, head = count_weights(config)
        step_bytes, token_bytes = decode_bytes(config, dtype)
        lens = [(len(r.prompt), r.max_tokens) for r in requests]
        kv_bytes = token_bytes * sum((n - 1) * p + n * (n - 1) // 2 for p, n in lens)
        weight_bytes = step_bytes * (max(n for _, n in lens) - 1)
        cached = prefix * (len(lens) - 1)
        pairs = (sum(p * (p + 1) for p, _ in lens) - cached * (prefix + 1)) // 2
        flops = 2 * layers * (sum(p for p, _ in lens) - cached) + 2 * head * len(lens)
        flops += 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
        bandwidth, rate = measure_gpu(dtype)
        seconds = ((kv_bytes + weight_bytes) / bandwidth + flops / rate) / num_gpus
        return cls(kv_bytes, weight_bytes, flops, bandwidth, rate, seconds)


@dataclass(frozen=True)
class Result:
    """All figures of a benchmark; `model` may be a shape's name, `floor` is only known where there is a GPU."""

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


def count_weights(config: ModelConfig) -> tuple[int, int]:
    """Elements of all layers' matrices and of the head's; norms and biases are too small to count."""
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    layer = config.hidden_size * (attention + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer, config.hidden_size * config.vocab_size


def decode_bytes(config: ModelConfig, dtype: str) -> tuple[int, int]:
    """Bytes of weights that a decode step reads, and of one token's keys and values in all layers."""
    size = 4 if dtype == "float32" else 2
    kv_elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return size * sum(count_weights(config)), size * kv_elements


def measure_gpu(dtype: str) -> tuple[float, float]:
    """Bytes/s of a big read (the sum of 2 GiB) and FLOPs/s of a big matrix product."""
    import torch
    from torch.utils.benchmark import Timer

    data = torch.zeros(2**29, device="cuda")
    a, b = torch.randn(2, 8192, 8192, device="cuda").to(getattr(torch, dtype))  # zeros would run faster
    read, product = Timer("x.sum()", globals={"x": data}), Timer("a @ b", globals={"a": a, "b": b})
    return data.nbytes / read.timeit(100).mean, 2 * 8192**3 / product.timeit(100).mean


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
    return [Request(prefix + prompt, n) for prompt, n in zip(prompts, output_lens, strict=True)]


def write_dummy_model(shape: str, folder: str, with_tokenizer: bool = True) -> None:
    """Writes a shape's config.json, and a byte-level BPE tokenizer with a made-up word for each id.

    With it, turning tokens into text is part of the work, as it is with a real checkpoint.
    """
    facts, sizes, is_tied = SHAPES[shape]
    config = facts | dict(zip(SIZES, sizes, strict=True))
    files = {"config.json": config | {"tie_word_embeddings": is_tied, "torch_dtype": "bfloat16"}}
    if with_tokenizer:
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        bpe = {"type": "BPE", "vocab": {f"Ġ{i:05x}": i for i in range(facts["vocab_size"])}, "merges": []}
        files["tokenizer.json"] = {"added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": bpe}
        files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, content in files.items():
        Path(folder, name).write_text(json.dumps(content), encoding="utf-8")


# ---- engines -------------------------------------------------------------------------------------------------------


def start_llm(name: str, model: str, options: dict[str, Any]) -> Any:
    """nano-vllm's or vLLM's LLM."""
    if name == "vllm":
        options = {key.removeprefix("kvcache_"): value for key, value in options.items()}
    return importlib.import_module(name).LLM(model, **options)


def sampling_params(name: str, requests: list[Request], sampling: dict[str, Any]) -> list[Any]:
    """One for each request; nano-vllm's and vLLM's take the same arguments."""
    make = importlib.import_module(name).SamplingParams
    return [make(max_tokens=r.max_tokens, ignore_eos=True, **sampling) for r in requests]


def submit(llm: LLM, requests: list[Request], sampling: dict[str, Any]) -> list[Any]:
    """Queues requests; returns the engine's sequences, which come to know when their first token was seen."""
    params = sampling_params("nanovllm", requests, sampling)
    return [llm.requests[llm.add_request(r.prompt, p)] for r, p in zip(requests, params, strict=True)]


def run_nanovllm(llm: LLM, requests: list[Request], sampling: dict[str, Any]) -> Run:
    """Completes the requests, step by step."""
    start = time.perf_counter()
    seqs = submit(llm, requests, sampling)
    ends, num_tokens = {}, {}
    while not llm.is_finished():
        for request_id, result in llm.step():
            ends[request_id], num_tokens[request_id] = time.perf_counter(), len(result["token_ids"])
    seconds, total = time.perf_counter() - start, sum(num_tokens.values())
    first = statistics.mean(seq.first_token_time - start for seq in seqs)
    per_token = [(ends[s.seq_id] - s.first_token_time) / (n - 1) for s in seqs if (n := num_tokens[s.seq_id]) > 1]
    return Run(total, seconds, total / seconds, first, statistics.mean(per_token) if per_token else None)


def run_vllm(llm: Any, requests: list[Request], sampling: dict[str, Any]) -> Run:
    """Completes the requests in one call."""
    prompts = [{"prompt_token_ids": r.prompt} for r in requests]
    params = sampling_params("vllm", requests, sampling)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds, total = time.perf_counter() - start, sum(len(output.outputs[0].token_ids) for output in outputs)
    return Run(total, seconds, total / seconds)


def start_hf(name: str, model: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A model and its tokenizer. Without a dtype: bfloat16 on a GPU, float32 on a CPU, where that is faster."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if options["tensor_parallel_size"] > 1 or options.keys() - {"tensor_parallel_size", "load_format", "dtype"}:
        raise ValueError(f"--engine {name} runs on one device and has no engine option but --dtype, got {options}")
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    if options.get("load_format") == "dummy":
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    else:
        network = AutoModelForCausalLM.from_pretrained(model)
    network.generation_config.eos_token_id = None  # what ignore_eos is elsewhere
    network.to(device, getattr(torch, options.get("dtype", dtype))).eval()
    return network, AutoTokenizer.from_pretrained(model)


def run_hf(engine: tuple[Any, Any], requests: list[Request], sampling: dict[str, Any]) -> Run:
    """Batches padded on the left. What a request gets beyond its length, waiting for its batch, is not counted."""
    import torch

    network, tokenizer = engine
    is_greedy = sampling["temperature"] == 0
    how = {"do_sample": False} if is_greedy else sampling | {"do_sample": True, "top_k": max(0, sampling["top_k"])}
    start, total = time.perf_counter(), 0
    for index in range(0, len(requests), HF_BATCH_SIZE):
        batch = requests[index : index + HF_BATCH_SIZE]
        width, length = max(len(r.prompt) for r in batch), max(r.max_tokens for r in batch)
        padded = torch.tensor([[-1] * (width - len(r.prompt)) + r.prompt for r in batch], device=network.device)
        how |= {"attention_mask": (padded >= 0).long(), "max_new_tokens": length, "pad_token_id": 0}
        rows = network.generate(padded.clamp(min=0), **how).tolist()
        outputs = [row[width : width + r.max_tokens] for row, r in zip(rows, batch, strict=True)]
        tokenizer.batch_decode(outputs)
        total += sum(map(len, outputs))
    seconds = time.perf_counter() - start
    return Run(total, seconds, total / seconds)


ENGINES = {"nanovllm": (start_llm, run_nanovllm), "vllm": (start_llm, run_vllm), "hf": (start_hf, run_hf)}


# ---- profile -------------------------------------------------------------------------------------------------------


def profile(llm: LLM, requests: list[Request], sampling: dict[str, Any], path: str) -> None:
    """Writes a Chrome trace of some steps halfway through the requests and prints where their time went."""
    import torch
    from torch import profiler

    submit(llm, requests, sampling)
    for _ in range(max(r.max_tokens for r in requests) // 2):
        llm.step()
    window = profiler.schedule(wait=0, warmup=PROFILE_WARMUP, active=PROFILE_STEPS, repeat=1)
    with profiler.profile(schedule=window) as trace:
        for _ in range(PROFILE_WARMUP + PROFILE_STEPS):
            llm.step()
            trace.step()
    trace.export_chrome_trace(path)
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"} if torch.cuda.is_available() else {"cpu_op"}
    print(f"profile of {PROFILE_STEPS} steps in {path}:\n{summarise_trace(path, kinds)}")


def summarise_trace(path: str, categories: set[str]) -> str:
    """The share of the time in which any event of a Chrome trace's categories ran, and the ten longest by total."""
    events = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
    events = [event for event in events if event.get("ph") == "X" and event.get("cat") in categories]
    if not events:
        return "nothing ran in these steps"
    events.sort(key=lambda event: event["ts"])
    start = end = events[0]["ts"]
    busy, calls, totals = 0.0, Counter(), Counter()
    for event in events:
        event_end = event["ts"] + event["dur"]
        busy += max(0.0, event_end - max(end, event["ts"]))
        end = max(end, event_end)
        calls[event["name"]] += 1
        totals[event["name"]] += event["dur"]
    longest = [f"{us / 1000:9.3f} ms {calls[name]:6d} x {name[:90]}" for name, us in totals.most_common(10)]
    return "\n".join([f"busy for {100 * busy / (end - start):.1f}% of {(end - start) / 1000:.3f} ms", *longest])


# ---- command line --------------------------------------------------------------------------------------------------


def length_range(text: str) -> tuple[int, int]:
    """Parses N or LOW-HIGH."""
    low, dash, high = text.partition("-")
    lens = int(low), int(high if dash else low)
    if not 1 <= lens[0] <= lens[1]:
        raise argparse.ArgumentTypeError(f"must be N or LOW-HIGH with 1 <= LOW <= HIGH, got {text!r}")
    return lens


def parse_args() -> tuple[argparse.Namespace, dict[str, Any]]:
    """The benchmark's options, and those given of the engine's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder or hub name, or demo: the bundled one (default: random weights)")
    model.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b", help="of the random weights")
    parser.add_argument("--no-tokenizer", action="store_true", help="nanovllm, random weights: token ids only")
    parser.add_argument("--engine", choices=ENGINES, default="nanovllm")
    parser.add_argument("--num-seqs", type=int, default=256, help="number of requests")
    parser.add_argument("--input-len", type=length_range, default=(100, 1024), metavar="N|LOW-HIGH")
    parser.add_argument("--output-len", type=length_range, default=(100, 1024), metavar="N|LOW-HIGH")
    parser.add_argument("--shared-prefix", type=int, default=0, help="equal tokens in front of all prompts")
    for name, default in (("--repeats", 1), ("--temperature", 0.6), ("--top-p", 1.0), ("--top-k", -1)):
        parser.add_argument(name, type=type(default), default=default)
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument(
        "--profile", metavar="JSON", help="nanovllm: file for a Chrome trace of steps of a further run"
    )
    names = set(vars(parser.parse_args([])))
    engine = parser.add_argument_group("engine options", argument_default=argparse.SUPPRESS)
    engine.add_argument("--tp", type=int, default=1, dest="tensor_parallel_size", help="number of GPUs")
    engine.add_argument("--enforce-eager", action="store_const", const=True)
    engine.add_argument("--no-async-scheduling", action="store_const", const=False, dest="async_scheduling")
    engine.add_argument("--no-prefix-caching", action="store_const", const=False, dest="enable_prefix_caching")
    engine.add_argument("--block-size", type=int, dest="kvcache_block_size")
    for name in ("--max-num-seqs", "--max-num-batched-tokens", "--max-model-len"):
        engine.add_argument(name, type=int)
    engine.add_argument("--gpu-memory-utilization", type=float)
    engine.add_argument("--attention-backend")
    engine.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()
    if args.profile and args.engine != "nanovllm":
        parser.error("--profile is for --engine nanovllm")
    if min(args.num_seqs, args.repeats) < 1 or args.shared_prefix < 0:
        parser.error("--num-seqs and --repeats must be at least 1, --shared-prefix at least 0")
    return args, {name: value for name, value in vars(args).items() if name not in names}


def peak_memory() -> int:
    """Bytes in use on the current GPU (engines keep what they took), or the most this process had resident."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(args: argparse.Namespace, model: str, options: dict[str, Any]) -> Result:
    """Starts the engine, completes the repeats and prints what each took."""
    start_engine, run_engine = ENGINES[args.engine]
    start = time.perf_counter()
    importlib.import_module("transformers" if args.engine == "hf" else args.engine)
    imported = time.perf_counter()
    engine = start_engine(args.engine, model, options)
    times = imported - start, time.perf_counter() - imported

    import torch

    from nanovllm.config import ModelConfig, resolve_model_path

    config = ModelConfig.from_folder(resolve_model_path(model, weights=False))
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    run_engine(engine, [Request(list(range(16)), 8)], sampling)
    print("warmed up by a request of 16 + 8 tokens, not counted")
    runs: list[Run] = []
    for repeat in range(args.repeats):
        requests = draw_requests(args, config.vocab_size, repeat)
        runs.append(run_engine(engine, requests, sampling))
        print(f"run {repeat + 1}: {describe(runs[-1])}", flush=True)
        asked = sum(r.max_tokens for r in requests)
        if runs[-1].output_tokens != asked:
            raise RuntimeError(f"{asked} tokens asked for, {runs[-1].output_tokens} came: raise --max-model-len?")
    memory, floor = peak_memory(), None
    if args.profile:
        profile(engine, draw_requests(args, config.vocab_size, args.repeats), sampling, args.profile)
    del engine
    gc.collect()  # what comes next needs memory of its own
    if torch.cuda.is_available():
        dtype = options.get("dtype", config.dtype)
        floor = Floor.measure(config, dtype, requests, args.shared_prefix, options["tensor_parallel_size"])
    prompt_tokens = sum(len(r.prompt) for r in requests)
    rate = statistics.median(run.tokens_per_second for run in runs)
    return Result(
        args.engine, args.model or args.shape, sys.argv[1:], prompt_tokens, *times, memory, runs, rate, floor
    )


def describe(run: Run) -> str:
    """A repeat in a line; the times of tokens are means over the requests."""
    text = f"{run.output_tokens:,} output tokens in {run.seconds:.3f} s: {run.tokens_per_second:,.0f} tok/s"
    times = ("first token", run.time_to_first_token), ("each further token", run.time_per_output_token)
    return text + "".join(f", {name} {1000 * seconds:.2f} ms" for name, seconds in times if seconds is not None)


def main() -> None:
    args, options = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            write_dummy_model(args.shape, folder, not args.no_tokenizer)
            options["load_format"] = "dummy"
        result = measure(args, {None: folder, "demo": DEMO}.get(args.model, args.model), options)
    num_gib, rate = result.peak_memory_bytes / 2**30, result.median_tokens_per_second
    print(f"import {result.import_seconds:.2f} s, start-up {result.start_up_seconds:.2f} s, memory {num_gib:.2f} GiB")
    print(f"{result.engine}, {result.model}, {result.prompt_tokens:,} prompt tokens: median {rate:,.0f} tok/s")
    if (floor := result.floor) is not None:
        share = floor.seconds * rate / result.runs[0].output_tokens
        units = f"{floor.bandwidth / 1e12:.2f} TB/s and {floor.flops_per_second / 1e12:.0f} TFLOP/s"
        print(f"floor at the measured {units}: {floor.seconds:.3f} s; achieved {share:.1%} of its speed")
    if args.json:
        Path(args.json).write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
