"""`nanovllm serve MODEL`: the command line of the server, its start and its end."""

import argparse
import ipaddress
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import uvicorn

from nanovllm.llm import LLM
from nanovllm.server.app import build_app
from nanovllm.server.async_llm import AsyncLLM

API_KEY_VARIABLE = "NANOVLLM_API_KEY"
POLL_SECONDS = 0.2
END_SECONDS = 2  # for which clients can hear of the engine's end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the server, and all of the engine's."""
    parser.add_argument("model", help="a Hugging Face folder or hub name, or a GGUF file")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: %(default)s)")
    parser.add_argument("--served-model-name", help="what requests call the model (default: MODEL, without folders)")
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
    engine = parser.add_argument_group("engine options", "as LLM(...) has them", argument_default=argparse.SUPPRESS)
    for name, hint in engine_options().items():
        flag = f"--{name.replace('_', '-')}"
        if bool in kinds(hint) and str not in kinds(hint):
            engine.add_argument(flag, action=argparse.BooleanOptionalAction)
        else:
            engine.add_argument(flag, type=str if str in kinds(hint) else number_or_text, metavar="VALUE")


def engine_options() -> dict[str, Any]:
    """The types of LLM's options, by name."""
    hints = get_type_hints(LLM.__init__)
    return {name: hints[name] for name in LLM.__init__.__kwdefaults__}


def kinds(hint: Any) -> tuple[Any, ...]:
    """The types that an option may have."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def number_or_text(text: str) -> Any:
    """A number or an object, if it is JSON; else the text. The engine checks what it is."""
    with suppress(ValueError):
        return json.loads(text)
    return text


def run(args: argparse.Namespace) -> int:
    """Serves a model until it is told to end; returns the exit status: 1 if the engine has failed.

    Raises:
        TypeError, ValueError, RuntimeError: what AsyncLLM raises.
    """
    api_keys = args.api_key or list(filter(None, [os.environ.get(API_KEY_VARIABLE)]))
    if not all(api_keys):
        raise ValueError("--api-key must not be empty")
    name = args.served_model_name or served_name(args.model)
    options = {option: getattr(args, option) for option in engine_options() if hasattr(args, option)}
    engine = AsyncLLM(args.model, **options)
    try:
        app = build_app(engine, name, api_keys, args.max_body_bytes, args.max_waiting_requests)
        config = uvicorn.Config(
            app,
            args.host,
            args.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=args.shutdown_timeout + END_SECONDS,
        )
        listener = config.bind_socket()
        host, port = listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"nano-vllm: {name} is served at http://{address}", file=sys.stderr, flush=True)
        if not api_keys and not ipaddress.ip_address(host).is_loopback:
            print("nano-vllm: other machines can reach it, without a key: --api-key asks for one", file=sys.stderr)
        server = uvicorn.Server(config)
        # uvicorn ends at SIGTERM and Ctrl-C, in order, then raises them again: then there is nothing left to be done.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        with ThreadPoolExecutor(1) as pool:
            status = pool.submit(supervise, server, engine, args.shutdown_timeout)
            try:
                server.run(sockets=[listener])
            finally:
                engine.close()
        return status.result()
    finally:
        engine.close()


def supervise(server: uvicorn.Server, engine: AsyncLLM, shutdown_timeout: int) -> int:
    """Ends the server once the engine has failed, and the engine if the server takes too long to end.

    Returns the exit status.
    """
    while engine.thread.is_alive() and not server.should_exit:
        engine.thread.join(POLL_SECONDS)
    if not server.should_exit:
        print(f"nano-vllm: the engine is dead: {engine.llm.failure}", file=sys.stderr, flush=True)
        time.sleep(END_SECONDS)
        server.should_exit = True
        return 1
    engine.thread.join(shutdown_timeout)
    engine.close()  # so that what still runs is told so
    return 0


def served_name(model: str) -> str:
    """A hub name as it is; of a folder or file the last part, as clients need not know where it is."""
    return os.path.basename(os.path.abspath(model)) if os.path.exists(model) else model


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("nanovllm serve", description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        return run(args)
    except (TypeError, ValueError) as error:
        print(f"nanovllm serve: {error}", file=sys.stderr)
        return 2
