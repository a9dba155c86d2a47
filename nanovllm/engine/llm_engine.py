"""Requests in, steps, results out. Knows nothing of how a step is computed, nor of how text is split into tokens."""

import os
import sys
import time
import weakref
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

from tqdm.auto import tqdm

from nanovllm.config import Config
from nanovllm.engine.admission import Params, Prompt, check_request, list_requests
from nanovllm.engine.model_runner import StepOutput
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_input import build_step_input
from nanovllm.outputs import RequestError, Result
from nanovllm.parallel.ranks import RankGroup
from nanovllm.parallel.turns import Turns, deferred_interrupt
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.detokenizer import REPLACEMENT, Detokenizer
from nanovllm.text.tokenizer import load_tokenizer

POLL_SECONDS = 2e-5
SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that the seeds of 2**64 engines differ


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
        self.turns = Turns()
        self.dropped: list[int] = []  # requests that whoever has the turn drops at its end
        self.ranks = RankGroup(config)
        # When nobody has the engine any more, at the latest when the interpreter exits.
        weakref.finalize(self, deferred_interrupt()(self.ranks.close))
        try:
            with deferred_interrupt():
                self.ranks.spawn()
            self.tokenizer = load_tokenizer(config.model)
            self.ranks.load()
            num_blocks = self.ranks.call("allocate_kv_cache")
            if config.device == "cuda" and not config.enforce_eager:
                self.ranks.call("capture_cudagraph")
            self.ranks.check()
            self.scheduler = Scheduler(config, num_blocks, self._eos_token_ids())
        except (TypeError, ValueError):
            self.close()
            raise
        except BaseException as error:
            self._die(error)
        self.in_flight: LaunchedStep | None = None  # its tokens are yet to be seen
        self.requests: dict[int, Sequence] = {}  # unfinished, by id
        self.results: dict[int, Result] = {}  # of finished requests that `step` has yet to hand out
        self.num_requests = 0
        self.num_prefilled = self.num_decoded = 0  # tokens that the steps seen so far have computed
        self.failure = None
        print(
            f"nano-vllm: {config.model_config.architecture} in {config.dtype} on {config.tensor_parallel_size} x",
            f"{config.device}; attention by {config.attention_backend} ({config.attention_reason}); KV cache of",
            f"num_kvcache_blocks={num_blocks} x {config.kvcache_block_size} tokens",
            file=sys.stderr,
        )

    # ---- driving the engine ---------------------------------------------------------------------------------------

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queues a prompt (a string or token ids) and returns the request's id; `step` hands out its result.

        Raises:
            TypeError, ValueError: a bad prompt or parameter; nothing is queued.
            RuntimeError: the engine has failed or is closed.
        """
        self._check_alive()
        token_ids, params = check_request(prompt, sampling_params or SamplingParams(), self.config, self.tokenizer)
        with self._turn():
            return self._add(token_ids, params, self.results).seq_id

    def step(self) -> list[tuple[int, Result]]:
        """Runs a step; returns (id, result) of the added requests that have finished and were not handed out before.

        A request that failed has the `finish_reason` "error", and its result says why under `error`.
        """
        with self._turn(second_breaks=True):
            self._advance()
        with self.turns.take():
            finished = list(self.results.items())
            self.results.clear()
        return finished

    def is_finished(self) -> bool:
        """Whether no request is unfinished, of any thread, and no result is waiting to be handed out."""
        return not self.requests and not self.results

    def abort_request(self, request_id: int) -> None:
        """Drops a request and what it holds; does nothing if it has finished.

        No result of an added request will be handed out. A call in another thread that waits for the request gets what
        there is of it, with the `finish_reason` "abort".
        """
        with self._turn():
            seq = self.requests.get(request_id)
            if seq is None:
                return
            self._drop_now(request_id)
            if seq.results is not self.results:
                seq.finish_reason = "abort"
                seq.results[request_id] = self._result(seq)

    def generate(
        self, prompts: Prompt | Items[Prompt], sampling_params: Params = None, use_tqdm: bool = True
    ) -> list[Result]:
        """Completes prompts: strings or lists of token ids, or a single one of these.

        Args:
            prompts: what to complete.
            sampling_params: for all prompts, or a list with one for each; the defaults if None.
            use_tqdm: show a progress bar.

        Returns:
            For each prompt, in order, a dict with `text`, `token_ids`, `finish_reason` ("stop" or "length"; "abort" if
            another thread aborted it) and `num_cached_tokens`, the tokens of the prompt that the prefix cache had.

        Raises:
            TypeError, ValueError: a bad prompt or parameter; nothing is queued then.
            RequestError: a request failed, as it says; the others were completed, and are in its `results`.
            RuntimeError: the engine has failed or is closed.
        """
        self._check_alive()
        requests = [
            check_request(prompt, params, self.config, self.tokenizer)
            for prompt, params in list_requests(prompts, sampling_params)
        ]
        results: dict[int, Result] = {}
        ids = range(0)
        try:
            with self._turn():
                ids = range(self.num_requests, self.num_requests + len(requests))
                for token_ids, params in requests:
                    self._add(token_ids, params, results)
            start, num_prefilled, num_decoded = time.perf_counter(), self.num_prefilled, self.num_decoded
            num_finished = len(results)
            with tqdm(total=len(ids), desc="Requests", disable=not use_tqdm, dynamic_ncols=True) as bar:
                while num_finished < len(ids):
                    with self._turn(second_breaks=True):
                        if len(results) < len(ids):  # else another thread's step was the last one needed
                            self._advance()
                    num_shown, num_finished = num_finished, len(results)
                    if num_finished > num_shown:
                        seconds = time.perf_counter() - start
                        prefill = (self.num_prefilled - num_prefilled) / seconds
                        decode = (self.num_decoded - num_decoded) / seconds
                        bar.set_postfix_str(f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s", refresh=False)
                        bar.update(num_finished - num_shown)
        finally:
            self._drop(ids)
        ordered = [results[request_id] for request_id in ids]
        for result in ordered:
            if result["finish_reason"] == "error":
                raise RequestError(result["error"], ordered)
        return ordered

    def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes."""
        with self._turn():
            self.scheduler.block_manager.reset_prefix_cache()

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
    def _turn(self, second_breaks: bool = False) -> Iterator[None]:
        """This thread's turn with an engine that is alive; see `Turns.take`."""
        with self.turns.take(second_breaks):
            self._check_alive()
            try:
                yield
            finally:
                self._drop_asked()

    def _advance(self) -> None:
        """Launches the next step, then takes in the tokens of the one before. For whoever has the turn."""
        # The current step is launched before the tokens of the previous one are seen: it was chosen from lengths
        # alone, and each row's last token is on the device. So the GPU has work while the host does its own. An end
        # by length is known beforehand; one by EOS or a stop is only seen now, with one more token of the sequence
        # on its way, which is dropped when the current step is seen. Without async scheduling, a step is seen at once.
        try:
            previous, current = self.in_flight, self._launch()
            if self.config.async_scheduling:
                self.in_flight = current
                seen = previous
            else:
                seen = current
            if seen is not None:
                self._take_in(seen)
        except BaseException as error:
            self._die(error)

    def _launch(self) -> LaunchedStep | None:
        """Starts the next step on all ranks; None if there is nothing to compute."""
        batch = self.scheduler.schedule()
        if not batch.seqs:
            return None
        return LaunchedStep(batch, self.ranks.call("run", build_step_input(batch)))

    def _take_in(self, step: LaunchedStep) -> None:
        """Waits for a step's tokens, gives them to their sequences, and puts down the results of those that ended."""
        batch, (tokens, event) = step
        if event is not None:
            while self.config.tensor_parallel_size > 1 and not event.query():
                self.ranks.check()  # a rank that died would leave the others waiting for ever
                time.sleep(POLL_SECONDS)
            event.synchronize()
        token_by_row = tokens.tolist()
        finished = self.scheduler.postprocess(batch, [token_by_row[row] for row in batch.rows[: batch.num_samples]])
        num_decodes = batch.num_tokens.count(1)
        self.num_prefilled += sum(batch.num_tokens) - num_decodes
        self.num_decoded += num_decodes
        for seq in finished:
            del self.requests[seq.seq_id]
            seq.results[seq.seq_id] = self._result(seq)
        if not self.requests:
            self.in_flight = None  # only surplus tokens

    def _result(self, seq: Sequence) -> Result:
        """What a request that has ended gives back."""
        token_ids = seq.completion_token_ids
        if seq.detokenizer is not None:
            text = seq.detokenizer.text
        elif self.tokenizer is not None:
            # Without stop strings, "stop" means that the last token is one that ends the text.
            ids = token_ids[:-1] if seq.finish_reason == "stop" else token_ids
            text = self.tokenizer.decode(ids).rstrip(REPLACEMENT)
        else:
            text = ""
        result = {
            "text": text,
            "token_ids": token_ids,
            "finish_reason": seq.finish_reason,
            "num_cached_tokens": seq.num_cached_tokens,
        }
        if seq.finish_reason == "error":
            result["error"] = (
                f"request {seq.seq_id} failed: after its prompt of {seq.num_prompt_tokens} tokens and "
                f"{len(token_ids)} more, the logits hold no finite maximum; check dtype={self.config.dtype!r}, as "
                f"float16 overflows where others do not, and the weights in {self.config.model!r}, which may hold NaN"
            )
        return result

    def _add(
        self, token_ids: list[int], params: SamplingParams, results: dict[int, Result], is_streamed: bool = False
    ) -> Sequence:
        """Queues a request whose result is to be put into `results`. For whoever has the turn."""
        seed = self.config.seed * SEED_STRIDE + self.num_requests if params.seed is None else params.seed
        seq = Sequence(self.num_requests, token_ids, params, seed)
        seq.results = results
        if is_streamed or params.stop:
            seq.detokenizer = Detokenizer(self.tokenizer, params.stop)
        self.num_requests += 1
        self.requests[seq.seq_id] = seq
        self.scheduler.add(seq)
        return seq

    def _drop(self, request_ids: Items[int]) -> None:
        """Forgets the unfinished of some requests, of a call that has ended."""
        self.dropped.extend(request_ids)  # if Ctrl-C ends the waiting below, another thread does it
        if not self.turns.is_mine():  # as where the garbage collector ends a stream in the middle of a step
            with self.turns.take():
                self._drop_asked()

    def _drop_asked(self) -> None:
        """Drops the requests that were to be dropped. For whoever has the turn."""
        while self.dropped:
            self._drop_now(self.dropped.pop())

    def _drop_now(self, request_id: int) -> None:
        """Ends a request without a result if it has not finished."""
        seq = self.requests.pop(request_id, None)
        if seq is not None and self.failure is None:
            self.scheduler.finish(seq)

    def _eos_token_ids(self) -> frozenset[int]:
        """What ends a text by the model's files or by the tokenizer's: fine-tunes may change the latter alone."""
        of_tokenizer = self.tokenizer.eos_token_id if self.tokenizer is not None else None
        return self.config.model_config.eos_token_ids | ({of_tokenizer} - {None})

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
