"""The metrics of an engine: what they count agrees with the results, whatever becomes of the requests."""

from __future__ import annotations

import json
from collections import Counter as Counts
from pathlib import Path

import pytest
from test_async_llm import DEMO, ENDLESS, PROMPTS

from nanovllm import LLM, SamplingParams
from nanovllm.reports.metrics import BOUNDS, HELP, PREFIX, Counter, Gauge, Histogram

DASHBOARD = Path(__file__).parents[1] / "docs" / "grafana.json"


@pytest.fixture
def llm():
    options = {"kvcache_block_size": 16, "num_kvcache_blocks": 100, "max_num_seqs": 4, "max_model_len": 1024}
    with LLM(DEMO, device="cpu", **options) as llm:
        yield llm


def read(llm: LLM) -> dict:
    """The metrics by their names, without labels of a value that is 0."""
    metrics = {}
    for metric in llm.get_metrics():
        name = metric.name.removeprefix(PREFIX)
        if not metric.labels:
            metrics[name] = metric
        elif metric.value:
            metrics[metric.labels["finished_reason"]] = metric
    return metrics


def test_metrics_of_an_idle_engine(llm):
    metrics = read(llm)
    assert all(metric.value == 0 for metric in metrics.values() if isinstance(metric, (Counter, Gauge)))
    assert all(metric.count == 0 for metric in metrics.values() if isinstance(metric, Histogram))
    assert {metric.name for metric in llm.get_metrics()} == {PREFIX + name for name in HELP}


def test_finished_requests(llm):
    params = [SamplingParams(max_tokens=20, seed=1, n=3), SamplingParams(temperature=0, max_tokens=200)]
    results = llm.generate([PROMPTS[0] * 4, PROMPTS[1]], params, False)
    results += llm.generate([PROMPTS[0] * 4], params[1], False)
    samples = [sample for result in results for sample in result.outputs]
    metrics = read(llm)
    assert metrics["generation_tokens"].value == sum(len(sample.token_ids) for sample in samples)
    num_prompt_tokens = sum(len(result.prompt_token_ids) * len(result.outputs) for result in results)
    assert metrics["prompt_tokens"].value == metrics["prefix_cache_queries"].value == num_prompt_tokens
    assert metrics["prefix_cache_hits"].value >= results[-1].num_cached_tokens > 0
    assert {name: metrics[name].value for name in ("stop", "length") if name in metrics} == Counts(
        sample.finish_reason for sample in samples
    )
    for name, number in [
        ("time_to_first_token_seconds", 3),
        ("e2e_request_latency_seconds", 3),
        ("request_queue_time_seconds", 3),
        ("request_time_per_output_token_seconds", 5),
    ]:
        assert metrics[name].count == metrics[name].buckets["+Inf"] == number
        assert list(metrics[name].buckets.values()) == sorted(metrics[name].buckets.values())
    seconds = sum(result.metrics.finished_time - result.metrics.arrival_time for result in results)
    assert metrics["e2e_request_latency_seconds"].sum == pytest.approx(seconds)
    highest = max(result.metrics.first_token_time - result.metrics.arrival_time for result in results)
    for bound, (name, number) in zip(BOUNDS, metrics["time_to_first_token_seconds"].buckets.items(), strict=False):
        assert float(name) == pytest.approx(bound) and (number == 3) == (highest <= bound)


def test_unfinished_and_aborted_requests(llm):
    ids = [llm.add_request([index + 5] * 40, ENDLESS) for index in range(6)]
    for _ in range(12):
        llm.step()
    metrics = read(llm)
    assert metrics["num_requests_running"].value == 4 and metrics["num_requests_waiting"].value == 2
    assert metrics["kv_cache_usage_perc"].value == pytest.approx(4 * 4 / 100)
    assert metrics["generation_tokens"].value == 4 * 11 and metrics["prompt_tokens"].value == 4 * 40
    llm.abort_request(ids[0])
    llm.abort_request(ids)
    metrics = read(llm)
    assert metrics["generation_tokens"].value == 4 * 11 and metrics["abort"].value == 6
    assert metrics["num_requests_running"].value == metrics["kv_cache_usage_perc"].value == 0
    assert metrics["e2e_request_latency_seconds"].count == 0 and metrics["time_to_first_token_seconds"].count == 4


def test_prompts_that_are_computed_whatever_is_cached(llm):
    for num_logprobs in (None, 1):
        llm.generate([[5] * 40], SamplingParams(max_tokens=1, prompt_logprobs=num_logprobs), False)
    metrics = read(llm)
    assert metrics["prompt_tokens"].value == 80 and metrics["prefix_cache_queries"].value == 40


def test_requests_that_reach_their_deadline(llm):
    params = SamplingParams(n=2, max_tokens=50, ignore_eos=True)
    (result,) = llm.generate([PROMPTS[0]], params, False, timeout=0)
    assert [sample.finish_reason for sample in result.outputs] == ["timeout"] * 2
    metrics = read(llm)
    assert metrics["timeout"].value == 2 and "abort" not in metrics
    assert metrics["e2e_request_latency_seconds"].count == 0


def test_every_end_is_shown_before_there_is_one(llm):
    ends = {metric.labels["finished_reason"] for metric in llm.get_metrics() if metric.labels}
    assert ends == {"stop", "length", "abort", "timeout", "error"}


def test_preemptions(llm):
    llm.generate([[index + 5] * 300 for index in range(4)], SamplingParams(max_tokens=200, ignore_eos=True), False)
    metrics = read(llm)
    assert metrics["num_preemptions"].value > 0
    assert metrics["generation_tokens"].value == 800 and metrics["prompt_tokens"].value == 1200


def test_a_dead_engine_has_none(llm):
    llm.close()
    with pytest.raises(RuntimeError, match="it was closed"):
        llm.get_metrics()


def test_the_dashboard_asks_for_metrics_that_there_are():
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            assert PREFIX in expression
            for part in expression.split(PREFIX)[1:]:
                name = part.split("{")[0].split("[")[0].split(")")[0].split(" ")[0]
                asked.add(name.removesuffix("_total").removesuffix("_bucket").removesuffix("_sum"))
    assert asked == set(HELP)
