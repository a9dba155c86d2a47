"""Requests whose logits are changed before a token is drawn: what the host knows of them, and tells the ranks.

Penalties count on the device, tokens that may not end a text yet are told by their position, and a bias or a list of
tokens stays as it is: all of these are sent once, when a request gets its row, and never stop the overlap of steps. A
constraint is different: which tokens it allows depends on the last one, so the host sends a mask with each step, and
the request takes part in every other step only. `kernels/adjust_logits.py` says what the numbers do to the logits.
"""

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nanovllm.kernels.adjust_logits import (
    COUNT_SHIFT,
    ENDS_TEXT,
    IN_PROMPT,
    IS_ALLOW_LIST,
    LISTED,
    USES_BIAS,
    USES_MASK,
    USES_TABLE,
)
from nanovllm.sampling.constraints import Constraint
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanovllm.engine.scheduler import Batch

TABLES = USES_TABLE | USES_BIAS | USES_MASK  # the flags that say which tables a step reads


def bad_word_tokens(words: Items[str], tokenizer: Tokenizer | None, vocab_size: int) -> list[tuple[int, ...]]:
    """The token ids of bad words, at the beginning of a text and, where they differ there, behind a space.

    Without those that the model cannot generate, as the tokenizer may know more tokens.
    """
    spellings = []
    for word in words:
        word = word.lstrip() or word  # spaces alone are a word too
        alone = tokenizer.encode(word, add_special_tokens=False)
        behind_space = tokenizer.encode(" " + word, add_special_tokens=False)
        spellings.append(tuple(alone))
        # One more token is the space itself, which bans nothing that the word alone does not.
        if len(behind_space) == len(alone) and behind_space != alone:
            spellings.append(tuple(behind_space))
    return [spelling for spelling in spellings if spelling and max(spelling) < vocab_size]


def has_penalties(params: SamplingParams) -> bool:
    """Whether logits depend on how often their tokens have been seen."""
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


def adjusts_logits(params: SamplingParams) -> bool:
    """Whether logits must be changed before a token is drawn, otherwise than by temperature."""
    return bool(
        has_penalties(params)
        or params.min_tokens > 0
        or params.logit_bias
        or params.bad_words
        or params.allowed_token_ids
        or params.structured_outputs
    )


class Adjustment:
    """What one sample of a request does to its logits.

    Attributes:
        flags: of kernels/adjust_logits.py.
        min_length: the length, prompt included, below which the text must not end.
        constraint: what says, token by token, which may come next; None: nothing does.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: list[int],
        end_token_ids: frozenset[int],
        bad_words: list[tuple[int, ...]],
        vocab_size: int,
        constraint: Constraint | None,
    ) -> None:
        """`end_token_ids` would end the text; of bad words, those of one token are banned here."""
        self.constraint = constraint
        self.min_length = len(prompt_token_ids) + params.min_tokens
        self.counts_tokens = has_penalties(params)
        self.bias = params.logit_bias or {}
        parts = []
        if params.repetition_penalty != 1:
            parts.append((IN_PROMPT, sorted(set(prompt_token_ids))))
        if params.min_tokens:
            parts.append((ENDS_TEXT, sorted(i for i in end_token_ids if i < vocab_size)))
        listed = {word[0] for word in bad_words if len(word) == 1}
        if params.allowed_token_ids:
            listed = set(params.allowed_token_ids) - listed
        if listed:
            parts.append((LISTED, sorted(listed)))
        self.entries = np.array(
            [(token_id, value) for value, token_ids in parts for token_id in token_ids], dtype=np.int64
        ).reshape(-1, 2)
        self.flags = (
            USES_TABLE * bool(parts or self.counts_tokens or params.allowed_token_ids)
            | USES_BIAS * bool(self.bias)
            | USES_MASK * (constraint is not None)
            | IS_ALLOW_LIST * bool(params.allowed_token_ids)
        )

    def table_entries(self, row: int, completion_token_ids: list[int]) -> np.ndarray:
        """Row, token id and what to add there to a table of zeros, int64 [E, 3], once these tokens are generated."""
        entries = self.entries
        if self.counts_tokens and completion_token_ids:
            token_ids, counts = np.unique(completion_token_ids, return_counts=True)
            entries = np.concatenate([entries, np.stack([token_ids, counts << COUNT_SHIFT], axis=1)])
        return np.insert(entries, 0, row, axis=1)


class TableChanges(NamedTuple):
    """What changes in the tables that logits are adjusted by, before a step.

    Attributes:
        rows: [J] int64, rows whose tables begin anew.
        entries: [E, 3] int64, row, token id, and what is added there to the table of tokens.
        bias_entries: [F, 2] int64, row and token id of each of bias_values.
        bias_values: [F] float32.
        mask_rows: [M] int64, rows that get a new mask.
        masks: [M, ceil(vocab / 32)] int32.
    """

    rows: np.ndarray
    entries: np.ndarray
    bias_entries: np.ndarray
    bias_values: np.ndarray
    mask_rows: np.ndarray
    masks: np.ndarray


def list_changes(batch: "Batch", vocab_size: int) -> TableChanges | None:
    """What changes with the sequences that join the rows, and those that a token is drawn for; None: nothing."""
    joined = [seq for seq in batch.joined if seq.adjustment is not None]
    constrained = [seq for seq in batch.seqs[: batch.num_samples] if seq.constraint is not None]
    if not joined and not constrained:
        return None
    biases = [(seq.row, *item) for seq in joined for item in seq.adjustment.bias.items()]
    masks = np.zeros((len(constrained), -(-vocab_size // 32)), dtype=np.int32)
    for mask, seq in zip(masks, constrained, strict=True):
        seq.constraint.fill_mask(mask)
    entries = [seq.adjustment.table_entries(seq.row, seq.completion_token_ids) for seq in joined]
    return TableChanges(
        rows=np.array([seq.row for seq in joined], dtype=np.int64),
        entries=np.concatenate([np.zeros((0, 3), dtype=np.int64), *entries]),
        bias_entries=np.array([bias[:2] for bias in biases], dtype=np.int64).reshape(-1, 2),
        bias_values=np.array([bias[2] for bias in biases], dtype=np.float32),
        mask_rows=np.array([seq.row for seq in constrained], dtype=np.int64),
        masks=masks,
    )
