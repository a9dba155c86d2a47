"""What a request gives back: dicts, as nano-vllm's scripts read them, whose keys are attributes, as vLLM's read them.

So they print, compare, pickle and go through `json.dumps` and `pandas.DataFrame` as dicts do. Knows of nothing else.
"""

from typing import NamedTuple

from nanovllm.compat.record import Record


class Logprob(NamedTuple):
    """The log of a token's probability, before temperature, filters and penalties.

    Attributes:
        rank: 1 for the most likely token of the vocabulary.
        decoded_token: the text of the token alone, None without a tokenizer.
    """

    logprob: float
    rank: int | None
    decoded_token: str | None


Logprobs = dict[int, Logprob]  # of one position, by token id


class RequestMetrics(Record):
    """When what happened to a request, in seconds of `time.time`; None for what has not happened."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float | None


class CompletionOutput(Record):
    """One sample of a request.

    Attributes:
        index: which of the request's `n` it is.
        text: of the tokens, without stop strings and, unless asked for, without special tokens.
        token_ids: all of them, one that ended the text included.
        cumulative_logprob: the sum of the tokens' logprobs, None where none were asked for.
        logprobs: for each token those that were asked for, the most likely ones and its own; else None.
        finish_reason: "stop", "length", "abort", "timeout", "error", or None while it is unfinished.
        stop_reason: the stop string, or the id of `stop_token_ids`, that ended it; None for the model's own ends.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[Logprobs] | None
    finish_reason: str | None
    stop_reason: str | int | None

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


class RequestOutput(Record):
    """A request's samples, and what is known of it.

    Attributes:
        text, token_ids, finish_reason: those of the first sample, `outputs[0]`.
        num_cached_tokens: tokens of the prompt that the prefix cache had.
        num_draft_tokens, num_accepted_tokens: drafts of the samples' tokens that were checked, and those of them that
            the model would have drawn, surplus ones behind a text's end included; 0 without speculation.
        request_id: the id that the caller gave it, or else its number.
        prompt: the text, None if the prompt was token ids.
        prompt_logprobs: for each token of the prompt, those that were asked for, None for the first; else None.
        outputs: the `n` samples.
        finished: whether all of them are.
        metrics: see `RequestMetrics`.
        error: why it failed; only there if it did.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    num_cached_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[Logprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics


class RequestError(RuntimeError):
    """A request could not be completed, while the engine and all other requests could go on.

    Attributes:
        results: of the call's requests in their order, finished or failed (`finish_reason` is "error" then).
    """

    def __init__(self, message: str, results: list[RequestOutput]) -> None:
        super().__init__(message)
        self.results = results
