"""When checking drafts pays, by what the host has seen: with overlapped steps, all but the last one.

A step with more tokens takes longer, whether drafts are accepted or not, and graphs want few sizes: so a step checks
as many drafts of each of its rows, or none at all. Nothing here knows of devices or of what proposes.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

import numpy as np

from nanovllm.kernels.verify_rows import NUM_CHECKED, NUM_PROPOSED, NUM_TOKENS, REPORT_HEAD
from nanovllm.speculative.params import Speculation
from nanovllm.speculative.record import DraftRecord

if TYPE_CHECKING:
    from nanovllm.config import Config
    from nanovllm.engine.scheduler import Batch, Scheduler
    from nanovllm.engine.sequence import Sequence

# The share of the drafts that a step computes which must be expected to be accepted. By how much of itself a step
# takes longer on an H200, behind 500 tokens, with 7 drafts of each of 1, 2, 4, 8 rows, with 3 of 16, with 1 of 24, 32:
# Qwen3-0.6B 0.69, 0.72, 0.70, 0.64, 0.40, 0.08, 0.25, that is up to 0.13 for a draft of a row (and once 0.25);
# Qwen3-8B 0.22, 0.03, 0.10, 0.10, 0.15, 0.06, 0.10.
LEAST_SHARE = 0.15


def pays(records: Items[DraftRecord], num_drafts: int) -> bool:
    """Whether enough of so many drafts of each row are expected to be accepted."""
    gain = sum(min(record.num_proposed, num_drafts) * record.acceptance for record in records)
    return gain >= LEAST_SHARE * num_drafts * len(records)


def choose_num_drafts(scheduler: Scheduler) -> int:
    """How many drafts the next step checks of each sequence, perhaps 0.

    So it is if the step has prompts, if one of its rows draws otherwise than from the logits as they are, if too few
    drafts are expected to be accepted, or if others would have to be preempted for them.
    """
    config, blocks = scheduler.config, scheduler.block_manager
    if config.speculation is None:
        return 0
    seqs = [seq for seq in scheduler.running if not (seq.waits_for_host or scheduler.end_is_due(seq))]
    num_drafts = config.speculation.num_drafts_of(len(seqs)) if seqs else 0
    may_check = (
        num_drafts > 0
        and len(seqs) * (1 + num_drafts) <= config.max_num_batched_tokens
        and all(may_check_drafts(seq) for seq in seqs)
        and pays([seq.drafts for seq in seqs], num_drafts)
        and not scheduler.admits_next()
    )
    if not may_check:
        return 0
    num_lacking = sum(blocks.num_lacking(seq, num_ahead_of(seq, num_drafts, config)) for seq in seqs)
    return num_drafts if num_lacking <= len(blocks.free_block_ids) else 0


def may_check_drafts(seq: Sequence) -> bool:
    """Whether a sequence's next step needs only its last token, and draws from the logits as they are."""
    tells_logprobs = seq.logprobs is not None and seq.logprobs.num_top is not None
    return seq.num_computed_tokens == seq.num_tokens - 1 and seq.adjustment is None and not tells_logprobs


def num_ahead_of(seq: Sequence, num_drafts: int, config: Config) -> int:
    """Tokens behind its own that a sequence needs blocks for; fewer than none if it counts some beyond its end."""
    if config.speculation is not None:
        num_drafts += config.speculation.num_drafted_ahead
    return min(num_drafts, config.max_model_len - seq.num_tokens)


def count_drafts(seq: Sequence, num_drafts: int) -> None:
    """Counts the drafts of a step that is launched as if all were accepted, until `drop_refused` knows."""
    seq.num_tokens += num_drafts
    seq.num_computed_tokens += num_drafts
    seq.drafts.num_unseen += num_drafts


def drop_refused(seq: Sequence, num_drafts: int, num_accepted: int) -> None:
    """Counts no longer the drafts of a step that were not accepted."""
    seq.drafts.num_unseen -= num_drafts
    seq.num_tokens -= num_drafts - num_accepted
    if seq.row >= 0:  # else it runs no more, and nothing of it is computed
        seq.num_computed_tokens -= num_drafts - num_accepted


def list_texts(seqs: Items[Sequence]) -> np.ndarray:
    """Row, position and token of all that sequences have, int64 [T, 3]: where drafts are looked up."""
    texts = [np.zeros((0, 3), dtype=np.int64)]
    for seq in seqs:
        num_tokens = len(seq.token_ids)
        texts.append(np.stack([np.full(num_tokens, seq.row), np.arange(num_tokens), np.array(seq.token_ids)], axis=1))
    return np.concatenate(texts)


def take_in_drafts(batch: Batch, reports: list[list[int]], speculation: Speculation) -> list[list[int]]:
    """Counts the drafts of a step by what its rows report, see kernels/verify_rows.py; returns each row's tokens."""
    tokens = []
    for seq, report in zip(batch.seqs[: batch.num_samples], reports, strict=True):
        if not seq.is_finished:  # else the step is surplus
            # A look-up may find nothing; a model always has something to say.
            num_proposed = report[NUM_PROPOSED] if speculation.model is None else speculation.num_speculative_tokens
            seq.drafts.take_in(report[NUM_CHECKED], report[NUM_TOKENS] - 1, num_proposed)
        tokens.append(report[REPORT_HEAD : REPORT_HEAD + report[NUM_TOKENS]])
    return tokens
