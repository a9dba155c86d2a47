"""The options of bench.py."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tools.dummy_model import QUANTIZATIONS, SHAPES

ONLINE = "fp8"  # what the engine makes of a plain checkpoint
QUANTIZATION_HELP = """of the engine, with --model. Of random weights: fp8 (e4m3, rounded while they are made up, a
scale for each row), fp8-block (e4m3, a scale for each 128 x 128, as Qwen's checkpoints), int8 (a scale for each row;
the rows of a prompt are rounded too, as with fp8), int4 (GPTQ, symmetric, a scale for each 128), awq (4 bits, a scale
and a zero for each 128)"""


def length_range(text: str) -> tuple[int, int]:
    """Parses N or LOW-HIGH."""
    low, dash, high = text.partition("-")
    lens = int(low), int(high if dash else low)
    if not 1 <= lens[0] <= lens[1]:
        raise argparse.ArgumentTypeError(f"must be N or LOW-HIGH with 1 <= LOW <= HIGH, got {text!r}")
    return lens


def parse_args(description: str | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The benchmark's options, and those given of the engine's."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model", help="folder, GGUF file or hub name, or demo: the bundled one (default: random weights)"
    )
    model.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b", help="of the random weights")
    parser.add_argument("--no-tokenizer", action="store_true", help="nanovllm, random weights: token ids only")
    parser.add_argument("--engine", choices=("nanovllm", "vllm", "hf", "llamacpp"), default="nanovllm")
    parser.add_argument("--num-seqs", type=int, default=256, help="number of requests")
    parser.add_argument("--input-len", type=length_range, default=(100, 1024), metavar="N|LOW-HIGH")
    parser.add_argument("--output-len", type=length_range, default=(100, 1024), metavar="N|LOW-HIGH")
    parser.add_argument("--shared-prefix", type=int, default=0, help="equal tokens in front of all prompts")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=-1)
    parser.add_argument("--params", type=json.loads, default={}, help="nanovllm: further SamplingParams, as JSON")
    parser.add_argument("--params-every", type=int, default=1, metavar="K", help="for each K-th request only")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument(
        "--profile", metavar="JSON", help="nanovllm: file for a Chrome trace of steps of a further run"
    )
    benchmark_options = set(vars(parser.parse_args([])))
    engine = parser.add_argument_group("engine options", argument_default=argparse.SUPPRESS)
    engine.add_argument("--tp", type=int, default=1, dest="tensor_parallel_size", help="GPUs of a stage")
    engine.add_argument("--pp", type=int, dest="pipeline_parallel_size", help="stages")
    engine.add_argument("--enforce-eager", action="store_const", const=True)
    engine.add_argument("--no-async-scheduling", action="store_const", const=False, dest="async_scheduling")
    engine.add_argument("--no-prefix-caching", action="store_const", const=False, dest="enable_prefix_caching")
    engine.add_argument("--block-size", type=int, dest="kvcache_block_size")
    engine.add_argument("--max-num-seqs", type=int)
    engine.add_argument("--max-num-batched-tokens", type=int)
    engine.add_argument("--max-model-len", type=int)
    engine.add_argument("--gpu-memory-utilization", type=float)
    engine.add_argument("--attention-backend")
    engine.add_argument("--sampler-backend")
    engine.add_argument("--kv-cache-dtype")
    engine.add_argument("--quantization", metavar="METHOD", help=QUANTIZATION_HELP)
    engine.add_argument("--speculative-config", type=json.loads, metavar="JSON", help="nanovllm, vllm")
    engine.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()
    if args.profile and args.engine != "nanovllm":
        parser.error("--profile is for --engine nanovllm")
    if args.params and args.engine != "nanovllm":
        parser.error("--params is for --engine nanovllm")
    if min(args.num_seqs, args.repeats, args.params_every) < 1 or args.shared_prefix < 0:
        parser.error("--num-seqs, --repeats and --params-every must be at least 1, --shared-prefix at least 0")
    quantization, known = getattr(args, "quantization", None), (ONLINE, *QUANTIZATIONS)
    if quantization is not None and args.engine in ("hf", "llamacpp"):
        parser.error(f"--quantization is not for --engine {args.engine}")
    if args.model is None and quantization not in (None, *known):
        parser.error(f"--quantization of random weights must be one of {', '.join(known)}, got {quantization!r}")
    # An option of the engine that was not given has no value: the engine has a default of its own.
    return args, {name: value for name, value in vars(args).items() if name not in benchmark_options}
