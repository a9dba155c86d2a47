"""Completes the prompts of Parquet or JSON Lines files with Ray Data, and writes Parquet.

    pip install "nano-vllm[ray]"
    python examples/ray_batch.py prompts.parquet answers --model Qwen/Qwen3-0.6B --num-engines 8

Runs on the Ray cluster that it is started in, or on this machine alone. Each engine is an actor with GPUs of its own,
to which Ray sets CUDA_VISIBLE_DEVICES: so this is also how several engines share a machine with several GPUs.
"""

from __future__ import annotations

import argparse
import json

import ray

from nanovllm import SamplingParams
from nanovllm.ray import Predictor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="a Parquet or .jsonl file, or a folder of Parquet files; any place Ray can read")
    parser.add_argument("output", help="folder for Parquet files")
    parser.add_argument("--model", required=True, help="folder or hub name, for all machines the same")
    parser.add_argument("--column", default="prompt", help="of prompts, or of conversations (lists of messages)")
    parser.add_argument("--params", type=json.loads, default={}, metavar="JSON", help="SamplingParams")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="further options of LLM")
    parser.add_argument("--num-engines", type=int, default=1)
    parser.add_argument("--num-gpus", type=int, default=1, help="of each engine: its ranks; 0: on CPUs")
    parser.add_argument("--batch-size", type=int, default=1024, help="rows that an engine computes at a time")
    args = parser.parse_args()
    read = ray.data.read_json if args.input.endswith((".json", ".jsonl")) else ray.data.read_parquet
    options = {"tensor_parallel_size": max(args.num_gpus, 1), "column": args.column} | args.options
    answers = read(args.input).map_batches(
        Predictor,
        fn_constructor_kwargs={"model": args.model, "sampling_params": SamplingParams(**args.params)} | options,
        compute=ray.data.ActorPoolStrategy(size=args.num_engines),
        num_gpus=args.num_gpus,
        num_cpus=0,  # none that Ray counts, else engines could take all that reading and writing need
        batch_size=args.batch_size,
    )
    answers.write_parquet(args.output)
    print(f"{args.output}: answers to {ray.data.read_parquet(args.output).count():,} rows")


if __name__ == "__main__":
    main()
