"""What the ranks are told of a step, column by column, and what becomes of it on the device's rows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import VOCAB_SIZE

from nanovllm import SamplingParams
from nanovllm.engine.device_rows import RING_SIZE, DeviceRows, PromptParts
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_input import StepShape, build_step_input
from nanovllm.kernels.adjust_logits import USES_TABLE
from nanovllm.kernels.verify_rows import REPORT_HEAD
from nanovllm.sampling.adjustments import Adjustment
from nanovllm.sampling.row_params import COLDEST
from nanovllm.speculative.draft_rows import DraftRows
from nanovllm.speculative.params import Speculation

BUDGET, MAX_NUM_SEQS, MAX_BLOCKS = 20, 8, 16
PADDING_ROW = MAX_NUM_SEQS


@pytest.fixture
def config():
    return SimpleNamespace(
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=BUDGET,
        long_prefill_token_threshold=0,
        max_model_len=4 * MAX_BLOCKS,
        max_blocks_per_seq=MAX_BLOCKS,
        kvcache_block_size=4,
        enable_prefix_caching=True,
        speculation=None,
        draft_config=None,
        pipeline_parallel_size=1,
    )


@pytest.fixture
def scheduler(config):
    return Scheduler(config, 64, frozenset())


@pytest.fixture
def rows(config):
    return DeviceRows(config, torch.device("cpu"), BUDGET)


def add(scheduler: Scheduler, prompt: list[int], seed: int = 0, **params) -> Sequence:
    seq = Sequence(0, prompt, SamplingParams(**params), seed)
    scheduler.add(seq)
    return seq


def mixed_batch(scheduler: Scheduler) -> tuple[list[Sequence], Batch]:
    """A decode, a whole prompt, one of which only the last token is not cached, one of one token, a partial one."""
    first = add(scheduler, [1, 2, 3, 4, 5])
    scheduler.postprocess(scheduler.schedule(), [[6]])
    prompts = [[7, 8, 9], [1, 2, 3, 4, 10], [11], list(range(20, 40))]
    return [first, *(add(scheduler, prompt) for prompt in prompts)], scheduler.schedule()


def test_columns_of_rows_that_join(scheduler, rows):
    """One order: of the columns, of what the docstring of StepInput says, of the rows on the device."""
    params = {"temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0.125, "min_tokens": 6}
    penalties = {"presence_penalty": 0.75, "frequency_penalty": -1.5, "repetition_penalty": 3.0}
    hot = add(scheduler, [3, 4, 5], seed=2**64 - 1, **params, **penalties)
    hot.adjustment = Adjustment(hot.sampling_params, hot.token_ids, frozenset(), [], VOCAB_SIZE, None)
    cold = add(scheduler, [6, 9], seed=5, temperature=COLDEST / 2)
    step = build_step_input(scheduler.schedule(), VOCAB_SIZE)
    assert (step.joined_ints.dtype, step.joined_floats.dtype) == (np.int64, np.float32)
    assert step.joined_ints.tolist() == [
        # row, last token, context length, top_k, seed, least length, flags
        [hot.row, 5, 0, 7, -1, 9, USES_TABLE],
        [cold.row, 9, 0, cold.sampling_params.top_k, 5, 0, 0],
    ]
    #                                     temperature, top_p, min_p, presence, frequency, repetition
    assert step.joined_floats.tolist() == [[0.5, 0.25, 0.125, 0.75, -1.5, 3.0], [0.0, 1.0, 0.0, 0.0, 0.0, 1.0]]
    assert step.shape.is_filtered and step.shape.adjusting == USES_TABLE
    assert step.sampling.table_changes.rows.tolist() == [hot.row]
    rows.apply_changes(step)
    assert rows.last_tokens[[hot.row, cold.row]].tolist() == [5, 9]
    assert rows.context_lens[[hot.row, cold.row]].tolist() == [0, 0]
    assert rows.row_ints[:, hot.row].tolist() == [7, -1, 9, USES_TABLE]
    assert rows.row_ints[:, cold.row].tolist() == [cold.sampling_params.top_k, 5, 0, 0]
    assert rows.row_floats[:, hot.row].tolist() == [0.5, 0.25, 0.125, 0.75, -1.5, 3.0]
    assert rows.row_floats[:, cold.row].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_a_cached_prefix_is_the_context_of_a_row_that_joins(scheduler, rows):
    (*_, cached, _, _), batch = mixed_batch(scheduler)
    step = build_step_input(batch, VOCAB_SIZE)
    row, last_token, context_len, *_ = next(line for line in step.joined_ints.tolist() if line[0] == cached.row)
    assert (row, last_token, context_len) == (cached.row, 10, 4)
    rows.apply_changes(step)
    assert rows.context_lens[cached.row] == 4


def test_texts_of_rows_that_join(scheduler, config):
    """Told only if drafts are looked up in them: a preempted sequence's with all that it has generated."""
    config.speculation = Speculation(3, 2, 1)
    rows = DeviceRows(config, torch.device("cpu"), BUDGET)
    draft_rows = DraftRows(config, rows, tp=None, sampler=None)  # which a look-up has no need of
    assert rows.token_ring.shape == (RING_SIZE, MAX_NUM_SEQS + 1, REPORT_HEAD + 1 + 3)
    seqs, batch = mixed_batch(scheduler)
    assert build_step_input(batch, VOCAB_SIZE).joined_texts is None
    step = build_step_input(batch, VOCAB_SIZE, tells_texts=True)
    assert step.joined_texts.dtype == np.int64 and step.shape.num_drafts == 0
    draft_rows.num_drafts.fill_(3)  # of those who had the rows before
    draft_rows.apply_changes(step)
    assert draft_rows.num_drafts[[seq.row for seq in seqs]].tolist() == [3, 0, 0, 0, 0]
    for seq in seqs[1:]:  # the first one has joined before
        assert draft_rows.history[seq.row, : len(seq.token_ids)].tolist() == seq.token_ids
    scheduler.postprocess(batch, [[50 + i] for i in range(batch.num_samples)])
    for seq in reversed(seqs):
        scheduler.preempt(seq)
    step = build_step_input(scheduler.schedule(), VOCAB_SIZE, tells_texts=True)
    draft_rows.apply_changes(step)
    assert draft_rows.history[seqs[0].row, :7].tolist() == [1, 2, 3, 4, 5, 6, 50]


def test_new_blocks(scheduler, rows):
    seqs, batch = mixed_batch(scheduler)
    step = build_step_input(batch, VOCAB_SIZE)
    rows.apply_changes(step)
    for seq in seqs[1:]:
        assert rows.block_tables[seq.row, : len(seq.block_table)].tolist() == seq.block_table
    assert step.new_blocks.tolist() == [list(entry) for entry in batch.new_blocks]


def test_decodes_and_parts_of_prompts(scheduler, rows):
    """Who computes its newest token alone decodes; the last sequence of a batch, and no other, may be partial."""
    (first, whole, cached, single, partial), batch = mixed_batch(scheduler)
    assert batch.seqs == [first, whole, cached, single, partial]
    assert batch.is_last_partial and batch.num_samples == len(batch.seqs) - 1
    step = build_step_input(batch, VOCAB_SIZE)
    assert step.is_last_partial and step.sampling is None
    assert step.shape == StepShape(num_decodes=3, num_prompts=2, num_tokens=17, is_filtered=False)
    assert step.decode_rows.tolist() == [first.row, cached.row, single.row]
    #                                 row, first position, number of tokens
    assert step.prompts.tolist() == [[whole.row, 0, 3], [partial.row, 0, 14]]
    assert step.token_ids.tolist() == [7, 8, 9, *range(20, 34)]
    rows.apply_changes(step)
    assert rows.decode_rows.tolist() == [first.row, cached.row, single.row] + [PADDING_ROW] * (MAX_NUM_SEQS - 3)
    # Its end: five tokens of the budget go to nobody.
    scheduler.postprocess(batch, [[50]] * batch.num_samples)
    batch = scheduler.schedule()
    assert batch.seqs[-1] is partial and not batch.is_last_partial and batch.num_samples == len(batch.seqs)
    step = build_step_input(batch, VOCAB_SIZE)
    assert not step.is_last_partial and step.prompts.tolist() == [[partial.row, 14, 6]]


def test_one_token_that_does_not_reach_the_end_is_no_decode(scheduler):
    scheduler.config.max_num_batched_tokens = 1
    seq = add(scheduler, [5, 6])
    step = build_step_input(scheduler.schedule(), VOCAB_SIZE)
    assert step.is_last_partial and step.decode_rows.tolist() == [] and step.prompts.tolist() == [[seq.row, 0, 1]]
    step = build_step_input(scheduler.schedule(), VOCAB_SIZE)
    assert not step.is_last_partial and step.decode_rows.tolist() == [seq.row] and len(step.prompts) == 0


@pytest.mark.parametrize("num_padded_tokens", [5, 8])
@pytest.mark.parametrize("num_padded_prompts", [2, 4])
@pytest.mark.parametrize("is_last_partial", [False, True])
def test_prompt_parts(rows, is_last_partial, num_padded_prompts, num_padded_tokens):
    """What is read of prompts is what was written, field by field; a partial one's sample goes to the padding row."""
    prompts, token_ids = np.array([[3, 4, 2], [0, 0, 3]]), np.array([70, 71, 80, 81, 82])
    shape = StepShape(0, num_padded_prompts, num_padded_tokens, is_filtered=False)
    rows.set_prompts(prompts, token_ids, is_last_partial, shape)
    parts = rows.prompt_parts(num_padded_prompts, num_padded_tokens)
    num_padding, num_more = num_padded_tokens - 5, num_padded_prompts - 2
    assert parts._asdict() == {name: value for name, value in parts._asdict().items() if value.dtype == torch.int64}
    assert [part.tolist() for part in parts] == list(
        PromptParts(
            token_ids=[70, 71, 80, 81, 82] + [0] * num_padding,
            positions=[4, 5, 0, 1, 2] + [0] * num_padding,
            token_rows=[3, 3, 0, 0, 0] + [PADDING_ROW] * num_padding,
            rows=[3, 0] + [PADDING_ROW] * num_more,
            context_lens=[6, 3] + [0] * num_more,
            sample_rows=[3, PADDING_ROW if is_last_partial else 0] + [PADDING_ROW] * num_more,
            cu_seqlens=[0, 2, 5] + [5] * num_more,
        )
    )
    lengths = PromptParts.lengths(num_padded_prompts, num_padded_tokens)
    assert tuple(map(len, parts)) == lengths
    address = rows.prompts.data_ptr()
    assert parts.token_ids.data_ptr() == address  # views of the buffer that graphs know
    assert parts.cu_seqlens.data_ptr() == address + 8 * sum(lengths[:-1])


def test_nothing_is_allocated_anew(scheduler, rows):
    """CUDA graphs hold the addresses of all that a step reads."""
    addresses = {name: value.data_ptr() for name, value in vars(rows).items() if isinstance(value, torch.Tensor)}
    step = build_step_input(mixed_batch(scheduler)[1], VOCAB_SIZE)
    rows.apply_changes(step)
    rows.set_prompts(step.prompts, step.token_ids, step.is_last_partial, step.shape)
    assert len(addresses) == 10
    assert {name: getattr(rows, name).data_ptr() for name in addresses} == addresses


def test_tokens_are_read_where_the_step_writes_them(rows):
    for count in range(2 * RING_SIZE):
        entry = rows.count_step()
        assert entry.data_ptr() == rows.token_ring[count % RING_SIZE].data_ptr()
