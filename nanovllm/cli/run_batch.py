"""`nanovllm run-batch`."""

from __future__ import annotations

import argparse
import os
import sys

from nanovllm.batch.run_batch import run_batch
from nanovllm.cli.engine_options import MODEL_HELP, add_engine_arguments, add_name_argument, read_options, served_name
from nanovllm.llm import LLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("-i", "--input-file", required=True, help="requests: JSON Lines in OpenAI's batch format")
    parser.add_argument("-o", "--output-file", required=True, help="results, as they finish")
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    add_name_argument(parser)
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run stopped")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answers the file."""
    if os.path.realpath(args.input_file) == os.path.realpath(args.output_file):
        raise ValueError(f"--input-file and --output-file must be two files, got {args.input_file!r} for both")
    with LLM(**read_options(args)) as llm:
        try:
            counts = run_batch(llm, args.input_file, args.output_file, served_name(args), args.resume)
        except KeyboardInterrupt:
            print("interrupted: the same command with --resume goes on", file=sys.stderr)
            raise
    before = f", {counts.num_before:,} by an earlier run" if counts.num_before else ""
    print(f"{args.output_file}: {counts.num_answered:,} answered, {counts.num_failed:,} failed{before}")
    return 0
