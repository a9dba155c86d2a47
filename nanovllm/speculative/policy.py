"""When checking drafts pays, by what the host has seen: with overlapped steps, all but the last one.

A step with more tokens takes longer, whether drafts are accepted or not, and graphs want few sizes: so a step checks
as many drafts of each of its rows, or none at all. Nothing here knows of devices or of what proposes.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nanovllm.kernels.verify_rows import NUM_CHECKED, NUM_PROPOSED, NUM_TOKENS, REPORT_HEAD

if TYPE_CHECKING:
    from nanovllm.engine.scheduler import Batch
    from nanovllm.engine.sequence import Sequence

# The share of the drafts that a step computes which must be expected to be accepted. By how much of itself a step
# takes longer on an H200, behind 500 tokens, with 7 drafts of each of 1, 2, 4, 8 rows, with 3 of 16, with 1 of 24, 32:
# Qwen3-0.6B 0.69, 0.72, 0.70, 0.64, 0.40, 0.08, 0.25, that is up to 0.13 for a draft of a row (and once 0.25);
# Qwen3-8B 0.22, 0.03, 0.10, 0.10, 0.15, 0.06, 0.10.
LEAST_SHARE = 0.15

# Of the estimate of a sequence's acceptance: how much of it is the last step's, and by how much it comes back to 1 in
# each step that has drafts and does not check them, so that they are tried again now and then.
LAST_SHARE = 0.25
RECOVERY = 2**-10


@dataclass(slots=True)
class DraftRecord:
    """What the host has seen of a sequence's drafts.

    Attributes:
        num_proposed: drafts that there were for it behind the last step that it saw.
        acceptance: an estimate of the share of checked drafts that is accepted, at first hopeful.
        num_checked, num_accepted: drafts so far.
    """

    num_proposed: int = 0
    acceptance: float = 1.0
    num_checked: int = 0
    num_accepted: int = 0

    def take_in(self, num_checked: int, num_accepted: int, num_proposed: int) -> None:
        """Counts the drafts of a step."""
        if num_checked:
            self.acceptance += LAST_SHARE * (num_accepted / num_checked - self.acceptance)
        elif self.num_proposed:
            self.acceptance += RECOVERY * (1 - self.acceptance)
        self.num_checked += num_checked
        self.num_accepted += num_accepted
        self.num_proposed = num_proposed


def pays(records: Items[DraftRecord], num_drafts: int) -> bool:
    """Whether enough of so many drafts of each row are expected to be accepted."""
    gain = sum(min(record.num_proposed, num_drafts) * record.acceptance for record in records)
    return gain >= LEAST_SHARE * num_drafts * len(records)


def list_texts(seqs: Items[Sequence]) -> np.ndarray:
    """Row, position and token of all that sequences have, int64 [T, 3]: where drafts are looked up."""
    texts = [np.zeros((0, 3), dtype=np.int64)]
    for seq in seqs:
        num_tokens = len(seq.token_ids)
        texts.append(np.stack([np.full(num_tokens, seq.row), np.arange(num_tokens), np.array(seq.token_ids)], axis=1))
    return np.concatenate(texts)


def take_in_drafts(batch: Batch, reports: list[list[int]]) -> list[list[int]]:
    """Counts the drafts of a step by what its rows report, see kernels/verify_rows.py; returns each row's tokens."""
    tokens = []
    for seq, report in zip(batch.seqs[: batch.num_samples], reports, strict=True):
        if not seq.is_finished:  # else the step is surplus
            seq.drafts.take_in(report[NUM_CHECKED], report[NUM_TOKENS] - 1, report[NUM_PROPOSED])
        tokens.append(report[REPORT_HEAD : REPORT_HEAD + report[NUM_TOKENS]])
    return tokens
