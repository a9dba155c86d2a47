"""`nanovllm serve`."""

from __future__ import annotations

import argparse
import os
from contextlib import closing

from nanovllm.async_engine.async_llm import AsyncLLM
from nanovllm.cli.engine_options import MODEL_HELP, add_engine_arguments, add_name_argument, read_options, served_name
from nanovllm.options.checks import check
from nanovllm.server.app import build_app
from nanovllm.server.serve import serve

API_KEY_VARIABLE = "NANOVLLM_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: %(default)s)")
    parser.add_argument(
        "--api-key", action="append", help=f"which requests must have; may be repeated (default: ${API_KEY_VARIABLE})"
    )
    parser.add_argument("--max-body-bytes", type=int, default=4 * 2**20, help="of a request (default: %(default)s)")
    parser.add_argument(
        "--max-waiting-requests", type=int, default=1024, help="more are told to come again (default: %(default)s)"
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=int,
        default=30,
        help="seconds for what runs to finish once the server is asked to end (default: %(default)s)",
    )
    parser.add_argument("model", help=MODEL_HELP)
    add_name_argument(parser)
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serves the model until it is told to end; returns the exit status: 1 if the engine has failed."""
    api_keys = args.api_key or list(filter(None, [os.environ.get(API_KEY_VARIABLE)]))
    if not all(api_keys):
        raise ValueError("--api-key must not be empty")
    check("--port", args.port, int, 0, 65535)
    check("--max-waiting-requests", args.max_waiting_requests, int, 0)
    with closing(AsyncLLM(**read_options(args))) as engine:
        app = build_app(engine, served_name(args), api_keys, args.max_body_bytes, args.max_waiting_requests)
        return serve(app, engine, args.host, args.port, args.shutdown_timeout, bool(api_keys))
