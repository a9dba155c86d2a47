"""What the ranks are told of a step: only what the device cannot know, so that it does not grow with the context.

Nothing here knows how a step is chosen, or how the device keeps what it is told.
"""

import functools
import operator
from typing import NamedTuple

import numpy as np

from nanovllm.engine.scheduler import Batch
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling.adjustments import TABLES, TableChanges, list_changes
from nanovllm.sampling.logprobs import num_logprobs_of

COLDEST = 1e-5  # colder draws are greedy, and logits / temperature might overflow


class StepInput(NamedTuple):
    """Changes to the device's rows, then what to compute: D decodes of one token and parts of P prompts.

    Attributes:
        joined_ints: [J, 7] int64, rows that join: row, last token, context length, then what DeviceRows.row_ints has.
        joined_floats: [J, 6] float32, what DeviceRows.row_floats has of them.
        new_blocks: [B, 3] int64, entries of the block tables: row, index, block.
        decode_rows: [D] int64.
        prompts: [P, 3] int64, row, first position and number of tokens of each part.
        token_ids: [sum of the numbers] int64, those tokens.
        is_last_partial: whether the last part does not reach its prompt's end, so that it samples nothing.
        is_filtered: whether a row asks for top-k, top-p or min-p.
        adjusting, num_logprobs: as of StepShape.
        table_changes: to the tables by which logits are adjusted; None: there are none.
        joined_tokens: [T, 3] int64, row, position and token of all that the rows that join have; without speculation
            nobody asks for them, and there are none.
        num_drafts: as of StepShape.
        prompt_targets: [L, 2] int64, of the prompts' tokens whose logprobs are asked for, which among the prompts'
            tokens tells its successor's, and the successor.
        num_prompt_logprobs: as num_logprobs, for these.
    """

    joined_ints: np.ndarray
    joined_floats: np.ndarray
    new_blocks: np.ndarray
    decode_rows: np.ndarray
    prompts: np.ndarray
    token_ids: np.ndarray
    is_last_partial: bool
    is_filtered: bool
    adjusting: int
    num_logprobs: int
    table_changes: TableChanges | None
    joined_tokens: np.ndarray
    num_drafts: int
    prompt_targets: np.ndarray
    num_prompt_logprobs: int


def build_step_input(batch: Batch, vocab_size: int, tells_texts: bool = False) -> StepInput:
    """What the ranks are told of a batch that has sequences; `tells_texts`: all tokens of those that join, too."""
    joined_ints, joined_floats, joined_tokens = [], [], []
    for seq, start in zip(batch.joined, batch.starts[len(batch.seqs) - batch.num_joined :], strict=True):
        joined_ints.append((seq.row, seq.token_ids[-1], start, *_row_ints(seq)))
        joined_floats.append(_row_floats(seq))
        if tells_texts:
            joined_tokens.append(_text(seq))
    decode_rows, prompts, token_ids, prompt_targets = [], [], [], []
    parts = zip(batch.seqs, batch.rows, batch.starts, batch.num_tokens, strict=True)
    for index, (seq, row, start, num_tokens) in enumerate(parts):
        is_sampled = index < batch.num_samples
        if num_tokens == 1 and is_sampled:  # its newest token, which the device has
            decode_rows.append(row)
        else:
            prompts.append((row, start, num_tokens))
            if seq.wants_prompt_logprobs:
                prompt_targets += enumerate(seq.prompt_targets(start, num_tokens), len(token_ids))
            token_ids += seq.token_ids[start : start + num_tokens]
    flags = functools.reduce(operator.or_, (seq.adjustment.flags for seq in batch.seqs if seq.adjustment), 0)
    told = [seq.logprobs for seq in batch.seqs if seq.logprobs is not None]
    return StepInput(
        joined_ints=np.array(joined_ints, dtype=np.int64).reshape(-1, 7),
        joined_floats=np.array(joined_floats, dtype=np.float32).reshape(-1, 6),
        new_blocks=np.array(batch.new_blocks, dtype=np.int64).reshape(-1, 3),
        decode_rows=np.array(decode_rows, dtype=np.int64),
        prompts=np.array(prompts, dtype=np.int64).reshape(-1, 3),
        token_ids=np.array(token_ids, dtype=np.int64),
        is_last_partial=batch.is_last_partial,
        is_filtered=any(seq.is_filtered for seq in batch.seqs),
        adjusting=flags & TABLES,
        num_logprobs=num_logprobs_of((record.num_top for record in told), vocab_size),
        table_changes=list_changes(batch, vocab_size),
        joined_tokens=np.concatenate([np.zeros((0, 3), dtype=np.int64), *joined_tokens]),
        num_drafts=batch.num_drafts,
        prompt_targets=np.array(prompt_targets, dtype=np.int64).reshape(-1, 2),
        num_prompt_logprobs=num_logprobs_of((record.num_prompt_top for record in told), vocab_size),
    )


def _text(seq: Sequence) -> np.ndarray:
    """What `joined_tokens` has of a sequence."""
    num_tokens = len(seq.token_ids)
    return np.stack([np.full(num_tokens, seq.row), np.arange(num_tokens), np.array(seq.token_ids)], axis=1)


def _row_ints(seq: Sequence) -> tuple[int, ...]:
    """What `DeviceRows.row_ints` has of a sequence."""
    adjustment = seq.adjustment
    least_length, flags = (adjustment.min_length, adjustment.flags) if adjustment is not None else (0, 0)
    return seq.sampling_params.top_k, _as_int64(seq.seed), least_length, flags


def _row_floats(seq: Sequence) -> tuple[float, ...]:
    """What `DeviceRows.row_floats` has of a sequence."""
    params = seq.sampling_params
    temperature = params.temperature if params.temperature >= COLDEST else 0.0
    penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
    return temperature, params.top_p, params.min_p, *penalties


def _as_int64(seed: int) -> int:
    """The signed number with the bits of an unsigned one, modulo 2**64."""
    return (seed + 2**63) % 2**64 - 2**63
