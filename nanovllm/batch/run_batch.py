"""A file of requests through an engine into a file of results, each line once, whatever is wrong with it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from nanovllm.batch.files import ID_PREFIX, ResultFile, Todo, find_todo, parse_request, read_requests
from nanovllm.batch.iterate import complete
from nanovllm.openai_api.answers import Answer
from nanovllm.openai_api.errors import Refused
from nanovllm.openai_api.protocol import ChatRequest, CompletionRequest
from nanovllm.openai_api.served_model import ServedModel
from nanovllm.outputs import RequestOutput
from nanovllm.reports.progress import Progress
from nanovllm.requests.admission import CheckedRequest

if TYPE_CHECKING:
    from nanovllm.llm import LLM

BODIES = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
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
        answer: to what it asks, as far as results of its prompts are there.
        num_left: prompts whose results are not there.
        failure: what one of them has failed for.
    """

    number: int
    custom_id: str | None = None
    answer: Answer | None = None
    num_left: int = 0
    failure: Refused | None = None


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
        ValueError: there are results that are not to be resumed, or the output is none of a batch; the input is a
            pipe; no tokenizer.
        OSError: a file cannot be read or written, as on a full disk: what was written is whole, and can be resumed.
        RuntimeError: the engine has failed; the same holds.
    """
    if llm.tokenizer is None:
        raise ValueError("the answers are text, and the model has no tokenizer")
    with open(input_path, "rb") as requests:  # before there is a file of results
        if not requests.seekable():
            raise ValueError(f"{os.fspath(input_path)} is read twice, so it must be a file, not a pipe or a terminal")
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
        self.model = ServedModel(llm, model)
        self.results = results
        self.counts = counts

    def answer(self, path: str | os.PathLike[str], todo: Todo, use_tqdm: bool) -> None:
        """Answers what is to be done of the file of requests."""
        llm, counts = self.llm, self.counts
        make_bar = partial(tqdm, initial=todo.num_done) if use_tqdm else False
        with (
            Progress(todo.num_requests, make_bar, llm.computed) as progress,
            closing(complete(llm, self._requests(path, todo))) as results,
        ):
            for (line, index), result in results:
                self._take_in(line, index, result)
                progress.show(counts.num_answered + counts.num_failed)
            progress.show(counts.num_answered + counts.num_failed)

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
            except (Refused, TypeError, ValueError, RecursionError) as error:
                self._fail(line, self.model.refusal(error))
                continue
            line.num_left = len(checked)
            for index, request in enumerate(checked):
                yield (line, index), request

    def _read(self, line: Line, text: bytes, is_repeated: bool) -> list[CheckedRequest]:
        """What a line asks for, which also says what the line is.

        Raises:
            Refused, TypeError, ValueError: it is no request, or asks for what is not served.
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
        if url not in tuple(BODIES):
            raise ValueError(f"url must be one of {', '.join(BODIES)}, got {url!r:.200}")
        body = BODIES[url].model_validate(request.get("body"))
        self.model.check_name(body.model)
        if body.stream:
            raise ValueError("stream=true is not served in a batch, whose answers are written whole")
        line.answer = Answer(body, self.model.name, self.model.tokenizer)
        prompts = self.model.prompts(body)
        params = body.sampling_params(self.llm.default_sampling_params)
        return [self.llm.intake.check_one(prompt, params, body.priority) for prompt in prompts]

    def _take_in(self, line: Line, index: int, result: RequestOutput) -> None:
        """Adds the result of a line's prompt to its answer, which is written with the last one."""
        line.num_left -= 1
        if "error" in result:
            line.failure = self.model.failure(result["error"], line.answer.body)
        else:
            line.answer.add(index, result)
        if line.num_left == 0 and line.failure is not None:
            self._fail(line, line.failure)
        elif line.num_left == 0:
            self._write(line, 200, line.answer.whole(), None)
            self.counts.num_answered += 1

    def _fail(self, line: Line, refused: Refused) -> None:
        """Writes what is wrong with a line."""
        body = refused.body()
        error = body["error"]
        error["message"] = f"line {line.number}: {error['message']}"
        self._write(line, refused.status, body, {"code": error["type"], "message": error["message"]})
        self.counts.num_failed += 1

    def _write(self, line: Line, status_code: int, body: dict[str, Any], error: dict[str, Any] | None) -> None:
        response = {"status_code": status_code, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
        record = {"id": f"{ID_PREFIX}{line.number}", "custom_id": line.custom_id}
        self.results.write({**record, "response": response, "error": error})
