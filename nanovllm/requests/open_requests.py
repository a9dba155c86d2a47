"""The requests of an engine that have not finished, and what is to be handed out of those that came by `add_request`.

Whoever calls a method has the turn with the engine. Nothing here knows how a step is computed.
"""

from collections.abc import Iterable

from nanovllm.config import Config
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestOutput
from nanovllm.reports.metrics import EndedRequests
from nanovllm.requests.intake import Intake
from nanovllm.requests.request import Request
from nanovllm.text.tokenizer import Tokenizer


class OpenRequests(dict[int, Request]):
    """The unfinished requests of all callers, by their numbers.

    Attributes:
        numbers: of those that came by `add_request`, by their ids.
        results: of finished ones that `step` has yet to hand out, by number.
        progressed: unfinished ones that have something to be handed out.
        ended: what is counted of those that are not here any more.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer | None, intake: Intake) -> None:
        """`intake` hands on what is added here, and takes back what is dropped."""
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.intake = intake
        self.numbers: dict[str, int] = {}
        self.results: dict[int, RequestOutput] = {}
        self.progressed: dict[int, Request] = {}
        self.ended = EndedRequests()

    def add(self, request: Request) -> None:
        """Queues a request."""
        self[request.number] = request
        self.intake.queue(request)

    def new_id(self, request_id: str | None) -> str:
        """The id of a request to be added: the one given, or else its number.

        Raises:
            ValueError: an unfinished request has it.
        """
        request_id = str(self.intake.num_seqs) if request_id is None else request_id
        if request_id in self.numbers:
            raise ValueError(f"request_id must be of no unfinished request, got {request_id!r}")
        return request_id

    def take_in(self, batch: Batch, finished: list[Sequence]) -> None:
        """Puts down the results of requests whose last sample is among those that a step's tokens have ended."""
        ended = dict.fromkeys(self[seq.request_number] for seq in finished)
        for seq in finished:
            if seq.finish_reason == "error":
                request = self[seq.request_number]
                request.error = request.explain(seq, self.config)
        for request in ended:
            if request.is_finished:
                self._finish(request)
        for seq in batch.seqs[: batch.num_samples]:
            request = self.get(seq.request_number)
            if request is not None and request.reports_progress:
                self.progressed[seq.request_number] = request

    def end_overdue(self) -> None:
        """Ends the requests whose time is over."""
        for request in self.intake.take_overdue(self):
            self.drop(request.number, "timeout")
            self._finish(request)

    def queue_compiled(self, may_wait: bool) -> None:
        """Queues the requests whose grammars are compiled, see `Intake.queue_compiled`; ends those that failed."""
        for request in self.intake.queue_compiled(may_wait):
            self._finish(request)

    def abort(self, request_ids: Iterable[int | str]) -> None:
        """Ends the unfinished among some requests; only calls that wait for one get what there is of it."""
        for name in request_ids:
            number = self.numbers.get(name) if isinstance(name, str) else name
            request = self.get(number)
            if request is not None:
                self.drop(number, "abort")
                if request.results is not self.results:
                    self._finish(request)

    def drop(self, number: int, finish_reason: str | None = None) -> None:
        """Ends a request without a result if it has not finished."""
        request = self.get(number)
        if request is not None:
            self.intake.withdraw(request, finish_reason)
            self._forget(request)

    def hand_out(self) -> list[RequestOutput]:
        """What the added requests have new, each once."""
        outputs = [request.output(self.tokenizer) for request in self.progressed.values()]
        outputs += self.results.values()
        self.progressed.clear()
        self.results.clear()
        return outputs

    def _finish(self, request: Request) -> None:
        """Puts down the result of a request whose samples have ended."""
        self._forget(request)
        request.results[request.number] = request.output(self.tokenizer)

    def _forget(self, request: Request) -> None:
        """Takes a request out of the unfinished ones, if it is one of them."""
        if self.pop(request.number, None) is not None:
            self.ended.count(request)
        self.progressed.pop(request.number, None)
        if self.numbers.get(request.request_id) == request.number:
            del self.numbers[request.request_id]
