"""What an engine has done so far, as numbers for a dashboard, under vLLM's names with a prefix of our own.

All is read off the requests: unfinished ones tell what they have so far when someone asks, ended ones are counted
once. So a step costs nothing more. Nothing here knows how numbers are exported.
"""

from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.requests.request import Request

PREFIX = "nanovllm:"
BOUNDS = tuple(digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 5))  # of buckets, in seconds
GAUGES = {
    "num_requests_running": "Sequences that the last step could compute.",
    "num_requests_waiting": "Sequences that wait for a row or for blocks of the KV cache, or for their grammar.",
    "kv_cache_usage_perc": "Share of the KV cache's blocks that sequences hold, 1 being all.",
}
COUNTERS = {
    "prefix_cache_queries": "Tokens of prompts that were looked up in the prefix cache.",
    "prefix_cache_hits": "Those of them that were found.",
    "num_preemptions": "Sequences that were sent back to the queue for want of blocks.",
    "prompt_tokens": "Tokens of prompts that were computed or found.",
    "generation_tokens": "Tokens that were generated.",
    "request_success": "Sequences that ended, by the reason.",
}
HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "request_time_per_output_token_seconds": "Between two tokens of a sequence that finished, on average.",
    "e2e_request_latency_seconds": "From a request's arrival to its end, if it finished.",
    "request_queue_time_seconds": "From a request's arrival to its first step.",
}
HELP = GAUGES | COUNTERS | HISTOGRAMS


@dataclass(frozen=True)
class Metric:
    """A number of an engine; its name has the prefix."""

    name: str
    labels: dict[str, str]


@dataclass(frozen=True)
class Gauge(Metric):
    """What there is now."""

    value: float


@dataclass(frozen=True)
class Counter(Metric):
    """What there has been so far."""

    value: int


@dataclass(frozen=True)
class Histogram(Metric):
    """How often values occurred: for each upper bound ("+Inf" at last) those up to it, then all, and their sum."""

    buckets: dict[str, int]
    count: int
    sum: float


@dataclass
class Distribution:
    """Values, as a histogram counts them."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    sum: float = 0.0

    def observe(self, start: float | None, end: float | None, num_parts: int = 1) -> None:
        """Takes in a part of the time between two moments, if there were both."""
        if start is not None and end is not None and num_parts > 0:
            seconds = (end - start) / num_parts
            self.counts[bisect_left(BOUNDS, seconds)] += 1
            self.sum += seconds

    def histogram(self, name: str) -> Histogram:
        """The metric of the values so far."""
        bounds = [*map("{:g}".format, BOUNDS), "+Inf"]
        buckets = dict(zip(bounds, accumulate(self.counts), strict=True))
        return Histogram(PREFIX + name, {}, buckets, buckets["+Inf"], self.sum)


class EndedRequests:
    """What the requests that have ended add to the metrics."""

    def __init__(self) -> None:
        self.tokens: Counts[str] = Counts()
        self.reasons: Counts[str] = Counts({"stop": 0, "length": 0, "abort": 0, "timeout": 0, "error": 0})
        self.distributions = {name: Distribution() for name in HISTOGRAMS}

    def count(self, request: Request) -> None:
        """Takes in a request that has finished, or is dropped."""
        self.tokens.update(count_tokens(request.seqs))
        first, times = request.seqs[0], self.distributions
        times["time_to_first_token_seconds"].observe(request.arrival_time, first.first_token_time)
        times["request_queue_time_seconds"].observe(request.arrival_time, first.first_scheduled_time)
        for seq in request.seqs:
            self.reasons[seq.finish_reason or "abort"] += 1
            if seq.finish_reason in ("stop", "length"):
                num_gaps = len(seq.completion_token_ids) - 1
                times["request_time_per_output_token_seconds"].observe(
                    seq.first_token_time, seq.finished_time, num_gaps
                )
        if all(seq.finish_reason in ("stop", "length") for seq in request.seqs):
            end = max(seq.finished_time for seq in request.seqs)
            times["e2e_request_latency_seconds"].observe(request.arrival_time, end)


def count_tokens(seqs: Iterable[Sequence]) -> Counts[str]:
    """What sequences have so far of the metrics that count tokens."""
    counts: Counts[str] = Counts()
    for seq in seqs:
        counts["generation_tokens"] += len(seq.completion_token_ids)
        if seq.first_token_time is not None:
            counts["prompt_tokens"] += seq.num_prompt_tokens
        if seq.num_cached_tokens >= 0 and not seq.wants_prompt_logprobs:  # which are computed, cached or not
            counts["prefix_cache_queries"] += seq.num_prompt_tokens
            counts["prefix_cache_hits"] += seq.num_cached_tokens
    return counts


def read_metrics(scheduler: Scheduler, unfinished: Iterable[Request], ended: EndedRequests) -> list[Metric]:
    """All metrics of an engine, in the turn of whoever asks."""
    blocks = scheduler.block_manager
    seqs = [seq for request in unfinished for seq in request.seqs]
    num_left = sum(not seq.is_finished for seq in seqs)
    gauges = {
        "num_requests_running": len(scheduler.running),
        "num_requests_waiting": num_left - len(scheduler.running),
        "kv_cache_usage_perc": 1 - len(blocks.free_block_ids) / len(blocks.blocks),
    }
    counts = count_tokens(seqs)
    counts.update(ended.tokens)
    counts["num_preemptions"] = scheduler.num_preemptions
    reasons = [
        Counter(PREFIX + "request_success", {"finished_reason": reason}, number)
        for reason, number in ended.reasons.items()
    ]
    return [
        *(Gauge(PREFIX + name, {}, gauges[name]) for name in GAUGES),
        *(Counter(PREFIX + name, {}, counts[name]) for name in COUNTERS if name != "request_success"),
        *reasons,
        *(distribution.histogram(name) for name, distribution in ended.distributions.items()),
    ]
