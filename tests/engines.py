"""What tests do with an engine: watch its steps, and check that it lost nothing."""

from __future__ import annotations

from nanovllm import LLM
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
    llm.scheduler.check_integrity()
    manager = llm.scheduler.block_manager
    assert len(manager.free_block_ids) == len(manager.blocks)
    assert len(llm.scheduler.free_rows) == llm.config.max_num_seqs
