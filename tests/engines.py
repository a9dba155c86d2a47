"""What tests do with an engine: bring it into trouble, watch its steps, and check that it lost nothing."""

from __future__ import annotations

from collections.abc import Iterable

from checkpoints import Checkpoint, mixed_prompts
from integrity import check_integrity

from nanovllm import LLM, SamplingParams
from nanovllm.engine.scheduler import Batch


class Trace:
    """The steps and preemptions of an engine from now on."""

    def __init__(self, llm: LLM) -> None:
        self.batches: list[Batch] = []
        self.num_preemptions = 0
        schedule, preempt = llm.scheduler.schedule, llm.scheduler.preempt

        def recorded_schedule():
            batch = schedule()
            if batch.seqs:
                self.batches.append(batch)
            return batch

        def counted_preempt(seq):
            self.num_preemptions += 1
            return preempt(seq)

        llm.scheduler.schedule, llm.scheduler.preempt = recorded_schedule, counted_preempt

    @property
    def num_chunks(self) -> int:
        """Parts of prompts that were computed without reaching the end of the prompt."""
        return sum(len(batch.seqs) - batch.num_samples for batch in self.batches)

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest step."""
        return max(sum(batch.num_tokens) for batch in self.batches)

    @property
    def most_seqs(self) -> int:
        """Sequences of the largest step."""
        return max(len(batch.seqs) for batch in self.batches)


def check_idle(llm: LLM) -> None:
    """The engine has nothing left, and every block and row is free."""
    assert llm.is_finished() and llm.scheduler.is_finished()
    check_integrity(llm.scheduler)
    manager = llm.scheduler.block_manager
    assert len(manager.free_block_ids) == len(manager.blocks)
    assert len(llm.scheduler.free_rows) == llm.config.max_num_seqs


MAX_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)


def engine(path: str, **options) -> LLM:
    """A small engine on the CPU, unless the options say otherwise."""
    options = {"device": "cpu", "max_model_len": 300, "max_num_seqs": 16, "kvcache_block_size": 16} | options
    return LLM(path, **options)


def generate(llm: LLM, prompts: Iterable[tuple[int, ...]], params=GREEDY) -> list[dict]:
    """`LLM.generate`, after which nothing must be left in the engine."""
    results = llm.generate([list(prompt) for prompt in prompts], params, use_tqdm=False)
    check_idle(llm)
    return results


def tokens(results: Iterable[dict]) -> list[tuple[list[int], str]]:
    """What a result shares with `Checkpoint.greedy`."""
    return [(result["token_ids"], result["finish_reason"]) for result in results]


def expected(checkpoint: Checkpoint, prompts: Iterable[tuple[int, ...]]) -> list[tuple[list[int], str]]:
    """What transformers generates with GREEDY."""
    want = [checkpoint.greedy(prompt, MAX_TOKENS) for prompt in prompts]
    assert {reason for _, reason in want} == {"stop", "length"}, "the prompts must show both ends"
    return want


def scenario_options(scenario: str, block_size: int) -> dict:
    """What brings `mixed_prompts` into a scenario."""
    # A cache that a few of the prompts fill, so that their growth preempts others.
    few_blocks = {"num_kvcache_blocks": {16: 19, 64: 6, 256: 3}[block_size], "kvcache_block_size": block_size}
    return {
        "plain": {"kvcache_block_size": block_size},
        "chunked": {"kvcache_block_size": block_size, "max_num_batched_tokens": 24},
        "preempted": few_blocks,
        "few_seqs": {"kvcache_block_size": block_size, "max_num_seqs": 3},
        "all_at_once": few_blocks | {"max_num_batched_tokens": 40, "max_num_seqs": 7},
    }[scenario]


# How a scenario's trace shows that it happened.
SCENARIOS = {
    "plain": lambda trace: trace.num_chunks == trace.num_preemptions == 0,
    "chunked": lambda trace: trace.num_chunks > 20 and trace.most_tokens == 24,
    "preempted": lambda trace: trace.num_preemptions > 0,
    "few_seqs": lambda trace: trace.most_seqs == 3,
    "all_at_once": lambda trace: trace.num_preemptions > 0 and trace.num_chunks > 0 and trace.most_seqs <= 7,
}


def check_scenario(checkpoint: Checkpoint, scenario: str, block_size: int, **options) -> None:
    """Runs `mixed_prompts` through a scenario and compares with transformers."""
    prompts = mixed_prompts()
    with engine(checkpoint.path, **options | scenario_options(scenario, block_size)) as llm:
        trace = Trace(llm)
        results = generate(llm, prompts)
    assert tokens(results) == expected(checkpoint, prompts)
    assert SCENARIOS[scenario](trace)
    if scenario == "plain":  # the last four prompts share their first tokens, and all were admitted in one step
        assert len(trace.batches[0].seqs) == len(prompts)
        assert [result["num_cached_tokens"] for result in results[:-3]] == [0] * 9
        assert [result["num_cached_tokens"] // block_size for result in results[-3:]] == [
            262 // block_size,
            48 // block_size,
            256 // block_size,
        ]
