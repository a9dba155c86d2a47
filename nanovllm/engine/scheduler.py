"""Decides which sequences compute how many tokens in the next step.

A sequence has tokens, and KV for some of them. A step gives each chosen sequence a number of tokens to compute;
prefill, chunked prefill, a prefix-cache hit and decode differ only in that number. Running sequences come first, then
waiting ones fill the rest of the token budget in their order. Only lengths are needed, never the value of a token, so
a step can be scheduled before the tokens of the one before it are known. Nothing here knows of devices.
"""

import time
from bisect import bisect_left, insort_right
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.sampling.text_end import ends_text
from nanovllm.speculative.policy import choose_num_drafts, count_drafts, drop_refused, num_ahead_of

PRIORITY = attrgetter("priority")  # of all sequences the same, unless scheduling_policy="priority"
ORDER = attrgetter("priority", "seq_id")  # of those that wait: no two have the same


@dataclass(slots=True)
class Batch:
    """What one step computes, and what changed on the device's rows since the step before.

    `num_tokens[i]` tokens of `seqs[i]` are computed, from `starts[i]` on. All but perhaps the last sequence reach
    their end and sample a token; `num_samples` of them do. `rows` are the sequences' rows in this step: a sequence
    may have lost its row by the time the step's tokens are seen. The last `num_joined` sequences were just admitted.
    `budget` tokens more could have been computed. Where drafts are checked, all sequences decode, and each computes
    `num_drafts` of them besides, of which the device knows the values and the host only how many.
    """

    budget: int
    seqs: list[Sequence] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_samples: int = 0
    num_joined: int = 0
    num_drafts: int = 0
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)  # (row, index in block table, block)

    @property
    def joined(self) -> list[Sequence]:
        """The sequences that were just admitted."""
        return self.seqs[len(self.seqs) - self.num_joined :]

    def is_decode(self, index: int) -> bool:
        """Whether a sequence computes its newest token alone, which only the device need know."""
        return self.num_tokens[index] == 1 and index < self.num_samples

    @property
    def is_last_partial(self) -> bool:
        """Whether the last sequence does not reach its end, so that it samples nothing."""
        return self.num_samples < len(self.seqs)


class Scheduler:
    """Owns the waiting and running sequences and their blocks.

    `waiting` is ordered by priority, then by arrival; `running` by priority, then by admission, so that the last one
    is the one to be preempted. A prompt that is given only a part of its tokens ends the batch: in it, such a sequence
    is always the last.
    """

    def __init__(self, config: Config, num_blocks: int, eos_token_ids: frozenset[int]) -> None:
        """`num_blocks` blocks of the KV cache are to be shared out; the tokens `eos_token_ids` end a text."""
        self.config = config
        self.eos_token_ids = eos_token_ids
        self.block_manager = BlockManager(num_blocks, config.kvcache_block_size, config.enable_prefix_caching)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.free_rows = list(reversed(range(config.max_num_seqs)))
        self.num_preemptions = 0
        self.num_stages = config.pipeline_parallel_size

    def is_finished(self) -> bool:
        """Whether no sequence is left."""
        return not self.waiting and not self.running

    def add(self, seq: Sequence) -> None:
        """Queues a sequence behind all of its priority that came before it."""
        insort_right(self.waiting, seq, key=ORDER)

    def schedule(self) -> Batch:
        """The next step; a batch without sequences if all that run only wait for their last token to be seen."""
        batch = Batch(self.config.max_num_batched_tokens, num_drafts=choose_num_drafts(self))
        num_running = len(self.running)
        # The stages of a pipeline compute one step each, of other sequences.
        most_seqs = -(-num_running // self.num_stages)
        for seq in self.running:  # which a preemption shortens from its end
            # More may run than the budget holds, as those that wait for the host leave room for others to be admitted.
            if not batch.budget or len(batch.seqs) == most_seqs or self.must_wait(seq) or self.end_is_due(seq):
                continue
            num_ahead = num_ahead_of(seq, batch.num_drafts, self.config)
            while not self.block_manager.can_append(seq, num_ahead):
                self.preempt(self.running[-1])
                if seq.status is SequenceStatus.WAITING:
                    return batch
            num_new_blocks = self.block_manager.may_append(seq, num_ahead)
            self._compute(batch, seq, num_new_blocks)
        # After a preemption nothing is admitted: the newest sequence would take back what the older ones need.
        if len(self.running) < num_running or batch.num_drafts:
            return batch
        while batch.budget and self.admits_next():
            seq = self.waiting.popleft()
            self.block_manager.allocate(seq, num_ahead_of(seq, 0, self.config))
            seq.status = SequenceStatus.RUNNING
            seq.first_scheduled_time = seq.first_scheduled_time or time.time()
            seq.row = self.free_rows.pop()
            insort_right(self.running, seq, key=PRIORITY)
            batch.num_joined += 1
            self._compute(batch, seq, len(seq.block_table))
        return batch

    def preempt(self, seq: Sequence) -> None:
        """Sends a running sequence back to its place in the queue, to be computed anew."""
        self._release(seq)
        self.num_preemptions += 1
        seq.status = SequenceStatus.WAITING
        insort_right(self.waiting, seq, key=ORDER)

    def postprocess(self, batch: Batch, token_ids: list[list[int]]) -> list[Sequence]:
        """Takes in the tokens that a step has sampled for each of its first `num_samples` sequences.

        They are one each (-1: there is none) and, where drafts were checked, those that were accepted before it.
        Returns the sequences that they ended. A token of a sequence that has ended meanwhile is surplus and
        dropped; one of a sequence that was preempted meanwhile is kept.
        """
        finished = []
        for seq, new_token_ids in zip(batch.seqs[: batch.num_samples], token_ids, strict=True):
            if seq.is_finished:
                continue
            if batch.num_drafts:
                drop_refused(seq, batch.num_drafts, len(new_token_ids) - 1)
            for token_id in new_token_ids:
                self._take_in(seq, token_id)
                if seq.finish_reason is not None:  # tokens behind it are surplus too
                    self.finish(seq)
                    finished.append(seq)
                    break
        return finished

    def finish(self, seq: Sequence) -> None:
        """Ends a sequence, whose `finish_reason` says why, wherever it stands; frees what it holds."""
        if seq.status is SequenceStatus.RUNNING:
            self._release(seq)
        else:
            place = bisect_left(self.waiting, ORDER(seq), key=ORDER)
            if place < len(self.waiting) and self.waiting[place] is seq:  # else it waits for its grammar
                del self.waiting[place]
        seq.status = SequenceStatus.FINISHED
        seq.finished_time = time.time()

    def end_is_due(self, seq: Sequence) -> bool:
        """Whether the sequence ends by length once its tokens, of which some may be unseen, are seen.

        With unseen drafts it may be due without being known to be.
        """
        return self._is_full(seq, seq.num_tokens - seq.drafts.num_unseen)

    def must_wait(self, seq: Sequence) -> bool:
        """Whether its next step needs the last token to be seen: a stage that is not the last has not drawn it."""
        return seq.waits_for_host or (self.num_stages > 1 and seq.has_unseen_token)

    def admits_next(self) -> bool:
        """Whether the sequence that is to run next can."""
        if not self.waiting or not self.free_rows or self.must_wait(self.waiting[0]):
            return False
        return self.block_manager.can_allocate(self.waiting[0], num_ahead_of(self.waiting[0], 0, self.config))

    def _compute(self, batch: Batch, seq: Sequence, num_new_blocks: int) -> None:
        """Adds to the batch as many of the sequence's tokens as its budget holds; its last blocks may be new."""
        for index in range(len(seq.block_table) - num_new_blocks, len(seq.block_table)):
            batch.new_blocks.append((seq.row, index, seq.block_table[index]))
        start = seq.num_computed_tokens
        end = min(seq.num_tokens, start + min(batch.budget, self.config.long_prefill_token_threshold or batch.budget))
        seq.num_computed_tokens = end
        batch.budget -= end - start + batch.num_drafts
        if end < seq.num_tokens:
            batch.budget = 0
        batch.seqs.append(seq)
        batch.rows.append(seq.row)
        batch.starts.append(start)
        batch.num_tokens.append(end - start)
        # Known tokens' blocks can be hit at once, even in this step: a layer stores all KV before it attends.
        if end <= len(seq.token_ids):
            self.block_manager.name_blocks(seq, start, end)
        if end == seq.num_tokens:
            batch.num_samples += 1
            seq.num_tokens += 1
        if batch.num_drafts:
            count_drafts(seq, batch.num_drafts)

    def _take_in(self, seq: Sequence, token_id: int) -> None:
        """Takes in a token that was unseen, and says if it ends the sequence."""
        if token_id < 0:
            seq.finish_reason = "error"
            return
        seq.first_token_time = seq.first_token_time or time.time()
        seq.token_ids.append(token_id)
        num_known = len(seq.token_ids)
        # Now that the tokens before it are known, their block can be named.
        if (num_known - 1) % self.block_manager.block_size == 0 and seq.status is SequenceStatus.RUNNING:
            self.block_manager.name_blocks(seq, num_known - 2, num_known - 1)
        if ends_text(seq, token_id, self.eos_token_ids):
            seq.finish_reason = "stop"
        elif self._is_full(seq, num_known):
            seq.finish_reason = "length"

    def _release(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.block_manager.deallocate(seq)
        self.free_rows.append(seq.row)
        seq.row = -1

    def _is_full(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether the sequence may not have more than so many tokens."""
        max_tokens = seq.num_prompt_tokens + seq.sampling_params.max_tokens
        return num_tokens >= min(max_tokens, self.config.max_model_len)
