"""The routes of the server: OpenAI's API on an AsyncLLM. How bodies, answers and errors look is for others to say."""

import asyncio
import sys
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

import nanovllm
from nanovllm.async_engine.async_llm import AsyncLLM
from nanovllm.inputs import Prompt
from nanovllm.openai_api.answers import Answer
from nanovllm.openai_api.errors import Refused
from nanovllm.openai_api.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from nanovllm.openai_api.served_model import ServedModel
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.errors import from_body, from_http, respond
from nanovllm.server.gate import Gate
from nanovllm.server.prometheus import exposition
from nanovllm.server.streams import DONE, ClientGone, EventStream, event, merge, while_connected

RETRY_SECONDS = 1
CLIENT_GONE = 499  # nginx's status for it, which nobody receives


class Service:
    """What is behind the routes: an engine, its model as requests see it, and the bound on what may wait.

    Attributes:
        num_unfinished: samples that are computed or wait.
    """

    def __init__(self, engine: AsyncLLM, name: str, max_waiting_requests: int) -> None:
        self.engine = engine
        self.model = ServedModel(engine, name)
        self.max_waiting_requests = max_waiting_requests
        self.num_unfinished = 0

    async def answer(self, request: Request, body: CompletionRequest | ChatRequest) -> Response:
        """Answers a request: in one, or as a stream.

        Raises:
            Refused, TypeError, ValueError: it cannot be served.
            RuntimeError: the engine has failed.
        """
        self.model.check_name(body.model)
        prompts = await asyncio.to_thread(self.model.prompts, body)
        params = body.sampling_params(self.engine.default_sampling_params)
        answer, outputs = Answer(body, self.model.name, self.model.tokenizer), self._outputs(body, prompts, params)
        if body.stream:
            chunks = self._chunks(answer, outputs)
            return EventStream(await while_connected(request, anext(chunks)), chunks)
        return JSONResponse(await while_connected(request, self._whole(answer, outputs)))

    async def _whole(self, answer: Answer, outputs: AsyncIterator) -> dict[str, Any]:
        """An answer in one."""
        async for number, output in outputs:
            answer.add(number, output)
        return answer.whole()

    async def _chunks(self, answer: Answer, outputs: AsyncIterator) -> AsyncGenerator[bytes, None]:
        """An answer as events. An error behind the first one, whose status is sent, is an event too."""
        try:
            async for number, output in outputs:
                for chunk in answer.chunks(number, output):
                    yield event(chunk)
            if answer.body.includes_usage:
                yield event(answer.usage_chunk())
        except (Refused, RuntimeError, TypeError, ValueError) as error:
            if not answer.streamed:
                raise
            yield event(self.explain(error).body())
        yield DONE

    async def _outputs(
        self, body: CompletionRequest | ChatRequest, prompts: list[Prompt], params: SamplingParams
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """The outputs of all prompts, as they come, each with its prompt's number."""
        with self._admitted(len(prompts) * body.n):
            calls = [self.engine.generate(prompt, params, priority=body.priority) for prompt in prompts]
            async for number, output in merge(calls):
                if "error" in output:
                    raise self.model.failure(output["error"], body)
                yield number, output

    @contextmanager
    def _admitted(self, number: int) -> Iterator[None]:
        """Counts so many samples as unfinished. Raises Refused if they are too many, now or at any time."""
        num_seqs = self.engine.config.max_num_seqs
        most = num_seqs + self.max_waiting_requests
        if number > most:
            raise Refused(400, f"a request must have at most {most} prompts, each counted n times, got {number}")
        if self.num_unfinished + number > most:
            raise Refused(
                429,
                f"{self.num_unfinished} requests are there, of which {num_seqs} can run and "
                f"{self.max_waiting_requests} may wait; try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        self.num_unfinished += number
        try:
            yield
        finally:
            self.num_unfinished -= number

    def describe_model(self) -> dict[str, Any]:
        """The model, as OpenAI's API lists it."""
        fields = {"id": self.model.name, "object": "model", "created": int(time.time()), "owned_by": "nanovllm"}
        return fields | {"max_model_len": self.engine.config.max_model_len}

    def explain(self, error: Exception) -> Refused:
        """What a client is told of an error; of those of the server, little."""
        if isinstance(error, (Refused, TypeError, ValueError, RecursionError)):
            return self.model.refusal(error)
        if self.engine.failure is not None:
            return Refused(503, "the engine has failed, or is closed")
        return Refused(500, "the server has made a mistake")


def build_app(
    engine: AsyncLLM, name: str, api_keys: list[str], max_body_bytes: int, max_waiting_requests: int
) -> FastAPI:
    """The application that serves an engine under a model's name; without keys, to everyone."""
    service = Service(engine, name, max_waiting_requests)
    app = FastAPI(title=name, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, api_keys=api_keys, max_body_bytes=max_body_bytes)
    add_error_handlers(app, service)
    add_generation_routes(app, service)
    add_other_routes(app, service)
    return app


def add_error_handlers(app: FastAPI, service: Service) -> None:
    """Has every error answered in OpenAI's form."""

    async def refuse(request: Request, error: Exception) -> Response:
        refused = service.explain(error)
        if refused.status == 500 and isinstance(error, RuntimeError):  # others are shown by the framework
            traceback.print_exception(error, file=sys.stderr)
        return respond(refused)

    for kind in (Refused, TypeError, ValueError, RuntimeError, Exception):
        app.add_exception_handler(kind, refuse)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> Response:
        return respond(from_body(error))

    @app.exception_handler(HTTPException)
    async def refuse_request(request: Request, error: HTTPException) -> Response:
        return respond(from_http(error))

    @app.exception_handler(ClientGone)
    async def give_up(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_GONE)


def add_generation_routes(app: FastAPI, service: Service) -> None:
    """What generates text."""

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await service.answer(request, body)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await service.answer(request, body)


def add_other_routes(app: FastAPI, service: Service) -> None:
    """What tells of the server, its model and its tokenizer."""
    engine = service.engine

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return (resources.files("nanovllm.server") / "static" / "index.html").read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> Response:
        engine.check_health()
        return Response()

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": nanovllm.__version__}

    @app.get("/metrics")
    def metrics() -> Response:  # in a thread, as it waits for the end of a step
        return Response(exposition(engine.get_metrics(), service.model.name), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [service.describe_model()]}

    @app.get("/v1/models/{model:path}")
    async def describe_model(model: str) -> dict[str, Any]:
        service.model.check_name(model)
        return service.describe_model()

    @app.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> Response:  # in a thread, as its answer may be long
        service.model.check_name(body.model)
        tokenizer = require_tokenizer(service)
        if body.messages is not None:
            token_ids = service.model.render(body)["prompt_token_ids"]
        else:
            token_ids = tokenizer.encode(body.prompt, body.add_special_tokens)
        texts = {"token_strs": list(map(tokenizer.token_text, token_ids))} if body.return_token_strs else {}
        facts = {"count": len(token_ids), "max_model_len": engine.config.max_model_len, "tokens": token_ids}
        return JSONResponse(facts | texts)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        service.model.check_name(body.model)
        return {"prompt": await asyncio.to_thread(require_tokenizer(service).decode, body.tokens, False)}


def require_tokenizer(service: Service) -> Any:
    """The engine's tokenizer. Raises ValueError if it has none."""
    if service.engine.tokenizer is None:
        raise ValueError("the model has no tokenizer")
    return service.engine.tokenizer
