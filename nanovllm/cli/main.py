"""`nanovllm COMMAND`: finds the command's module, which is imported only then, and reports its errors in a line."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import nanovllm
from nanovllm.cli.bench import run_bench

COMMANDS = {  # with the module, and what needs an extra with its name
    "serve": ("nanovllm.cli.serve", "server", "an HTTP server that OpenAI's clients can use"),
    "run-batch": ("nanovllm.cli.run_batch", "batch", "answer a file of requests in OpenAI's batch format"),
    "chat": ("nanovllm.cli.chat", None, "chat in the terminal"),
    "bench": (None, None, "measure speed: bench.py of the sources, which has options of its own"),
}
INTERRUPTED = 130  # what shells expect of a command that Ctrl-C has ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command by its arguments, those of the process if None; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="nanovllm", description=nanovllm.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=nanovllm.__version__)
    lines = [f"  {name:<11}{text}" for name, (_, _, text) in COMMANDS.items()]
    parser.epilog = "\n".join(["commands (nanovllm COMMAND --help tells more):", *lines])
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    command = parser.parse_args(arguments[:1]).command
    try:
        return _run(command, arguments[1:])
    except KeyboardInterrupt:
        return INTERRUPTED
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"nanovllm {command}: {error}", file=sys.stderr)
        return 1


def _run(command: str, arguments: list[str]) -> int:
    name, extra, text = COMMANDS[command]
    if command == "bench":
        return run_bench(arguments)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if extra is None:
            raise
        raise RuntimeError(f'it needs more packages: pip install "nano-vllm[{extra}]" ({error})') from error
    parser = argparse.ArgumentParser(prog=f"nanovllm {command}", description=text)
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments)) or 0
