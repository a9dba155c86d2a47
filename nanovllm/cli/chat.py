"""`nanovllm chat`."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing, suppress
from dataclasses import replace

from nanovllm.chat.template import Message
from nanovllm.cli.engine_options import MODEL_HELP, add_engine_arguments, json_object, read_options
from nanovllm.llm import LLM
from nanovllm.outputs import RequestError
from nanovllm.sampling_params import SamplingParams

PROMPT = "> "
HELP = "/reset begins anew, /exit or Ctrl-D ends; Ctrl-C ends an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--system", help="the system's message, with which a conversation begins")
    parser.add_argument("--params", type=json_object, default={}, metavar="JSON", help="SamplingParams of the answers")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Chats until the user ends it."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` a history and keys to edit a line
    beginning = [{"role": "system", "content": args.system}] if args.system else []
    with LLM(**read_options(args)) as llm:
        params = replace(llm.default_sampling_params, **{"max_tokens": None} | args.params)
        # What cannot be answered at all is refused before anyone has said anything; nothing is queued by this.
        llm.stream([*beginning, {"role": "user", "content": "?"}], params)
        print(HELP)
        messages = list(beginning)
        while True:
            text = read_line()
            if text in (None, "/exit"):
                return 0
            if text == "/reset":
                messages = list(beginning)
            elif text.startswith("/"):
                print(HELP)
            elif text:
                messages.append({"role": "user", "content": text})
                answer = show_answer(llm, messages, params)
                if answer:
                    messages.append({"role": "assistant", "content": answer})
                else:
                    messages.pop()


def read_line() -> str | None:
    """What the user says; None if that is all."""
    try:
        return input(PROMPT).strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def show_answer(llm: LLM, messages: list[Message], params: SamplingParams) -> str:
    """Prints an answer piece by piece, as far as Ctrl-C lets it come; returns what was printed."""
    pieces: list[str] = []
    try:
        with closing(llm.stream(messages, params)) as stream:
            for piece in stream:
                pieces.append(piece)
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    except (RequestError, ValueError) as error:  # as where the conversation is longer than max_model_len
        print(f"{error} (/reset begins anew)", file=sys.stderr)
    print()
    return "".join(pieces)
