"""Scheduling without a model: order, budget, ends, and that every token attends to exactly its own prefix.

`Device` stands in for the ranks. It obeys batches as they do, but its KV is symbolic: what a token stores depends on
all that it attends to, and so does the token sampled from it. A wrong slot anywhere changes what follows.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from integrity import check_integrity

from nanovllm import SamplingParams
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.step_input import build_step_input
from nanovllm.speculative.params import Speculation

EOS_TOKEN_ID = 0


def config(**options) -> SimpleNamespace:
    defaults = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "long_prefill_token_threshold": 0,
        "max_model_len": 32,
        "kvcache_block_size": 4,
        "enable_prefix_caching": True,
        "speculation": None,
        "pipeline_parallel_size": 1,
        "model_config": SimpleNamespace(eos_token_ids=frozenset([EOS_TOKEN_ID])),
    }
    return SimpleNamespace(**defaults | options)


def stored(attended: list[int], token_id: int) -> int:
    """The KV of a token that comes after those it attends to."""
    return hash((*attended, token_id))


def sampled(attended: list[int], vocab_size: int) -> int:
    """The token that follows."""
    return hash(tuple(attended)) % vocab_size


def expected(prompt: list[int], params: SamplingParams, max_model_len: int, vocab_size: int) -> tuple[list[int], str]:
    """What a request generates, and its finish reason."""
    kv: list[int] = []
    for token_id in prompt:
        kv.append(stored(kv, token_id))
    token_ids: list[int] = []
    while True:
        token_ids.append(sampled(kv, vocab_size))
        if token_ids[-1] == EOS_TOKEN_ID and not params.ignore_eos:
            return token_ids, "stop"
        if len(token_ids) == params.max_tokens or len(prompt) + len(token_ids) == max_model_len:
            return token_ids, "length"
        kv.append(stored(kv, token_ids[-1]))


class Device:
    """Rows and KV cache of a rank; drafts come from nowhere, and most are right."""

    def __init__(self, block_size: int, vocab_size: int, max_model_len: int, seed: int) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.random = random.Random(seed)
        self.kv: dict[int, int] = {}
        self.last_tokens: dict[int, int] = {}
        self.context_lens: dict[int, int] = {}
        self.block_tables: dict[int, dict[int, int]] = {}

    def run(self, batch: Batch) -> list[list[int]]:
        """Computes a step; returns the tokens that it sampled."""
        first_joined = len(batch.seqs) - batch.num_joined
        for seq, start in zip(batch.seqs[first_joined:], batch.starts[first_joined:], strict=True):
            self.last_tokens[seq.row], self.context_lens[seq.row] = seq.token_ids[-1], start
        for row, index, block_id in batch.new_blocks:
            self.block_tables.setdefault(row, {})[index] = block_id
        if batch.num_drafts:
            return [self.check_drafts(row, batch.num_drafts) for row in batch.rows]
        computed = []
        steps = zip(batch.seqs, batch.rows, batch.starts, batch.num_tokens, strict=True)
        for index, (seq, row, start, num_tokens) in enumerate(steps):
            tokens = seq.token_ids[start : start + num_tokens]
            if num_tokens == 1 and index < batch.num_samples:  # a decode, whose token the host may not have seen
                tokens = [self.last_tokens[row]]
                # Nor may it know where that stands.
                assert start - seq.drafts.num_unseen <= self.context_lens[row] <= start
            else:
                assert self.context_lens[row] == start
            assert len(tokens) == num_tokens
            computed += [(position, row, token_id) for position, token_id in enumerate(tokens, self.context_lens[row])]
            self.context_lens[row] += num_tokens
        # Sequences of a step may share blocks that it computes: what a token depends on has lower positions.
        for position, row, token_id in sorted(computed):
            self.kv[self.slot(row, position)] = stored(self.attended(row, position), token_id)
        sampled_rows = batch.rows[: batch.num_samples]
        for row in sampled_rows:
            self.last_tokens[row] = sampled(self.attended(row, self.context_lens[row]), self.vocab_size)
        return [[self.last_tokens[row]] for row in sampled_rows]

    def check_drafts(self, row: int, num_drafts: int) -> list[int]:
        """The tokens of a row of which so many drafts are computed, whatever they are."""
        start = self.context_lens[row]
        kv, tokens, token_id = self.attended(row, start), [], self.last_tokens[row]
        num_proposed = min(self.random.randint(0, num_drafts), self.max_model_len - 2 - start)
        is_right = True
        for j in range(num_drafts + 1):
            kv.append(stored(kv, token_id))
            if start + j < self.max_model_len:
                self.kv[self.slot(row, start + j)] = kv[-1]
            if is_right:
                tokens.append(sampled(kv, self.vocab_size))
            token_id = tokens[-1] if self.random.random() < 0.7 else self.random.randrange(self.vocab_size)
            is_right = is_right and j < num_proposed and token_id == tokens[-1]
        self.context_lens[row], self.last_tokens[row] = start + len(tokens), tokens[-1]
        return tokens

    def attended(self, row: int, length: int) -> list[int]:
        return [self.kv[self.slot(row, position)] for position in range(length)]

    def slot(self, row: int, position: int) -> int:
        return self.block_tables[row][position // self.block_size] * self.block_size + position % self.block_size


class Driver:
    """Runs a scheduler against a Device as LLMEngine does, with and without the lag of a step, checking each step."""

    def __init__(
        self,
        num_blocks: int,
        is_async: bool = False,
        vocab_size: int = 50,
        num_drafts: int = 0,
        seed: int = 0,
        **options,
    ) -> None:
        """`num_drafts` are checked of each sequence at most, now and then."""
        self.config = config(speculation=Speculation(num_drafts, 1, 1) if num_drafts else None, **options)
        self.scheduler = Scheduler(self.config, num_blocks, frozenset([EOS_TOKEN_ID]))
        self.num_drafts = num_drafts
        self.device = Device(self.config.kvcache_block_size, vocab_size, self.config.max_model_len, seed)
        self.is_async = is_async
        self.in_flight: tuple[Batch, list[list[int]]] | None = None
        self.seqs: list[Sequence] = []
        self.ended: list[Sequence] = []
        self.aborted: set[int] = set()
        self.num_preemptions = 0
        self.num_accepted = self.num_refused = 0  # drafts

    def add(self, prompt: list[int], priority: int = 0, **params) -> Sequence:
        seq = Sequence(len(self.seqs), prompt, SamplingParams(**params), 0, priority)
        self.seqs.append(seq)
        self.scheduler.add(seq)
        return seq

    def abort(self, seq: Sequence) -> None:
        if not seq.is_finished:
            self.aborted.add(seq.seq_id)
            self.scheduler.finish(seq)
            self.check()

    def step(self) -> Batch:
        was_running = list(self.scheduler.running)
        num_tokens = {seq.seq_id: seq.num_tokens for seq in self.seqs}
        ready = [seq for seq in was_running if not self.scheduler.end_is_due(seq)]
        batch = self.scheduler.schedule()
        preempted = [seq for seq in was_running if seq.status is SequenceStatus.WAITING]
        self.num_preemptions += len(preempted)
        assert self.scheduler.num_preemptions == self.num_preemptions
        # Who keeps his blocks goes on in the same step; nobody new takes what the others were preempted for.
        assert not batch.budget or all(seq in batch.seqs for seq in ready if seq not in preempted)
        assert not (preempted and batch.num_joined)
        # Who still runs is at least as urgent as who was preempted, and who was admitted as who waits.
        least_urgent = max((seq.priority for seq in was_running if seq not in preempted), default=0)
        assert all(seq.priority >= least_urgent for seq in preempted)
        admitted = [seq.priority for seq in batch.joined]
        waiting = [seq.priority for seq in self.scheduler.waiting]
        assert not admitted or not waiting or max(admitted) <= min(waiting)
        self.check_batch(batch, num_tokens)
        launched = (batch, self.device.run(batch)) if batch.seqs else None
        if self.is_async:
            launched, self.in_flight = self.in_flight, launched
        if launched:
            batch_seen, tokens = launched
            self.ended += self.scheduler.postprocess(batch_seen, tokens)
            for seq, new_tokens in zip(batch_seen.seqs, tokens, strict=False):
                seq.drafts.num_proposed = self.device.random.randint(0, self.num_drafts)
                self.num_accepted += len(new_tokens) - 1
                self.num_refused += batch_seen.num_drafts + 1 - len(new_tokens)
        self.check()
        return batch

    def run_until_finished(self) -> None:
        for _ in range(2000):
            if self.scheduler.is_finished():
                break
            self.step()
        else:
            raise AssertionError("the scheduler makes no progress")
        self.check_end()

    def check_batch(self, batch: Batch, num_tokens: dict[int, int]) -> None:
        """`num_tokens` are the sequences' tokens before the batch was chosen."""
        num_tokens_of_step = sum(batch.num_tokens) + len(batch.seqs) * batch.num_drafts
        assert num_tokens_of_step <= self.config.max_num_batched_tokens
        assert not batch.num_drafts or set(batch.num_tokens) == {1}
        assert len(batch.seqs) <= self.config.max_num_seqs
        assert all(num_tokens > 0 for num_tokens in batch.num_tokens)
        assert len(batch.seqs) - batch.num_samples in (0, 1)
        assert all(seq.status is SequenceStatus.RUNNING for seq in batch.seqs)
        # All but perhaps the last reach their end, and that is what the ranks are told.
        ends = [start + num_tokens for start, num_tokens in zip(batch.starts, batch.num_tokens, strict=True)]
        reaches_end = [end == num_tokens[seq.seq_id] for seq, end in zip(batch.seqs, ends, strict=True)]
        assert reaches_end[: batch.num_samples] == [True] * batch.num_samples
        assert reaches_end[batch.num_samples :] == [False] * batch.is_last_partial
        if batch.seqs:
            step = build_step_input(batch, self.device.vocab_size)
            assert step.is_last_partial == batch.is_last_partial
            assert step.shape.num_drafts == batch.num_drafts <= self.num_drafts
            assert len(step.decode_rows) + len(step.prompts) == len(batch.seqs)
            if step.is_last_partial:
                assert step.prompts[-1].tolist() == [batch.rows[-1], batch.starts[-1], batch.num_tokens[-1]]

    def check(self) -> None:
        scheduler = self.scheduler
        check_integrity(scheduler)
        for seq in (*scheduler.running, *scheduler.waiting):  # what is unseen is in flight
            most_unseen = 1 + self.in_flight[0].num_drafts if self.in_flight and seq in self.in_flight[0].seqs else 0
            assert len(seq.token_ids) <= seq.num_tokens <= len(seq.token_ids) + most_unseen
            assert seq.drafts.num_unseen == max(most_unseen - 1, 0)
        # Nobody skips ahead of others of his priority, neither when admitted nor when preempted.
        for seqs in (scheduler.running, scheduler.waiting):
            assert sorted(seqs, key=lambda seq: (seq.priority, seq.seq_id)) == list(seqs)
        order = [(seq.priority, seq.seq_id) for seq in (*scheduler.running, *scheduler.waiting)]
        order.sort(key=lambda entry: entry[0])
        assert order == sorted(order)
        assert all(seq.status is SequenceStatus.RUNNING for seq in scheduler.running)
        assert all(seq.status is SequenceStatus.WAITING for seq in scheduler.waiting)

    def check_end(self) -> None:
        ended = [seq.seq_id for seq in self.ended]
        assert sorted([*ended, *self.aborted]) == list(range(len(self.seqs))), "everyone ends exactly once"
        manager = self.scheduler.block_manager
        assert len(manager.free_block_ids) == len(manager.blocks)
        for seq in self.seqs:
            prompt = seq.token_ids[: seq.num_prompt_tokens]
            want = expected(prompt, seq.sampling_params, self.config.max_model_len, self.device.vocab_size)
            if seq.seq_id in self.aborted:
                assert seq.completion_token_ids == want[0][: len(seq.completion_token_ids)]
            else:
                assert (seq.completion_token_ids, seq.finish_reason) == want


@pytest.mark.parametrize("is_async", [False, True])
def test_decodes_come_first_then_prompts_in_order(is_async):
    driver = Driver(32, is_async, max_num_batched_tokens=10)
    a, b, c = driver.add([1] * 8), driver.add([2] * 7), driver.add([3])
    first, second = driver.step(), driver.step()
    assert (first.seqs, first.num_tokens, first.num_samples) == ([a, b], [8, 2], 1)
    assert (second.seqs, second.num_tokens, second.num_samples) == ([a, b, c], [1, 5, 1], 3)
    driver.run_until_finished()


def test_a_prompt_is_computed_in_chunks_of_the_budget():
    driver = Driver(32, max_num_batched_tokens=5)
    seq = driver.add(list(range(1, 19)), max_tokens=2, ignore_eos=True)
    steps = [driver.step() for _ in range(5)]
    assert [step.num_tokens for step in steps] == [[5], [5], [5], [3], [1]]
    assert [step.starts for step in steps] == [[0], [5], [10], [15], [18]]
    assert [step.num_samples for step in steps] == [0, 0, 0, 1, 1]
    assert seq.is_finished
    driver.check_end()


def test_a_long_prompt_leaves_steps_short():
    """Beside it decodes go on; what comes behind it waits until it is through, so that it ends every batch."""
    driver = Driver(32, max_num_batched_tokens=20, long_prefill_token_threshold=5)
    driver.add([1, 2, 3], max_tokens=20, ignore_eos=True)
    assert driver.step().num_tokens == [3]
    driver.add(list(range(1, 13)), max_tokens=3, ignore_eos=True)
    driver.add([4, 5], max_tokens=2, ignore_eos=True)
    steps = [driver.step() for _ in range(5)]
    assert [step.num_tokens for step in steps] == [[1, 5], [1, 5], [1, 2, 2], [1, 1, 1], [1, 1]]
    assert [step.num_samples for step in steps] == [1, 1, 3, 3, 2]
    driver.run_until_finished()


def test_a_long_prompt_is_not_overtaken():
    """The second request would fit into the free blocks, the first one does not yet: both wait."""
    driver = Driver(8, max_model_len=32)
    driver.add([1] * 15, max_tokens=8, ignore_eos=True)
    driver.step()
    driver.add([2] * 20, max_tokens=8)
    driver.add([3], max_tokens=2)
    batch = driver.step()
    assert len(batch.seqs) == 1 and [seq.seq_id for seq in driver.scheduler.waiting] == [1, 2]
    driver.run_until_finished()


@pytest.mark.parametrize("is_async", [False, True])
def test_the_newest_is_preempted_and_goes_first_again(is_async):
    driver = Driver(4, is_async, max_model_len=16)
    old, new = (driver.add([token_id] * 7, max_tokens=8, ignore_eos=True) for token_id in (1, 2))
    third = driver.add([3], max_tokens=1)
    while new.status is not SequenceStatus.WAITING or new.num_cached_tokens < 0:
        driver.step()
    assert old.status is SequenceStatus.RUNNING
    assert list(driver.scheduler.waiting)[:2] == [new, third]
    assert new.block_table == [] and new.row == -1
    driver.run_until_finished()
    assert driver.ended[0] is old and driver.num_preemptions > 0


def test_a_preempted_request_hits_what_it_computed():
    """It resumes from the blocks that nobody took meanwhile; hits and times are those of its first admission."""
    driver = Driver(6, max_model_len=24)
    old = driver.add([1] * 8 + [2], max_tokens=8, ignore_eos=True)
    new = driver.add([3] * 9, max_tokens=8, ignore_eos=True)
    starts, times = [], []
    while not new.is_finished:
        batch = driver.step()
        if new in batch.joined:
            starts.append(batch.starts[batch.seqs.index(new)])
            times.append((new.first_scheduled_time, new.first_token_time))
    assert old.is_finished and len(starts) > 1 and starts[0] == 0 and starts[1] >= 4
    assert new.num_cached_tokens == 0 and len(set(times)) == 1
    assert times[0] == (new.first_scheduled_time, new.first_token_time) and None not in times[0]
    driver.check_end()


def test_who_came_late_to_the_queue_has_its_place_there():
    """As a request whose grammar took its time; those that end before they come leave it as it is."""
    driver = Driver(32, max_num_seqs=1)
    first, second, third, *late = (Sequence(index, [7, 8], SamplingParams(), 0, index // 4) for index in range(5))
    late.append(Sequence(5, [7, 8], SamplingParams(), 0, -1))
    for seq in (first, third, second):
        driver.scheduler.add(seq)
    for seq in late:
        driver.scheduler.finish(seq)
    assert list(driver.scheduler.waiting) == [first, second, third] and all(seq.is_finished for seq in late)


def test_whoever_leaves_a_long_queue_is_found_at_once():
    num_compared = 0

    class ComparedSequence(Sequence):
        __hash__ = Sequence.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal num_compared
            num_compared += 1
            return self is other

    scheduler = Driver(32).scheduler
    seqs = [ComparedSequence(index, [7, 8], SamplingParams(), 0, priority=index % 3) for index in range(3000)]
    for seq in seqs:
        scheduler.add(seq)
    for seq in seqs[::-7]:
        scheduler.finish(seq)
    assert num_compared == 0 and all(seq.is_finished for seq in seqs[::-7])
    left = [seq.seq_id for seq in seqs if not seq.is_finished]
    assert [seq.seq_id for seq in scheduler.waiting] == sorted(left, key=lambda index: (index % 3, index))


@pytest.mark.parametrize("is_async", [False, True])
def test_the_lowest_number_goes_first(is_async):
    driver = Driver(32, is_async, max_num_seqs=1)
    priorities = [3, 1, 2, 1, -5, 3]
    for priority in priorities:
        driver.add([7, 8], priority, max_tokens=2, ignore_eos=True)
    driver.run_until_finished()
    assert [seq.seq_id for seq in driver.ended] == [4, 1, 3, 2, 0, 5]


@pytest.mark.parametrize("is_async", [False, True])
def test_the_least_urgent_is_preempted(is_async):
    """Though it came first, and though the urgent ones need the blocks."""
    driver = Driver(6, is_async, max_model_len=16)
    idle = driver.add([1] * 7, 9, max_tokens=8, ignore_eos=True)
    driver.step()
    urgent = [driver.add([token_id] * 7, token_id, max_tokens=8, ignore_eos=True) for token_id in (2, 3)]
    while idle.status is not SequenceStatus.WAITING:
        driver.step()
    assert [seq.status for seq in urgent] == [SequenceStatus.RUNNING] * 2
    late = driver.add([5] * 7, 9, max_tokens=8, ignore_eos=True)
    assert list(driver.scheduler.waiting) == [idle, late], "it goes first of its priority"
    driver.run_until_finished()
    assert driver.ended == [*urgent, idle, late]


@pytest.mark.parametrize("is_async", [False, True])
def test_an_urgent_request_overtakes_what_waits_and_decodes_first(is_async):
    """A prompt that is computed in parts goes behind more urgent decodes, and before others."""
    driver = Driver(32, is_async, max_num_batched_tokens=8)
    low = driver.add([1, 2], 5, max_tokens=20, ignore_eos=True)
    driver.step()
    long = driver.add([3] * 20, 2, max_tokens=2, ignore_eos=True)
    high = driver.add([4], 0, max_tokens=12, ignore_eos=True)
    steps = [driver.step() for _ in range(4)]
    assert [step.seqs for step in steps] == [[low, high, long], [high, long], [high, long], [high, long, low]]
    assert [step.num_tokens for step in steps] == [[1, 1, 6], [1, 7], [1, 7], [1, 1, 1]]
    driver.run_until_finished()


def test_prefixes_are_shared_in_the_same_step():
    driver = Driver(8, max_num_batched_tokens=32)
    a, b = driver.add([5] * 8 + [6], max_tokens=2), driver.add([5] * 8 + [7, 8], max_tokens=2)
    batch = driver.step()
    assert batch.seqs == [a, b] and batch.num_tokens == [9, 2] and b.num_cached_tokens == 8
    assert b.block_table[:2] == a.block_table[:2]
    driver.run_until_finished()


def test_a_partial_prompt_shares_only_what_is_computed():
    driver = Driver(16, max_num_batched_tokens=6, max_num_seqs=4)
    a, b = driver.add([5] * 12, max_tokens=4, ignore_eos=True), driver.add([5] * 12, max_tokens=4, ignore_eos=True)
    driver.run_until_finished()
    assert a.num_cached_tokens == 0 and b.num_cached_tokens == 8


@pytest.mark.parametrize("is_async", [False, True])
def test_generated_blocks_are_hit_by_the_next_turn(is_async):
    driver = Driver(16, is_async)
    first = driver.add([4, 5, 6], max_tokens=10, ignore_eos=True)
    driver.run_until_finished()
    second = driver.add([*first.token_ids, 9], max_tokens=2)
    driver.run_until_finished()
    assert second.num_cached_tokens == (len(first.token_ids) - 1) // 4 * 4 == 12


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 5, 100])
def test_known_ends_cost_nothing(is_async, max_tokens):
    """A request that ends by length samples exactly as many tokens as it returns, even one step ahead."""
    driver = Driver(16, is_async, max_model_len=20)
    seq = driver.add([1, 2, 3], max_tokens=max_tokens, ignore_eos=True)
    num_samples = 0
    while not driver.scheduler.is_finished():
        num_samples += driver.step().num_samples
    assert num_samples == len(seq.completion_token_ids) == min(max_tokens, 17)
    driver.check_end()


@pytest.mark.parametrize("is_async", [False, True])
def test_ends_by_eos(is_async):
    """Seen one step late with a step in flight: the surplus token is dropped and its blocks are free."""
    driver = Driver(64, is_async, vocab_size=6)
    for token_id in range(1, 9):
        driver.add([token_id, 3, 2], max_tokens=12)
    num_samples = 0
    while not driver.scheduler.is_finished():
        num_samples += driver.step().num_samples
    driver.check_end()
    assert {seq.finish_reason for seq in driver.seqs} == {"stop", "length"}
    surplus = num_samples - sum(len(seq.completion_token_ids) for seq in driver.seqs)
    assert surplus == is_async * sum(
        seq.finish_reason == "stop" and len(seq.completion_token_ids) < 12 for seq in driver.seqs
    )


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("end", ["eos", "stop_token_ids", "stop string", "length"])
def test_which_tokens_become_text(is_async, end):
    """Each token that the host sees, but for one that ends the text, once and before the end is known."""
    driver = Driver(64, is_async, vocab_size=1000)
    seq = driver.add([1, 2, 3], max_tokens=6, ignore_eos=end != "eos")
    want = expected([1, 2, 3], SamplingParams(max_tokens=6, ignore_eos=True), 32, 1000)[0]
    pushed = []

    def push(token_ids, finds_stops):
        assert finds_stops
        pushed.extend(token_ids)
        return "stop" if end == "stop string" and len(pushed) == 3 else None

    seq.detokenizer = SimpleNamespace(push=push)
    if end == "eos":
        driver.scheduler.eos_token_ids = frozenset(want[3:4])
    elif end == "stop_token_ids":
        seq.sampling_params = SamplingParams(max_tokens=6, stop_token_ids=want[3:4], ignore_eos=True)
    while not driver.scheduler.is_finished():
        driver.step()
    num_tokens = {"eos": 4, "stop_token_ids": 4, "stop string": 3, "length": 6}[end]
    assert len(set(want)) == 6 and EOS_TOKEN_ID not in want
    assert seq.completion_token_ids == want[:num_tokens]
    assert pushed == want[: min(num_tokens, 3 if end in ("eos", "stop_token_ids") else 6)]
    assert seq.finish_reason == ("length" if end == "length" else "stop")
    assert seq.stop_reason == {"stop_token_ids": want[3], "stop string": "stop"}.get(end)
    assert seq.has_end_token == (end in ("eos", "stop_token_ids"))


def test_the_stages_of_a_pipeline_share_out_the_sequences():
    """A step waits for the tokens of its own sequences alone, so that each stage has one to compute."""
    scheduler = Driver(32, pipeline_parallel_size=2).scheduler
    seqs = [Sequence(index, [index + 1, 2], SamplingParams(), 0) for index in range(5)]
    for seq in seqs:
        scheduler.add(seq)
    prompts = scheduler.schedule()
    assert prompts.seqs == seqs and not scheduler.schedule().seqs
    scheduler.postprocess(prompts, [[7]] * 5)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert (first.seqs, second.seqs) == (seqs[:3], seqs[3:]) and not scheduler.schedule().seqs
    scheduler.postprocess(first, [[7]] * 3)
    assert scheduler.schedule().seqs == seqs[:3]


def test_rows_and_reuse():
    """At most max_num_seqs run at once, and the row of one that ended goes to the next."""
    driver = Driver(64, max_num_seqs=2)
    for token_id in range(5):
        driver.add([token_id + 1] * 3, max_tokens=2, ignore_eos=True)
    rows = set()
    while not driver.scheduler.is_finished():
        batch = driver.step()
        assert len(batch.seqs) <= 2
        rows.update(batch.rows)
    assert rows == {0, 1}
    driver.check_end()


def test_the_integrity_check_sees_a_lost_row():
    driver = Driver(8)
    driver.add([1, 2, 3])
    driver.step()
    driver.scheduler.free_rows.pop()
    with pytest.raises(RuntimeError, match="rows"):
        check_integrity(driver.scheduler)


# Few distinct tokens make shared prefixes and equal blocks common.
PROMPTS = st.one_of(
    st.lists(st.integers(1, 2), min_size=1, max_size=19),
    st.builds(lambda shared, tail: [1, 2, 1, 1, 2, 2, 1, 2, 1, 1, 1, 2][:shared] + tail,
              st.integers(0, 12), st.lists(st.integers(1, 3), min_size=1, max_size=7)),
)  # fmt: skip
REQUESTS = st.tuples(
    st.integers(0, 12),  # steps to wait before it is added
    PROMPTS,
    st.integers(1, 14),  # max_tokens
    st.booleans(),  # ignore_eos
    st.one_of(st.none(), st.integers(0, 15)),  # steps after which it is aborted
    st.sampled_from([0, 0, 1, 2]),  # priority
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=12),
    is_async=st.booleans(),
    block_size=st.sampled_from([1, 2, 4, 8]),
    spare_blocks=st.integers(0, 12),
    max_num_batched_tokens=st.integers(1, 40),
    long_prefill_token_threshold=st.sampled_from([0, 0, 1, 4]),
    max_num_seqs=st.integers(1, 6),
    enable_prefix_caching=st.booleans(),
    reset_at=st.one_of(st.none(), st.integers(0, 20)),
    vocab_size=st.sampled_from([3, 20]),
    num_drafts=st.sampled_from([0, 0, 1, 5]),
    has_priorities=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(
    requests=[(0, [1] * 15, 14, True, None, 0), (0, [1] * 15, 14, True, 6, 0), (0, [2] * 9, 14, True, None, 0)],
    is_async=True,
    block_size=2,
    spare_blocks=1,
    max_num_batched_tokens=40,
    long_prefill_token_threshold=0,
    max_num_seqs=6,
    enable_prefix_caching=True,
    reset_at=4,
    vocab_size=20,
    num_drafts=0,
    has_priorities=False,
    seed=0,
)
def test_any_traffic(requests, is_async, block_size, spare_blocks, reset_at, has_priorities, **options):
    max_model_len = 20
    driver = Driver(
        -(-max_model_len // block_size) + spare_blocks,
        is_async,
        kvcache_block_size=block_size,
        max_model_len=max_model_len,
        **options,
    )
    arrivals = sorted(requests, key=lambda request: request[0])
    abort_at: dict[int, int] = {}
    for step in range(2000):
        while arrivals and arrivals[0][0] <= step:
            _, prompt, max_tokens, ignore_eos, abort_after, priority = arrivals.pop(0)
            seq = driver.add(prompt, priority * has_priorities, max_tokens=max_tokens, ignore_eos=ignore_eos)
            if abort_after is not None:
                abort_at[seq.seq_id] = step + abort_after
        for seq in driver.seqs:
            if abort_at.get(seq.seq_id) == step:
                driver.abort(seq)
        if step == reset_at:
            driver.scheduler.block_manager.reset_prefix_cache()
            driver.check()
        driver.step()
        if not arrivals and driver.scheduler.is_finished():
            break
    driver.check_end()
