"""Requests in, steps, results out. Knows nothing of how a step is computed, nor of how text is split into tokens."""

import functools
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

from tqdm.auto import tqdm

from nanovllm.compat.engine_args import EngineArgs
from nanovllm.compat.refused_arguments import refuse
from nanovllm.config import Config
from nanovllm.engine.model_runner import StepOutput
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.step_input import build_step_input
from nanovllm.inputs import Prompt
from nanovllm.outputs import RequestError, RequestOutput
from nanovllm.parallel.ranks import RankGroup
from nanovllm.parallel.turns import Turns, deferred_interrupt
from nanovllm.reports.metrics import Metric, read_metrics
from nanovllm.reports.progress import ComputedTokens, Progress
from nanovllm.reports.startup import print_startup
from nanovllm.requests.admission import CheckedRequest, Params, read_added
from nanovllm.requests.intake import Intake
from nanovllm.requests.open_requests import OpenRequests
from nanovllm.sampling.defaults import default_sampling_params
from nanovllm.sampling.logprobs import take_in_logprobs
from nanovllm.sampling.text_end import find_eos_token_ids
from nanovllm.sampling_params import SamplingParams
from nanovllm.speculative.policy import take_in_drafts
from nanovllm.text.tokenizer import load_tokenizer


class LaunchedStep(NamedTuple):
    """A step that the ranks were told of, and where its tokens will be."""

    batch: Batch
    output: StepOutput


class LLMEngine:
    """Drives a scheduler and the ranks; with async scheduling, one step behind what it launches.

    Any number of threads may use one engine. They take turns: a step belongs to the thread that makes it, and computes
    all threads' requests. Each call returns what it asked for; `step` hands out the results of requests that came by
    `add_request`, each once. What fails or is interrupted in one thread drops that call's requests and nothing else.
    After `close`, or once the engine has failed, the calls of all threads end with a RuntimeError that says why.
    """

    failure: str | None = "it was not started"

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        """Starts an engine for a model folder or hub name; `options` are those of Config.

        Raises:
            TypeError, ValueError: an option, the checkpoint or the memory does not do.
            RuntimeError: a rank failed, or the GPU's memory did not suffice.
        """
        self.config = config = Config.create(model, options)
        defaults = default_sampling_params(config)
        self.default_sampling_params = defaults.params
        self.turns = Turns()
        self.ranks = RankGroup(config)
        # When nobody has the engine any more, at the latest when the interpreter exits.
        weakref.finalize(self, deferred_interrupt()(self.ranks.close))
        try:
            with deferred_interrupt():
                self.ranks.spawn()
            self.tokenizer = load_tokenizer(config.tokenizer)
            self.ranks.load()
            described = self.ranks.call("describe_weights")
            num_blocks = self.ranks.call("allocate_kv_cache")
            if config.device == "cuda" and not config.enforce_eager:
                self.ranks.call("capture_cudagraph")
            self.ranks.check()
            self.scheduler = Scheduler(config, num_blocks, find_eos_token_ids(config, self.tokenizer))
            self.intake = Intake(config, self.tokenizer, defaults.params, self.scheduler)
        except (TypeError, ValueError):
            self.close()
            raise
        except BaseException as error:
            self._die(error)
        self.in_flight: deque[LaunchedStep] = deque()  # their tokens are yet to be seen
        self.requests = OpenRequests(config, self.tokenizer, self.intake)
        self.computed = ComputedTokens()  # by the steps seen so far
        if "NANOVLLM_TRACE" in os.environ:
            from nanovllm.trace import record_engine

            record_engine(self, os.environ["NANOVLLM_TRACE"])
        self.failure = None
        print_startup(config, described, num_blocks, defaults)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLMEngine":
        """An engine, as vLLM's scripts make one."""
        return cls(**vars(engine_args))

    # ---- driving the engine ---------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str | Prompt | None = None,
        prompt: Prompt | SamplingParams | None = None,
        params: SamplingParams | None = None,
        *,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> int | str:
        """Queues a prompt, as `add_request(prompt, sampling_params)` or `add_request(request_id, prompt, params)`.

        The same by keywords; without an id, `prompt` may be the first argument or the one of that name. Returns the
        request's id: the one given, or else a number. `step` hands out the results. For `priority` and `timeout`, see
        `generate`.

        Raises:
            TypeError, ValueError: a bad prompt or parameter, or an id in use; nothing is queued.
            RuntimeError: the engine has failed or is closed.
        """
        request_id, prompt, params = read_added(request_id, prompt, params, sampling_params)
        self._check_alive()
        checked = self.intake.check_one(prompt, params, priority, timeout)
        with self._turn():
            name = self.requests.new_id(request_id)
            number = self.requests.numbers[name] = self.submit(checked, self.requests.results, name)
        return number if request_id is None else request_id

    def submit(self, checked: CheckedRequest, results: dict[int, RequestOutput], request_id: str) -> int:
        """Queues a request that `intake` has checked; returns its number, under which `results` will hold its result.

        While it runs, `step` hands out what it has new, by its `output_kind`.
        """
        with self._turn():
            request = self.intake.make(checked, results, request_id)
            self.requests.add(request)
        return request.number

    def step(self) -> list[RequestOutput]:
        """Runs a step; returns what the added requests have new that was not handed out before.

        By the `output_kind` of its parameters, a request is handed out after each of its tokens, with all of its
        tokens so far or those that are new, or once when it has finished. One that failed has the `finish_reason`
        "error", and says why under `error`.
        """
        with self._turn():
            self._advance()
        # In a turn of its own: a Ctrl-C during the step ends the first one, before anything is handed out and lost.
        with self.turns.take():
            return self.requests.hand_out()

    @property
    def num_seqs(self) -> int:
        """Sequences that the requests so far had; the next one's id."""
        return self.intake.num_seqs

    def is_finished(self) -> bool:
        """Whether no request is unfinished, of any thread, and no result is waiting to be handed out."""
        return not self.requests and not self.requests.results

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do or to hand out."""
        return not self.is_finished()

    def get_num_unfinished_requests(self) -> int:
        """How many requests are unfinished, of any thread."""
        return len(self.requests)

    def abort_request(self, request_id: int | str | Items[int | str]) -> None:
        """Drops a request, or several, and what they hold; does nothing about those that have finished.

        No result of an added request will be handed out. A call in another thread that waits for the request gets what
        there is of it, with the `finish_reason` "abort".
        """
        with self._turn():
            self.requests.abort(request_id if isinstance(request_id, (list, tuple, set)) else [request_id])

    def generate(
        self,
        prompts: Prompt | Items[Prompt] | None = None,
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., tqdm] = True,
        lora_request: None = None,
        *,
        prompt_token_ids: Items[int] | Items[Items[int]] | None = None,
        priority: Items[int] | None = None,
        timeout: float | None = None,
        tokenization_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Completes prompts: strings, lists of token ids, dicts that have one of these, or a single one of all that.

        Args:
            prompts: what to complete.
            sampling_params: for all prompts, or a list with one for each; None: the model's defaults.
            use_tqdm: show a progress bar; or what makes one, as `tqdm.tqdm` does.
            lora_request, tokenization_kwargs: not supported.
            prompt_token_ids: the ids of the prompts, as older scripts give them.
            priority: a number for each prompt, with scheduling_policy="priority": lower ones go first, and are
                preempted last.
            timeout: seconds after which a request that is unfinished ends with what there is of it, and with the
                `finish_reason` "timeout".

        Returns:
            For each prompt, in order, its result: see `nanovllm.outputs.RequestOutput`.

        Raises:
            TypeError, ValueError: a bad prompt or parameter; nothing is queued then.
            RequestError: a request failed, as it says; the others were completed, and are in its `results`.
            RuntimeError: the engine has failed or is closed.
        """
        self._check_alive()
        refuse({"lora_request": lora_request, "tokenization_kwargs": tokenization_kwargs})
        checked = self.intake.check(prompts, sampling_params, prompt_token_ids, priority, timeout)
        results: dict[int, RequestOutput] = {}
        numbers: list[int] = []
        try:
            with self._turn():
                for request in checked:
                    numbers.append(self.num_seqs)  # before it is queued, lest an interrupt leave it behind
                    self.requests.add(self.intake.make(request, results))
            self._complete(numbers, results, use_tqdm)
        finally:
            self._drop(numbers)
        ordered = [results[number] for number in numbers]
        for result in ordered:
            if "error" in result:
                raise RequestError(result["error"], ordered)
        return ordered

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; returns whether it did, which is always so."""
        with self._turn():
            self.scheduler.block_manager.reset_prefix_cache()
        return True

    def get_metrics(self) -> list[Metric]:
        """What the engine has done so far, see `reports/metrics.py`. Raises RuntimeError if it has failed."""
        with self._turn():
            return read_metrics(self.scheduler, self.requests.values(), self.requests.ended)

    def exit(self) -> None:
        """Ends the ranks and frees their memory. Can be called again, and from any thread.

        Unfinished requests are lost: whoever waits for one gets a RuntimeError.
        """
        with self.turns.take():
            self.failure = self.failure or "it was closed"
            self.ranks.close()

    close = exit

    # ---- inside -----------------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """This thread's turn with an engine that is alive; see `Turns.take`."""
        with self.turns.take():
            self._check_alive()
            yield

    def _complete(self, numbers: list[int], results: dict[int, RequestOutput], use_tqdm: bool | Callable) -> None:
        """Makes steps until all of some requests have their results."""
        num_finished = len(results)
        with Progress(len(numbers), use_tqdm, self.computed) as progress:
            while num_finished < len(numbers):
                with self._turn():
                    if len(results) < len(numbers):  # else another thread's step was the last one needed
                        self._advance()
                num_finished = len(results)
                progress.show(num_finished)

    def _advance(self) -> None:
        """Launches the next step, then takes in the tokens of the one before. For whoever has the turn."""
        # The current step is launched before the tokens of the previous one are seen: it was chosen from lengths
        # alone, and each row's last token is on the device. So the GPU has work while the host does its own. An end
        # by length is known beforehand; one by EOS or a stop is only seen now, with one more token of the sequence
        # on its way, which is dropped when the current step is seen. Without async scheduling, a step is seen at once.
        try:
            # A second Ctrl-C ends a step that hangs, and the engine with it; nowhere else, lest it cut what gives the
            # turn back, or drops a call's requests.
            with self.turns.breakable():
                launched = self._launch()
                if launched is not None:
                    self.in_flight.append(launched)
                if self.in_flight and (launched is None or len(self.in_flight) > self.config.max_unseen_steps):
                    self._take_in(self.in_flight.popleft())
        except BaseException as error:
            self._die(error)

    def _launch(self) -> LaunchedStep | None:
        """Starts the next step on all ranks; None if there is nothing to compute."""
        self.requests.end_overdue()
        self.requests.queue_compiled(may_wait=self.scheduler.is_finished() and not self.in_flight)
        batch = self.scheduler.schedule()
        if not batch.seqs:
            return None
        tells_texts = self.config.speculation is not None
        tells_last_tokens = self.config.pipeline_parallel_size > 1
        step = build_step_input(batch, self.config.model_config.vocab_size, tells_texts, tells_last_tokens)
        return LaunchedStep(batch, self.ranks.call("run", step))

    def _take_in(self, step: LaunchedStep) -> None:
        """Waits for a step's tokens, gives them to their sequences, and puts down the results of those that ended."""
        batch, output = step
        self.ranks.wait_for(output.event)
        told, sampled_rows = output.tokens.tolist(), batch.rows[: batch.num_samples]
        if self.config.speculation is None:
            token_ids = [[told[row]] for row in sampled_rows]
        else:
            token_ids = take_in_drafts(batch, [told[row] for row in sampled_rows], self.config.speculation)
        take_in_logprobs(batch, token_ids, output.logprobs, output.prompt_logprobs)
        finished = self.scheduler.postprocess(batch, token_ids)
        self.computed.count(batch, token_ids)
        self.requests.take_in(batch, finished)
        if not self.requests:
            self.in_flight.clear()  # only surplus tokens

    def _drop(self, numbers: Items[int]) -> None:
        """Drops what is unfinished of a call's requests: at once, or at the end of the turn that a thread has."""
        self.turns.ask(functools.partial(self._drop_now, numbers))

    def _drop_now(self, numbers: Items[int]) -> None:
        if self.failure is not None:  # the requests ended with the engine
            return
        for number in numbers:
            self.requests.drop(number)

    def _check_alive(self) -> None:
        """Raises RuntimeError if the engine, or a rank of it, has failed."""
        if self.failure is not None:
            raise RuntimeError(f"the engine is dead: {self.failure}")
        try:
            self.ranks.check()
        except RuntimeError as error:
            self._die(error)

    def _die(self, error: BaseException) -> NoReturn:
        """Ends the engine after an error that left host and devices in different states, and raises why."""
        self.failure = self.ranks.cause(error)
        self.exit()
        if isinstance(error, Exception):
            raise RuntimeError(f"the engine is dead: {self.failure}") from error
        raise error
