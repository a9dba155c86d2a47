"""Requests in, steps, results out."""

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from nanovllm.config import Config
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.model_runner import StepOutput
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_input import step_input
from nanovllm.engine.worker import RankGroup
from nanovllm.sampling_params import SamplingParams

Prompt = str | Items[int]
Params = SamplingParams | Items[SamplingParams] | None  # for all prompts, one for each, or the defaults
LISTS = (list, tuple, np.ndarray)  # the types of a list of prompts or token ids
POLL_SECONDS = 2e-5
SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that the seeds of 2**64 engines differ


class LLMEngine:
    """Drives a scheduler and the ranks; with async scheduling, one step behind what it launches."""

    failure: str | None = "it was not started"

    def __init__(self, model: str, **options: Any) -> None:
        """Starts an engine for a model folder or hub name; `options` are those of Config.

        Raises:
            TypeError, ValueError: an option, the checkpoint or the memory does not do.
            RuntimeError: a rank failed, or the GPU's memory did not suffice.
        """
        self.config = config = Config.create(model, options)
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
            self.scheduler = Scheduler(config, num_blocks)
        except (TypeError, ValueError):
            self.close()
            raise
        except BaseException as error:
            self._die(error)
        self.in_flight: tuple[Batch, StepOutput] | None = None
        self.requests: dict[int, Sequence] = {}  # unfinished, by id
        self.results: dict[int, dict[str, Any]] = {}  # finished, not yet handed out
        self.num_requests = 0
        self.num_computed = np.zeros(2)  # tokens, of prompts and of decodes
        self.failure = None
        print(f"nano-vllm: {config.model_config.architecture} in {config.dtype} on {config.tensor_parallel_size} x",
            f"{config.device}; attention by {config.attention_backend} ({config.attention_reason}); KV cache of",
            f"num_kvcache_blocks={num_blocks} x {config.kvcache_block_size} tokens", file=sys.stderr)  # fmt: skip

    # ---- driving the engine ---------------------------------------------------------------------------------------

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queues a prompt (a string or token ids) and returns the request's id.

        Raises:
            TypeError, ValueError: a bad prompt or parameter; nothing is queued.
        """
        self._check_alive()
        return self._add(*self._checked(prompt, sampling_params or SamplingParams())).seq_id

    def step(self) -> list[tuple[int, dict[str, Any]]]:
        """Runs a step; returns (id, result) of the requests that finished and were not handed out before."""
        self._check_alive()
        self._advance()
        finished, self.results = self.results, {}
        return list(finished.items())

    def is_finished(self) -> bool:
        """Whether no request is unfinished and no result is waiting to be handed out."""
        return not self.requests and not self.results

    def abort_request(self, request_id: int) -> None:
        """Drops a request and what it holds; does nothing if it has finished."""
        self._check_alive()
        if request_id in self.requests:
            self._drop([request_id])

    def generate(self, prompts: Prompt | Items[Prompt], sampling_params: Params = None,
            use_tqdm: bool = True) -> list[dict[str, Any]]:  # fmt: skip
        """Completes prompts: strings or lists of token ids, or a single one of these.

        Args:
            prompts: what to complete.
            sampling_params: for all prompts, or a list with one for each; the defaults if None.
            use_tqdm: show a progress bar.

        Returns:
            For each prompt, in order, a dict with `text`, `token_ids`, `finish_reason` ("stop" or "length") and
            `num_cached_tokens`, the tokens of the prompt that the prefix cache had.

        Raises:
            TypeError, ValueError: a bad prompt or parameter; nothing is queued then.
            RuntimeError: the engine has failed or is closed.
        """
        self._check_alive()
        if not isinstance(prompts, LISTS) or (len(prompts) and isinstance(prompts[0], (int, np.integer))):
            prompts = [prompts]
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if not isinstance(sampling_params, (list, tuple)):
            raise TypeError(f"sampling_params must be SamplingParams or a list of them, got {sampling_params!r}")
        if len(sampling_params) != len(prompts):
            raise ValueError(f"sampling_params has {len(sampling_params)} entries for {len(prompts)} prompts")
        requests = [self._checked(*request) for request in zip(prompts, sampling_params, strict=True)]
        ids = range(self.num_requests, self.num_requests + len(requests))
        try:
            for token_ids, params in requests:
                self._add(token_ids, params)
            start, num_before, remaining = time.perf_counter(), self.num_computed.copy(), set(ids)
            with tqdm(total=len(ids), desc="Requests", disable=not use_tqdm, dynamic_ncols=True) as bar:
                while remaining:
                    if finished := remaining.intersection(self._advance()):
                        remaining -= finished
                        prefill, decode = (self.num_computed - num_before) / (time.perf_counter() - start)
                        bar.set_postfix_str(f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s", refresh=False)
                        bar.update(len(finished))
            return [self.results[request_id] for request_id in ids]
        finally:
            self._drop(ids)

    def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes."""
        self._check_alive()
        self.scheduler.block_manager.reset_prefix_cache()

    def exit(self) -> None:
        """Ends the ranks and frees their memory. Can be called again; unfinished requests are lost."""
        self.failure = self.failure or "it was closed"
        with deferred_interrupt():
            self.ranks.close()

    close = exit

    # ---- inside -----------------------------------------------------------------------------------------------

    def _advance(self) -> list[int]:
        """Launches the next step, then takes in the tokens of the one before; returns the ids that finished."""
        with deferred_interrupt(second_breaks=True):
            try:
                batch = self.scheduler.schedule()
                launched = (batch, self.ranks.call("run", step_input(batch))) if batch.seqs else None
                if self.config.async_scheduling:
                    launched, self.in_flight = self.in_flight, launched
                return self._take_in(*launched) if launched else []
            except BaseException as error:
                self._die(error)

    def _take_in(self, batch: Batch, output: StepOutput) -> list[int]:
        tokens, event = output
        if event is not None:
            while self.config.tensor_parallel_size > 1 and not event.query():
                self.ranks.check()  # a rank that died would leave the others waiting for ever
                time.sleep(POLL_SECONDS)
            event.synchronize()
        tokens = tokens.tolist()
        finished = self.scheduler.postprocess(batch, [tokens[row] for row in batch.rows[: batch.num_samples]])
        num_decodes = batch.num_tokens.count(1)
        self.num_computed += sum(batch.num_tokens) - num_decodes, num_decodes
        for seq in finished:
            del self.requests[seq.seq_id]
            self.results[seq.seq_id] = self._result(seq)
        if not self.requests:
            self.in_flight = None  # only surplus tokens
        return [seq.seq_id for seq in finished]

    def _result(self, seq: Sequence) -> dict[str, Any]:
        token_ids = seq.completion_token_ids
        if seq.detokenizer is None and self.tokenizer is not None:
            seq.detokenizer = Detokenizer(self.tokenizer, seq.token_ids[: seq.num_prompt_tokens], ())
            # Without stop strings, "stop" means that the last token is one that ends the text.
            seq.detokenizer.push(token_ids[:-1] if seq.finish_reason == "stop" else token_ids)
        return {"text": seq.detokenizer.text if seq.detokenizer else "", "token_ids": token_ids,
            "finish_reason": seq.finish_reason, "num_cached_tokens": seq.num_cached_tokens}  # fmt: skip

    def _add(self, token_ids: list[int], params: SamplingParams, is_streamed: bool = False) -> Sequence:
        seed = self.config.seed * SEED_STRIDE + self.num_requests if params.seed is None else params.seed
        seq = Sequence(self.num_requests, token_ids, params, seed)
        if is_streamed or params.stop:
            seq.detokenizer = Detokenizer(self.tokenizer, token_ids, params.stop)
        with deferred_interrupt():
            self.num_requests += 1
            self.requests[seq.seq_id] = seq
            self.scheduler.add(seq)
        return seq

    def _drop(self, request_ids: Items[int]) -> None:
        """Forgets requests, whether or not they have finished."""
        with deferred_interrupt():
            for request_id in request_ids:
                self.results.pop(request_id, None)
                seq = self.requests.pop(request_id, None)
                if seq is not None and self.failure is None:
                    self.scheduler.finish(seq)

    def _checked(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], SamplingParams]:
        """The prompt's token ids and the parameters of a request that can be completed."""
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, got {params!r}")
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer, the model has none")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"the model has no tokenizer: a prompt must be token ids, got {prompt[:50]!r}")
            prompt = self.tokenizer.encode(prompt).ids
        if not isinstance(prompt, LISTS):
            raise TypeError(f"a prompt must be a string or a list of token ids, got {prompt!r}")
        token_ids = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
        vocab_size, limit = self.config.model_config.vocab_size, self.config.max_model_len
        if not 0 < len(token_ids) < limit:
            raise ValueError(f"a prompt must have tokens, but fewer than max_model_len={limit}, got {len(token_ids)}")
        for kind in (kinds := set(map(type, token_ids))):
            if kind is bool or not issubclass(kind, (int, np.integer)):
                raise TypeError(f"a prompt's token ids must be ints, got a {kind.__name__} in {token_ids!r}")
        if wrong := [token_id for token_id in token_ids if not 0 <= token_id < vocab_size]:
            raise ValueError(f"a prompt's token ids must be between 0 and {vocab_size - 1}, got {wrong[0]}")
        is_ready = isinstance(token_ids, list) and kinds == {int}
        return token_ids if is_ready else list(map(int, token_ids)), params

    def _check_alive(self) -> None:
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


def load_tokenizer(folder: str) -> Tokenizer | None:
    """The tokenizer of a model folder, None if it has none; ValueError if it cannot be used."""
    path = os.path.join(folder, "tokenizer.json")
    if os.path.exists(path):
        tokenizer = Tokenizer.from_file(path)
        tokenizer.no_truncation()  # the file may hold what the training set up
        tokenizer.no_padding()
        return tokenizer
    if not os.path.exists(os.path.join(folder, "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer  # converts older formats, but takes seconds to import

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer in {folder!r} is of a kind that the tokenizers package does not know")
    return tokenizer.backend_tokenizer


@contextmanager
def deferred_interrupt(second_breaks: bool = False) -> Iterator[None]:
    """Lets Ctrl-C take effect only behind the block; a second one at once if the block may take long."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[int] = []

    def defer(number: int, frame: object) -> None:
        received.append(number)
        if second_breaks and len(received) == 2:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, defer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        signal.raise_signal(signal.SIGINT)
