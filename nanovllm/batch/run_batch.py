"""A file of requests through an engine into a file of results, each line once, whatever is wrong with it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from nanovllm.batch.files import ID_PREFIX, ResultFile, Todo, find_todo, parse_request, read_requests
from nanovllm.batch.iterate import complete
from nanovllm.batch.openai_requests import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    chat_prompt,
    checked_body,
    completion_prompts,
    sampling_params,
)
from nanovllm.batch.openai_results import chat_body, completion_body, error_body
from nanovllm.outputs import RequestOutput
from nanovllm.requests.admission import CheckedRequest
from nanovllm.requests.progress import Progress

if TYPE_CHECKING:
    from nanovllm.llm import LLM

FIELDS = {"/v1/completions": COMPLETION_FIELDS, "/v1/chat/completions": CHAT_FIELDS}
LINE_FIELDS = ("custom_id", "method", "url", "body")


@dataclass
class Counts:
    """Lines of a batch: those that an earlier run answered, those that were answered since, and those that failed."""

    num_before: int = 0
    num_answered: int = 0
    num_failed: int = 0


@dataclass(eq=False)
class Line:
    """A line of the file of requests, while it is computed.

    Attributes:
        number: counted from 1 on.
        custom_id: None if it has none of its own.
        num_top: of how many most likely tokens the logprobs are asked for.
        results: of its prompts, by their place, as far as they are there.
        num_prompts: how many there will be.
    """

    number: int
    custom_id: str | None = None
    is_chat: bool = False
    num_top: int | None = None
    results: dict[int, RequestOutput] = field(default_factory=dict)
    num_prompts: int = 0


def run_batch(
    llm: LLM,
    input_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    model: str,
    resumes: bool = False,
    use_tqdm: bool = True,
) -> Counts:
    """Answers a file of requests in OpenAI's batch format; results are written as they finish.

    A line that is no request, or that asks for what is not served, gets an error in place of an answer.

    Args:
        llm: computes the answers; it needs a tokenizer.
        input_path, output_path: of the requests and the results, JSON Lines.
        model: what the requests call the model.
        resumes: whether to go on where an earlier run with these files stopped, rather than to refuse the latter's
            results.
        use_tqdm: show a progress bar.

    Raises:
        ValueError: there are results that are not to be resumed, or the output is none of a batch; no tokenizer.
        OSError: a file cannot be read or written, as on a full disk: what was written is whole, and can be resumed.
        RuntimeError: the engine has failed; the same holds.
    """
    if llm.tokenizer is None:
        raise ValueError("the answers are text, and the model has no tokenizer")
    open(input_path, "rb").close()  # before there is a file of results
    with ResultFile(output_path, resumes) as results:
        todo = find_todo(input_path, results.done)
        run = BatchRun(llm, model, results, Counts(num_before=todo.num_done))
        run.answer(input_path, todo, use_tqdm)
    return run.counts


class BatchRun:
    """One run over a file."""

    def __init__(self, llm: LLM, model: str, results: ResultFile, counts: Counts) -> None:
        """Lines are written to `results` and counted in `counts`; the requests call the model `model`."""
        self.llm = llm
        self.model = model
        self.results = results
        self.counts = counts

    def answer(self, path: str | os.PathLike[str], todo: Todo, use_tqdm: bool) -> None:
        """Answers what is to be done of the file of requests."""
        llm, counts = self.llm, self.counts
        make_bar = partial(tqdm, initial=todo.num_done) if use_tqdm else False
        with (
            Progress(todo.num_requests, make_bar, llm.num_prefilled, llm.num_decoded) as progress,
            closing(complete(llm, self._requests(path, todo))) as results,
        ):
            for (line, index), result in results:
                line.results[index] = result
                if len(line.results) == line.num_prompts:
                    self._take_in(line)
                progress.show(counts.num_answered + counts.num_failed, llm.num_prefilled, llm.num_decoded)
            progress.show(counts.num_answered + counts.num_failed, llm.num_prefilled, llm.num_decoded)

    def _requests(self, path: str | os.PathLike[str], todo: Todo) -> Iterator[tuple[tuple[Line, int], CheckedRequest]]:
        """What is to be computed, each with its line and its place there; bad lines are answered at once."""
        # Lines that were added since the file was first read are for another run.
        lines = zip(read_requests(path), todo.is_done, todo.is_repeated, strict=False)
        for (number, text), is_done, is_repeated in lines:
            if is_done:
                continue
            line = Line(number)
            try:
                checked = self._read(line, text, is_repeated)
            except (TypeError, ValueError, RecursionError) as error:
                self._fail(line, str(error), 400)
                continue
            line.num_prompts = len(checked)
            for index, request in enumerate(checked):
                yield (line, index), request

    def _read(self, line: Line, text: bytes, is_repeated: bool) -> list[CheckedRequest]:
        """What a line asks for, which also says what the line is.

        Raises:
            TypeError, ValueError: it is no request, or asks for what is not served.
        """
        request = parse_request(text)
        if is_repeated:
            raise ValueError(f"custom_id {request['custom_id']!r} is that of an earlier line; each must have its own")
        line.custom_id = request["custom_id"]
        for name in request:
            if name not in LINE_FIELDS:
                raise ValueError(f"unknown field {name!r}; a line may have {', '.join(LINE_FIELDS)}")
        if request.get("method", "POST") != "POST":
            raise ValueError(f"method must be POST, got {request['method']!r:.200}")
        url = request.get("url")
        if url not in tuple(FIELDS):
            raise ValueError(f"url must be one of {', '.join(FIELDS)}, got {url!r:.200}")
        body = checked_body(request.get("body"), FIELDS[url])
        if body.get("model", self.model) != self.model:
            raise ValueError(f"model must be {self.model!r}, got {body['model']!r:.200}")
        params = sampling_params(body, self.llm.default_sampling_params)
        line.is_chat, line.num_top = url == "/v1/chat/completions", params.logprobs
        if line.is_chat:
            prompts = [chat_prompt(body, self.llm.chat_template, self.llm.tokenizer)]
        else:
            prompts = completion_prompts(body)
        return [self.llm.intake.check_one(prompt, params, body.get("priority", 0)) for prompt in prompts]

    def _take_in(self, line: Line) -> None:
        """Writes the answer to a line, all of whose results are there."""
        results = [line.results[index] for index in range(line.num_prompts)]
        errors = [result["error"] for result in results if "error" in result]
        if errors:
            self._fail(line, errors[0], 500)
            return
        if line.is_chat:
            body = chat_body(self.model, results[0], line.num_top)
        else:
            body = completion_body(self.model, results)
        self._write(line, 200, body, None)
        self.counts.num_answered += 1

    def _fail(self, line: Line, message: str, status_code: int) -> None:
        """Writes what is wrong with a line."""
        body = error_body(f"line {line.number}: {message}", status_code)
        error = body["error"]
        self._write(line, status_code, body, {"code": error["type"], "message": error["message"]})
        self.counts.num_failed += 1

    def _write(self, line: Line, status_code: int, body: dict[str, Any], error: dict[str, Any] | None) -> None:
        response = {"status_code": status_code, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
        record = {"id": f"{ID_PREFIX}{line.number}", "custom_id": line.custom_id}
        self.results.write({**record, "response": response, "error": error})
