"""Calls become sequences: checked, with their samples, seeds and texts, and what is compiled before they are queued.

Nothing here knows of steps; a request that is handed to the scheduler is its business.
"""

import functools
import heapq
import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from nanovllm.config import Config
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.inputs import Prompt
from nanovllm.outputs import RequestOutput
from nanovllm.requests.admission import CheckedRequest, Params, check_request, check_requests, with_urgency
from nanovllm.requests.request import Request
from nanovllm.sampling.adjustments import Adjustment, adjusts_logits, bad_word_tokens
from nanovllm.sampling.constraints import make_constraint
from nanovllm.sampling.logprobs import LogprobRecord
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.structured import GrammarCompiler
from nanovllm.text.detokenizer import Detokenizer
from nanovllm.text.tokenizer import Tokenizer

COMPILE_POLL_SECONDS = 0.05
FEW_DEADLINES = 1000  # that may be kept of requests that have ended before
SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that the seeds of 2**64 engines differ


class Intake:
    """Makes requests and hands them to the scheduler, those with a grammar once it is compiled.

    Attributes:
        num_seqs: samples made so far, each of which has its number for an id.
        compiling: requests whose grammar is yet to be compiled.
        deadlines: a heap of the times, as of time.monotonic, at which requests are to end, with their numbers.
    """

    def __init__(
        self, config: Config, tokenizer: Tokenizer | None, defaults: SamplingParams, scheduler: Scheduler
    ) -> None:
        """`defaults` are for requests that bring no parameters; `scheduler` gets what is made here."""
        self.config = config
        self.tokenizer = tokenizer
        self.defaults = defaults
        self.scheduler = scheduler
        self.num_seqs = 0
        self.compiling: dict[Request, Future[Any]] = {}
        self.deadlines: list[tuple[float, int]] = []

    @functools.cached_property
    def grammars(self) -> GrammarCompiler:
        """What compiles grammars; made when the first one is asked for."""
        facts = self.config.model_config
        return GrammarCompiler(self.tokenizer, facts.vocab_size, self.scheduler.eos_token_ids)

    def check(
        self,
        prompts: Prompt | Items[Prompt] | None,
        sampling_params: Params,
        prompt_token_ids: Items[int] | Items[Items[int]] | None = None,
        priority: Items[int] | None = None,
        timeout: float | None = None,
    ) -> list[CheckedRequest]:
        """The requests of a call, see `admission.check_requests`. Whoever asks needs no turn with the engine.

        Raises:
            TypeError, ValueError: a bad prompt or parameter, or a structure that is seen at once not to compile.
        """
        checked = check_requests(
            prompts, sampling_params, self.config, self.tokenizer, self.defaults, prompt_token_ids
        )
        checked = with_urgency(checked, priority, timeout, self.config)
        self._check_structures(checked)
        return checked

    def check_one(
        self, prompt: Prompt, sampling_params: SamplingParams | None, priority: int = 0, timeout: float | None = None
    ) -> CheckedRequest:
        """`check` of a call that takes one prompt."""
        checked = check_request(prompt, sampling_params, self.config, self.tokenizer, self.defaults)
        (checked,) = with_urgency([checked], [priority], timeout, self.config)
        self._check_structures([checked])
        return checked

    def make(
        self,
        checked: CheckedRequest,
        results: dict[int, RequestOutput],
        request_id: str | None = None,
        is_streamed: bool = False,
    ) -> Request:
        """A request whose result is to be put into `results`; not queued yet.

        One with an id comes by `add_request` or the like, and reports progress as its parameters say.
        """
        number, params = self.num_seqs, checked.params
        reports_progress = request_id is not None and params.output_kind is not RequestOutputKind.FINAL_ONLY
        request_id = str(number) if request_id is None else request_id
        request = Request(request_id, checked.prompt, params, results, reports_progress)
        has_text = self.tokenizer is not None and params.detokenize
        for index in range(params.n):
            default_seed = self.config.seed * SEED_STRIDE + number + index
            seed = default_seed if params.seed is None else params.seed + index
            seq = Sequence(number + index, checked.token_ids, params, seed, checked.priority)
            seq.request_number = number
            if params.n > 1 and not self.config.enable_prefix_caching:
                seq.cache_salt = number
            num_prompt_top = params.prompt_logprobs if index == 0 else None
            if params.logprobs is not None or num_prompt_top is not None:
                prompt_len = len(checked.token_ids)
                seq.logprobs = LogprobRecord(params.logprobs, num_prompt_top, prompt_len, self.tokenizer)
            if is_streamed or params.stop or (reports_progress and has_text):
                seq.detokenizer = Detokenizer(
                    self.tokenizer, params.stop, params.include_stop_str_in_output, params.skip_special_tokens
                )
            request.seqs.append(seq)
        self.num_seqs += params.n
        if checked.timeout is not None:
            heapq.heappush(self.deadlines, (time.monotonic() + checked.timeout, number))
        return request

    def queue(self, request: Request) -> None:
        """Hands a request to the scheduler, or has its grammar compiled first, which stops no other request."""
        structure = request.params.structured_outputs
        if structure is None:
            self._hand_on(request, None)
        else:
            self.compiling[request] = self.grammars.compile(structure)

    def take_overdue(self, requests: Mapping[int, Request]) -> list[Request]:
        """Those of the unfinished requests whose time is over; each is told of once."""
        if len(self.deadlines) > 2 * len(requests) + FEW_DEADLINES:  # most are of requests that have ended
            self.deadlines = [deadline for deadline in self.deadlines if deadline[1] in requests]
            heapq.heapify(self.deadlines)
        overdue = []
        while self.deadlines and self.deadlines[0][0] <= time.monotonic():
            _, number = heapq.heappop(self.deadlines)
            if number in requests:
                overdue.append(requests[number])
        return overdue

    def queue_compiled(self, may_wait: bool) -> list[Request]:
        """Hands on the requests whose grammars are compiled; returns those whose grammars failed.

        `may_wait`: there is nothing else to do until one is there.
        """
        if may_wait and self.compiling:
            wait(self.compiling.values(), COMPILE_POLL_SECONDS, FIRST_COMPLETED)
        failed = []
        for request, grammar in list(self.compiling.items()):
            if not grammar.done():
                continue
            del self.compiling[request]
            if grammar.exception() is None:
                self._hand_on(request, grammar.result())
                continue
            request.error = (
                f"request {request.request_id} failed: its structured_outputs do not compile: {grammar.exception()}"
            )
            self.withdraw(request, "error")
            failed.append(request)
        return failed

    def withdraw(self, request: Request, finish_reason: str | None) -> None:
        """Ends the unfinished samples of a request, wherever they stand."""
        self.compiling.pop(request, None)
        for seq in request.seqs:
            if not seq.is_finished:
                seq.finish_reason = finish_reason
                self.scheduler.finish(seq)

    def _check_structures(self, requests: list[CheckedRequest]) -> None:
        for structure in {id(request.params): request.params.structured_outputs for request in requests}.values():
            if structure is not None:
                self.grammars.validate(structure)

    def _hand_on(self, request: Request, grammar: Any) -> None:
        """Queues a request, now that its compiled grammar, if it has one, is there."""
        params, vocab_size = request.params, self.config.model_config.vocab_size
        bad_words = bad_word_tokens(params.bad_words, self.tokenizer, vocab_size)
        end_token_ids = self.scheduler.eos_token_ids.union(params.stop_token_ids)
        for seq in request.seqs:
            if adjusts_logits(params):
                constraint = make_constraint(grammar, bad_words)
                seq.adjustment = Adjustment(params, seq.token_ids, end_token_ids, bad_words, vocab_size, constraint)
            self.scheduler.add(seq)
