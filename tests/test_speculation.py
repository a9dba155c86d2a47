"""Speculation changes how fast tokens come, never which: whatever is drafted, scheduled, ended or preempted."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from checkpoints import VOCAB_SIZE, Checkpoint, mixed_prompts, random_prompt
from engines import SCENARIOS, Trace, check_scenario, engine, generate, tokens
from test_sampler import check_chi_square
from test_scheduler import Driver
from test_text import ANSWERS, DEMO, QUESTION

from nanovllm import LLM, SamplingParams
from nanovllm.beam_search.params import BeamSearchParams
from nanovllm.engine.sequence import SequenceStatus
from nanovllm.engine.step_input import StepShape
from nanovllm.graphs import cuda_graphs
from nanovllm.graphs.cuda_graphs import list_graph_shapes
from nanovllm.kernels.rope_decode import rope_decode
from nanovllm.kernels.verify_rows import NUM_PROPOSED
from nanovllm.layers import attention
from nanovllm.sampling_params import RequestOutputKind
from nanovllm.speculative import policy
from nanovllm.speculative.params import MAX_CHECKED_TOKENS, Speculation, read_speculation
from nanovllm.speculative.policy import pays
from nanovllm.speculative.record import DraftRecord
from nanovllm.utils.context import StepTensors

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
ASYNC = pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


def repetitive_prompts() -> list[tuple[int, ...]]:
    """Prompts that say things again, and some that do not; two share their first tokens."""
    loop, other = random_prompt(70, 5), random_prompt(71, 40)
    return [loop * 9, other * 2, (*other, 9, *other[:20]), random_prompt(72, 33), loop[:3] * 2]


@pytest.fixture
def always(monkeypatch):
    """Checks drafts in every step that may, however few are accepted."""
    monkeypatch.setattr(policy, "pays", lambda records, num_drafts: True)


def compare(
    checkpoint: Checkpoint, params: SamplingParams | list[SamplingParams], config: dict = NGRAM, **options
) -> list[dict]:
    """The results with speculation, which must be those without; some drafts must do and some not."""
    prompts = repetitive_prompts()
    with engine(checkpoint.path) as llm:
        want = generate(llm, prompts, params)
    with engine(checkpoint.path, speculative_config=config, **options) as llm:
        results = generate(llm, prompts, params)
    for result, other in zip(results, want, strict=True):
        assert [tokens([sample]) for sample in result.outputs] == [tokens([sample]) for sample in other.outputs]
        assert other.num_draft_tokens == other.num_accepted_tokens == 0
    num_checked = sum(result.num_draft_tokens for result in results)
    assert 0 < sum(result.num_accepted_tokens for result in results) < num_checked
    return results


def check_draws(token_ids: torch.Tensor, p: torch.Tensor) -> None:
    """A chi-square test in which tokens that are too rare for it count as one."""
    is_rare = p * len(token_ids) < 5
    check_chi_square(
        torch.where(is_rare[token_ids], len(p), token_ids), torch.cat([p * ~is_rare, p[is_rare].sum()[None]])
    )


# ---- engines --------------------------------------------------------------------------------------------------------


@ASYNC
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_tokens_are_those_of_transformers(checkpoint, always, scenario, block_size, async_scheduling):
    check_scenario(
        checkpoint("qwen3"), scenario, block_size, async_scheduling=async_scheduling, speculative_config=NGRAM
    )


@ASYNC
@pytest.mark.parametrize(("k", "longest", "shortest"), [(1, 1, 1), (3, 4, 2), (7, 2, 1), (31, 3, 1)])
def test_any_number_of_drafts(checkpoint, always, k, longest, shortest, async_scheduling):
    config = {"num_speculative_tokens": k, "prompt_lookup_max": longest, "prompt_lookup_min": shortest}
    compare(checkpoint("qwen3"), LONG, {"method": "ngram"} | config, async_scheduling=async_scheduling)


@ASYNC
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_window", "mixtral"])
def test_any_model(checkpoint, family, async_scheduling):
    """Windows, experts, heads of any size."""
    compare(checkpoint(family), LONG, async_scheduling=async_scheduling)


@ASYNC
@pytest.mark.parametrize("always_checks", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"num_kvcache_blocks": 19},
        {"num_kvcache_blocks": 12, "max_model_len": 160, "max_num_batched_tokens": 24},
        {"max_num_seqs": 2},
        {"enable_prefix_caching": False, "num_kvcache_blocks": 19},
        {"max_num_batched_tokens": 5},
    ],
    ids=str,
)
def test_little_room(checkpoint, monkeypatch, options, async_scheduling, always_checks):
    if always_checks:
        monkeypatch.setattr(policy, "pays", lambda records, num_drafts: True)
    compare(checkpoint("qwen3"), LONG, async_scheduling=async_scheduling, **options)


@ASYNC
def test_draws_are_the_same(checkpoint, always, async_scheduling):
    """With seeds, filters and several samples of a prompt."""
    params = [
        SamplingParams(temperature=0.5, seed=1, max_tokens=50, ignore_eos=True),
        SamplingParams(temperature=0.7, top_k=5, seed=2, max_tokens=50, ignore_eos=True, n=3),
        SamplingParams(temperature=0.8, top_p=0.8, max_tokens=50),
        SamplingParams(temperature=1.5, min_p=0.3, seed=4, max_tokens=50, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=50, ignore_eos=True),
    ]
    for options in ({}, {"num_kvcache_blocks": 21}):
        compare(checkpoint("qwen3"), params, async_scheduling=async_scheduling, **options)


def test_draws_have_the_models_distribution(checkpoint, always):
    """The second token of many requests, for which the likeliest one behind the first is drafted."""
    checkpoint, prompt = checkpoint("qwen3"), random_prompt(3, 12)
    with torch.inference_mode():
        first = (checkpoint.model(torch.tensor([prompt])).logits[0, -1].double() / 0.7).softmax(-1)
        texts = torch.tensor([(*prompt, token_id) for token_id in range(VOCAB_SIZE)])
        second = (checkpoint.model(texts).logits[:, -1].double() / 0.7).softmax(-1)
    likeliest = second.argmax(-1)
    params, drawn, num_accepted = SamplingParams(temperature=0.7, max_tokens=2, ignore_eos=True, n=32), [], 0
    with engine(checkpoint.path, speculative_config=NGRAM, max_num_seqs=32) as llm:
        runner = llm.ranks.runner

        def propose(step: StepTensors) -> None:
            rows = step.sample_rows
            runner.draft_rows.drafts[rows, 0] = likeliest[runner.rows.last_tokens[rows]].int()
            runner.draft_rows.num_drafts[rows] = 1

        runner.draft_rows.propose = propose
        for _ in range(100):
            (result,) = generate(llm, [prompt], params)
            drawn += [sample.token_ids for sample in result.outputs]
            num_accepted += result.num_accepted_tokens
            assert result.num_draft_tokens == 32
    drawn = torch.tensor(drawn)
    check_draws(drawn[:, 0], first)
    check_draws(drawn[:, 1], first @ second)
    is_accepted = drawn[:, 1] == likeliest[drawn[:, 0]]
    assert num_accepted == is_accepted.sum() > 300
    # What stands in for a refused draft is distributed as the rest is.
    rest = second.scatter(1, likeliest[:, None], 0)
    rest = first @ rest
    check_draws(drawn[~is_accepted, 1], rest / rest.sum())


@ASYNC
def test_ends_in_the_midst_of_drafts(checkpoint, always, async_scheduling):
    """By max_tokens, by max_model_len, by tokens that end a text: at each place of a text in turn."""
    checkpoint, prompt = checkpoint("qwen3"), repetitive_prompts()[0]
    full = checkpoint.greedy(prompt, 30, True)[0]
    options = {"speculative_config": NGRAM, "async_scheduling": async_scheduling}
    lens = range(1, 31)
    with engine(checkpoint.path, **options) as llm:
        for batch in (lens[:8], lens[8:16], lens[16:]):
            results = generate(llm, [prompt] * len(batch), [replace(LONG, max_tokens=n) for n in batch])
            assert tokens(results) == [(full[:n], "length") for n in batch]
        assert sum(result.num_accepted_tokens for result in results) > 20
        stops = sorted(set(full))
        params = [replace(LONG, max_tokens=30, stop_token_ids=[stop]) for stop in stops]
        results = generate(llm, [prompt] * len(stops), params)
        assert tokens(results) == [(full[: full.index(stop) + 1], "stop") for stop in stops]
    for max_model_len in range(len(prompt) + 9, len(prompt) + 20):
        with engine(checkpoint.path, max_model_len=max_model_len, **options) as llm:
            result = generate(llm, [prompt], LONG)
        assert tokens(result) == [(full[: max_model_len - len(prompt)], "length")]


@ASYNC
def test_others_beside_it_may_ask_for_more(checkpoint, always, async_scheduling):
    """Steps with rows that are adjusted, or tell logprobs, check no drafts; when these have ended, others do."""
    params = [
        LONG,
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, repetition_penalty=1.3),
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=2, prompt_logprobs=1),
        SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, prompt_logprobs=0),
        SamplingParams(temperature=0, max_tokens=20, min_tokens=15),
    ]
    results = compare(checkpoint("qwen3"), params, async_scheduling=async_scheduling)
    assert [result.num_draft_tokens > 0 for result in results] == [True, False, False, True, False]
    assert [len(logprobs) for logprobs in results[2].outputs[0].logprobs] >= [2] * 20
    assert results[3].prompt_logprobs is not None


@pytest.mark.parametrize("options", [{}, {"num_kvcache_blocks": 19, "max_num_batched_tokens": 40}], ids=str)
def test_two_ranks(checkpoint, always, options):
    params = [LONG, replace(LONG, temperature=0.6, seed=3)] * 2 + [LONG]
    compare(checkpoint("qwen3"), params, tensor_parallel_size=2, **options)


@ASYNC
def test_aborts_and_what_comes_next(checkpoint, always, async_scheduling):
    """An abort in each step of a text in turn; the other request and the next ones do not notice."""
    checkpoint, prompts = checkpoint("qwen3"), repetitive_prompts()
    params = replace(LONG, max_tokens=30, output_kind=RequestOutputKind.FINAL_ONLY)
    options = {"speculative_config": NGRAM, "async_scheduling": async_scheduling, "num_kvcache_blocks": 19}
    with engine(checkpoint.path, **options) as llm:
        for steps in range(1, 14):
            first, second = (llm.add_request(list(prompt), params) for prompt in prompts[:2])
            for _ in range(steps):
                assert not llm.step()
            llm.abort_request(first)
            results = []
            while not llm.is_finished():
                results += llm.step()
            assert [result.request_id for result in results] == [str(second)]
            assert results[0].token_ids == checkpoint.greedy(prompts[1], 30, True)[0]
        assert generate(llm, [prompts[0]], params)[0].token_ids == checkpoint.greedy(prompts[0], 30, True)[0]


def test_generated_blocks_are_hit(checkpoint, always):
    """Blocks that accepted drafts filled have their names, those of rejected ones have none."""
    checkpoint, prompt = checkpoint("qwen3"), repetitive_prompts()[0]
    with engine(checkpoint.path, speculative_config=NGRAM) as llm:
        (first,) = generate(llm, [prompt], LONG)
        text = (*prompt, *first.token_ids)
        (second,) = generate(llm, [(*text, 9, 10)], LONG)
    assert first.num_accepted_tokens > 0 and second.num_cached_tokens == (len(text) - 1) // 16 * 16
    assert second.token_ids == checkpoint.greedy((*text, 9, 10), 60, True)[0]


def test_drafts_never_meet_the_kernel_that_stores_and_attends_at_once(checkpoint, always, monkeypatch):
    """A draft's query must see the keys of those before it, which other programs of that kernel store."""
    calls = []

    def recorded(qkv: torch.Tensor, *args: object) -> torch.Tensor:
        calls.append(len(qkv))
        return rope_decode(qkv, *args)

    monkeypatch.setattr(attention, "attend_triton", attention.attend_torch)
    monkeypatch.setattr(attention, "takes_rope_decode", lambda qkv, num_kv_heads: True)
    monkeypatch.setattr(attention, "rope_decode", recorded)
    with engine(checkpoint("qwen3").path, speculative_config=NGRAM) as llm:
        trace = Trace(llm)
        generate(llm, repetitive_prompts(), [LONG] * 4 + [replace(LONG, logprobs=0, max_tokens=20)])
    plain = [len(batch.seqs) for batch in trace.batches[1:] if not batch.num_drafts]
    assert 0 < len(plain) < len(trace.batches) - 1
    assert calls == [number for number in plain for _ in range(llm.config.model_config.num_hidden_layers)]


def test_beam_search(checkpoint):
    found = []
    for config in (None, NGRAM):
        with engine(checkpoint("qwen3").path, speculative_config=config) as llm:
            params = BeamSearchParams(beam_width=3, max_tokens=8)
            outputs = llm.beam_search([{"prompt_token_ids": list(repetitive_prompts()[0])}], params)
            found.append([beam.tokens for beam in outputs[0].sequences])
    assert found[0] == found[1]


class Recorded:
    """Stands in for a CUDA graph: runs the step it was captured for."""

    def __init__(self, shape: StepShape, forward: Callable[[StepShape], None]) -> None:
        self.replay = lambda: forward(shape)


@pytest.mark.parametrize("num_seqs", [5, 16])
def test_padded_steps(checkpoint, always, monkeypatch, num_seqs):
    """What a GPU does with graphs, on a CPU: batches are padded to the sizes for which there are some."""
    seen = set()

    def as_on_a_gpu(config):
        facts = {name: getattr(config, name) for name in ("max_num_seqs", "speculation", "attention_backend")}
        return list_graph_shapes(SimpleNamespace(device="cuda", enforce_eager=False, **facts))

    def capture(graphs, shape, forward):
        seen.add(shape)
        return Recorded(shape, forward)

    monkeypatch.setattr(cuda_graphs, "list_graph_shapes", as_on_a_gpu)
    monkeypatch.setattr(cuda_graphs.CudaGraphs, "_capture", capture)
    params = [LONG, replace(LONG, temperature=0.6, top_k=9, seed=2)] * 2 + [replace(LONG, max_tokens=30)]
    compare(checkpoint("qwen3"), params, max_num_seqs=num_seqs)
    assert {(shape.num_decodes, shape.num_drafts) for shape in seen} >= {(min(8, num_seqs), 4), (4, 4)}


# ---- texts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    """The demo model, which knows its answers by heart, with speculation."""
    options = {"device": "cpu", "dtype": "float32", "kvcache_block_size": 16, "max_model_len": 512}
    with LLM(str(DEMO), speculative_config=NGRAM | {"prompt_lookup_min": 2}, **options) as llm:
        yield llm


def oracle(llm: LLM, text: list[int]) -> Callable[[StepTensors], None]:
    """Proposes what follows in a text; shows that what proposes is a function of the rows on the device."""
    draft_rows, rows = llm.ranks.runner.draft_rows, llm.ranks.runner.rows

    def propose(step: StepTensors) -> None:
        for row in step.sample_rows.tolist():
            length = int(rows.context_lens[row]) + 1
            assert draft_rows.history[row, :length].tolist()[: len(text)] == text[:length]
            drafts = text[length : length + 4]
            draft_rows.drafts[row, : len(drafts)] = torch.tensor(drafts)
            draft_rows.num_drafts[row] = len(drafts)
            entry = (int(rows.device_step_count) - 1) % len(rows.token_ring)
            rows.token_ring[entry, row, NUM_PROPOSED] = len(drafts)

    return propose


def test_texts_streams_and_stop_strings(demo, always, monkeypatch):
    """Piece by piece as a whole; a stop string in the midst of drafts ends a text where it would without."""
    answer, greedy = ANSWERS["introduce yourself"], SamplingParams(temperature=0, max_tokens=200)
    (looked_up,) = demo.chat(QUESTION, greedy, use_tqdm=False)
    assert looked_up.text == answer
    prompt = looked_up.prompt_token_ids
    monkeypatch.setattr(demo.ranks.runner.draft_rows, "propose", oracle(demo, [*prompt, *looked_up.token_ids]))
    trace = Trace(demo)
    (result,) = demo.chat(QUESTION, greedy, use_tqdm=False)
    assert tokens([result]) == tokens([looked_up]) and result.text == answer
    assert result.num_accepted_tokens > 0.7 * len(result.token_ids) > 2 * len(trace.batches)
    assert "".join(demo.stream(QUESTION, greedy)) == answer
    for stop in {answer[n : n + 3] for n in range(5, 60, 4)}:
        (result,) = demo.chat(QUESTION, replace(greedy, stop=[stop]), use_tqdm=False)
        assert (result.text, result.finish_reason) == (answer[: answer.index(stop)], "stop")
    demo.add_request(prompt, replace(greedy, output_kind=RequestOutputKind.DELTA))
    pieces = []
    while not demo.is_finished():
        pieces += demo.step()
    assert "".join(piece.text for piece in pieces) == answer
    assert [token_id for piece in pieces for token_id in piece.token_ids] == looked_up.token_ids
    assert len(pieces) < len(looked_up.token_ids) / 2


def test_structured_outputs(demo, always):
    """Beside a request that a grammar holds, which takes part in every other step only, others check drafts."""
    pytest.importorskip("xgrammar")
    greedy = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
    choices = ["one two three four five", "nothing of the kind"]
    params = [replace(greedy, structured_outputs={"choice": choices}, ignore_eos=False), greedy]
    results = demo.generate(["one two one two"] * 2, params, use_tqdm=False)
    assert results[0].text in choices
    (alone,) = demo.generate(["one two one two"], greedy, use_tqdm=False)
    assert results[1].token_ids == alone.token_ids
    assert results[0].num_draft_tokens == 0 < results[1].num_draft_tokens


# ---- scheduling -----------------------------------------------------------------------------------------------------


def drafting(num_blocks: int, num_drafts: int = 3, **options) -> Driver:
    return Driver(num_blocks, num_drafts=num_drafts, **options)


def hopeful(driver: Driver) -> None:
    for seq in driver.seqs:
        seq.drafts.num_proposed, seq.drafts.acceptance = 3, 1.0


@ASYNC
def test_counts_are_the_most_until_they_are_seen(async_scheduling):
    driver = drafting(64, is_async=async_scheduling)
    seq = driver.add([1, 2, 3, 4, 5], max_tokens=25, ignore_eos=True)
    counts = []
    while not seq.is_finished:
        hopeful(driver)
        is_certain_to_end = seq.num_completion_tokens >= 25
        batch = driver.step()
        assert batch.seqs == ([] if is_certain_to_end else [seq])
        counts.append((batch.num_drafts, seq.num_tokens, len(seq.token_ids), seq.num_completion_tokens))
    driver.check_end()
    assert driver.num_accepted > 0 < driver.num_refused
    assert len(counts) < 25 and any(num_drafts for num_drafts, *_ in counts)
    for num_drafts, num_tokens, num_seen, num_certain in counts[:-1]:
        if async_scheduling:
            assert num_tokens == num_seen + 1 + num_drafts and num_certain == num_seen - 5 + 1
        else:
            assert num_tokens == num_seen == num_certain + 5


def test_blocks_for_drafts_preempt_nobody():
    """Where there are too few of them, a step checks none; several may be given at once, none beyond the end."""
    driver = drafting(11, kvcache_block_size=2, max_model_len=18)
    a, b = (driver.add([token_id] * 3, max_tokens=100, ignore_eos=True) for token_id in (1, 2))
    most_blocks, plain_for_room = 0, 0
    while not driver.scheduler.is_finished():
        hopeful(driver)
        num_preemptions = driver.num_preemptions
        batch = driver.step()
        most_blocks = max(most_blocks, len(batch.new_blocks))
        assert not (batch.num_drafts and driver.num_preemptions > num_preemptions)
        is_decode = len(batch.seqs) == 2 and not batch.num_joined
        plain_for_room += is_decode and not batch.num_drafts
        assert max(len(seq.block_table) for seq in (a, b)) <= 9
    assert most_blocks >= 3 and plain_for_room > 0 and driver.num_preemptions > 0
    driver.check_end()


def test_a_prompt_that_can_be_computed_goes_first():
    driver = drafting(64, max_num_seqs=2)
    for token_id in (1, 2, 3):
        driver.add([token_id] * 4, max_tokens=20, ignore_eos=True)
    driver.step()
    hopeful(driver)
    batch = driver.step()  # the third has no row: it waits, and drafts are checked
    assert batch.num_drafts == 3 and len(driver.scheduler.waiting) == 1
    driver.abort(driver.seqs[0])
    hopeful(driver)
    batch = driver.step()
    assert batch.num_drafts == 0 and batch.num_joined == 1
    driver.run_until_finished()


def test_a_step_with_drafts_admits_nobody():
    """Not even a prompt that fits only since this step has filled a block which it begins with."""
    driver = drafting(8)
    seq = driver.add([1, 2], max_tokens=20, ignore_eos=True)
    driver.scheduler.postprocess(driver.scheduler.schedule(), [[3]])
    hopeful(driver)
    driver.scheduler.postprocess(driver.scheduler.schedule(), [[4]])
    assert seq.num_tokens == 4 and len(seq.block_table) == 2
    waiting = driver.add([1, 2, 3, 4] + [5] * 21)
    hopeful(driver)
    assert not driver.scheduler.admits_next()
    batch = driver.scheduler.schedule()
    assert batch.num_drafts == 3 and batch.seqs == [seq]
    assert waiting.row == -1 and driver.scheduler.admits_next()


def test_a_token_that_there_is_not_ends_a_sequence_behind_accepted_drafts():
    driver = drafting(64)
    seq = driver.add([1, 2, 3], max_tokens=20, ignore_eos=True)
    driver.step()
    hopeful(driver)
    batch = driver.scheduler.schedule()
    assert batch.num_drafts == 3 and seq.num_tokens == 3 + 1 + 4
    assert driver.scheduler.postprocess(batch, [[7, 8, -1]]) == [seq]
    assert (seq.finish_reason, seq.completion_token_ids[1:]) == ("error", [7, 8])
    assert len(driver.scheduler.block_manager.free_block_ids) == 64


def test_late_tokens_of_a_preempted_sequence_are_kept():
    driver = drafting(64)
    seq = driver.add([1, 2, 3], max_tokens=20, ignore_eos=True)
    driver.step()
    hopeful(driver)
    batch = driver.scheduler.schedule()
    driver.scheduler.preempt(seq)
    assert driver.scheduler.postprocess(batch, [[7, 8]]) == []
    assert (seq.status, seq.num_computed_tokens, seq.drafts.num_unseen) == (SequenceStatus.WAITING, 0, 0)
    assert seq.num_tokens == len(seq.token_ids) == 3 + 1 + 2


# ---- when it pays ---------------------------------------------------------------------------------------------------


def test_drafts_of_a_step_fit_and_agree_with_its_graph():
    speculation = Speculation(5, 3, 1)
    assert [speculation.num_drafts_of(n) for n in (1, 8, 9, 16, 17, 32, 33, 64, 65, 500)] == [5, 5, 3, 3] + [1] * 2 + [
        0
    ] * 4
    for max_num_seqs in (1, 5, 13, 30, 256):
        config = SimpleNamespace(
            device="cuda",
            enforce_eager=False,
            attention_backend="triton",
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=1024,
            speculation=speculation,
        )
        graphs = cuda_graphs.CudaGraphs(config, None)
        for num_rows in range(1, max_num_seqs + 1):
            num_drafts = speculation.num_drafts_of(num_rows)
            assert num_rows * (1 + num_drafts) <= max(MAX_CHECKED_TOKENS, num_rows)
            shape = StepShape(num_rows, 0, 0, is_filtered=True, num_drafts=num_drafts)
            padded = graphs.padded_shape(shape)
            assert padded.num_drafts == num_drafts and padded.num_decodes >= num_rows and padded.is_filtered
        assert len(set(graphs.shapes)) == len(graphs.shapes)


def test_without_speculation_nothing_is_there(checkpoint):
    with engine(checkpoint("qwen3").path) as llm:
        runner = llm.ranks.runner
        assert runner.draft_rows is None and runner.rows.token_ring.dim() == 2
        assert not any(shape.num_drafts for shape in runner.graphs.shapes)
        assert len(runner.counts) == llm.config.max_num_seqs + 2


def test_the_estimate_backs_off_and_tries_again():
    record = DraftRecord(num_proposed=4)
    assert pays([record], 4)
    tries = []
    for step in range(5000):
        is_checked = pays([record], 4)
        tries += [step] * is_checked
        record.take_in(4 * is_checked, 0, 4)
    assert tries[:3] == [0, 1, 2] and 10 < len(tries) < 5000 * 0.1 and tries[-1] > 4800
    for _ in range(12):  # it becomes good
        record.take_in(4, 4, 4)
    assert record.acceptance > 0.9
    assert (record.num_checked, record.num_accepted) == (4 * len(tries) + 48, 48)


def test_a_step_pays_by_all_of_its_rows():
    good, none = DraftRecord(num_proposed=4), DraftRecord()
    assert not pays([none], 4)
    assert pays([good, none, none], 4)
    assert not pays([good, *[none] * 31], 1)
    assert pays([good] * 16 + [none] * 16, 1)


def test_random_texts_are_left_alone(checkpoint):
    """Hot draws repeat nothing: few steps check drafts, even where single tokens are looked up."""
    params = SamplingParams(temperature=8.0, max_tokens=200, ignore_eos=True)
    with engine(checkpoint("qwen3").path, speculative_config=NGRAM) as llm:
        trace = Trace(llm)
        results = generate(llm, [random_prompt(seed, 30) for seed in range(4)], params)
    checks = [batch.num_drafts > 0 for batch in trace.batches]
    assert any(checks) and sum(checks[60:]) < 0.2 * len(checks[60:])
    assert sum(result.num_accepted_tokens for result in results) < 50


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_speculative_tokens": 3}, (3, 5, 5)),
        ({"num_speculative_tokens": 3, "prompt_lookup_max": 4}, (3, 4, 4)),
        ({"num_speculative_tokens": 3, "prompt_lookup_min": 2}, (3, 2, 2)),
        ({"num_speculative_tokens": 31, "prompt_lookup_max": 4, "prompt_lookup_min": None}, (31, 4, 4)),
        ({"num_speculative_tokens": 1, "prompt_lookup_max": 32, "prompt_lookup_min": 1}, (1, 32, 1)),
    ],
)
def test_what_is_asked_for(options, expected):
    assert read_speculation({"method": "ngram"} | options, 64) == (*expected, None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["ngram"], TypeError, "speculative_config must be a dict, got ['ngram']"),
        ({}, ValueError, "'method' of speculative_config must be 'ngram'"),
        ({"method": "eagle"}, ValueError, "'method' of speculative_config must be 'ngram'"),
        (NGRAM | {"model": "small"}, ValueError, "got 'prompt_lookup_max': 3"),
        ({"method": "ngram", "model": "small"}, ValueError, "or with a 'model' 'draft_model', got 'ngram'"),
        ({"method": "draft_model"}, ValueError, "or with a 'model' 'draft_model', got 'draft_model'"),
        ({"model": 3}, TypeError, "'model' of speculative_config must be a folder or hub name, got 3"),
        ({"model": "small"}, TypeError, "'num_speculative_tokens' of speculative_config must be of type int"),
        (NGRAM | {"draft_tensor_parallel_size": 2}, ValueError, "got 'draft_tensor_parallel_size': 2"),
        (
            {"method": "ngram"},
            TypeError,
            "'num_speculative_tokens' of speculative_config must be of type int, got None",
        ),
        (NGRAM | {"num_speculative_tokens": True}, TypeError, "'num_speculative_tokens'"),
        (NGRAM | {"num_speculative_tokens": 2.0}, TypeError, "'num_speculative_tokens'"),
        (NGRAM | {"num_speculative_tokens": 0}, ValueError, "must be between 1 and 31, got 0"),
        (NGRAM | {"num_speculative_tokens": 32}, ValueError, "must be between 1 and 31, got 32"),
        (NGRAM | {"prompt_lookup_max": 33}, ValueError, "'prompt_lookup_max' of speculative_config must be between"),
        (NGRAM | {"prompt_lookup_min": 0}, ValueError, "'prompt_lookup_min' of speculative_config must be between"),
        (NGRAM | {"prompt_lookup_min": "1"}, TypeError, "'prompt_lookup_min'"),
        (NGRAM | {"prompt_lookup_min": 4}, ValueError, "4, must be at most its 'prompt_lookup_max', 3"),
    ],
    ids=str,
)
def test_what_is_refused(checkpoint, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        engine(checkpoint("qwen3").path, speculative_config=options)


def test_drafts_must_fit_into_a_step(checkpoint):
    with pytest.raises(ValueError, match="4, must be less than max_num_batched_tokens=4"):
        engine(checkpoint("qwen3").path, speculative_config=NGRAM, max_num_batched_tokens=4)


# ---- traffic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seed", [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_traffic(checkpoint, seed):
    """Requests that come and go, of all kinds, on engines with little room: each gets what it gets without drafts."""
    draw = random.Random(seed)
    path, prompts = checkpoint("qwen3").path, repetitive_prompts() + mixed_prompts()[:5]
    options = {
        "num_kvcache_blocks": draw.choice([19, 25]),
        "max_num_seqs": draw.choice([3, 8]),
        "max_num_batched_tokens": draw.choice([24, 200]),
        "async_scheduling": seed % 2 == 0,
    }
    requests = [
        (
            list(draw.choice(prompts)),
            SamplingParams(
                temperature=draw.choice([0, 0, 0.5]),
                seed=draw.randrange(5),
                max_tokens=draw.choice([1, 2, 10, 40]),
                ignore_eos=draw.choice([True, False]),
                logprobs=draw.choice([None] * 5 + [1]),
                presence_penalty=draw.choice([0] * 5 + [0.5]),
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
        )
        for _ in range(40)
    ]
    with engine(path) as llm:
        want = [generate(llm, [prompt], params)[0].token_ids for prompt, params in requests]
    with engine(path, speculative_config=NGRAM | {"num_speculative_tokens": draw.choice([2, 6])}, **options) as llm:
        found, asked, aborted, todo = {}, [], set(), list(requests)
        while todo or not llm.is_finished():
            if todo and draw.random() < 0.4:
                asked.append(llm.add_request(*todo.pop(0)))
            if asked and draw.random() < 0.1:
                name = draw.choice(asked)
                aborted |= {name} & llm.requests.keys()
                llm.abort_request(name)
            found.update({int(result.request_id): result for result in llm.step()})
    assert found.keys() | aborted == set(asked) and aborted
    for name, tokens_alone in zip(asked, want, strict=True):
        if name not in aborted:
            assert found[name].token_ids == tokens_alone
    assert sum(result.num_accepted_tokens for result in found.values()) > 0
