"""The state of one request, or of one of its samples, on the host: its tokens, and how far they got.

Nothing here knows of devices or other requests; of text, logprobs and constraints it only keeps who deals with them.
"""

from enum import Enum, auto
from typing import NamedTuple

from nanovllm.sampling.adjustments import Adjustment
from nanovllm.sampling.constraints import Constraint
from nanovllm.sampling.logprobs import LogprobRecord
from nanovllm.sampling_params import SamplingParams
from nanovllm.speculative.record import DraftRecord
from nanovllm.text.detokenizer import Detokenizer


class SequenceStatus(Enum):
    """Where a sequence stands: in the waiting queue, with a row of the device's batch, or done."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class BlockName(NamedTuple):
    """What a full block holds: the hash that finds it, then what confirms it."""

    hash: int
    parent_hash: int | None  # None: the block is a sequence's first
    token_ids: list[int]


class Sequence:
    """A request's tokens and how far they got.

    `num_tokens` counts tokens that exist on the device; with async scheduling the last of them may not have been
    seen by the host yet, so that `token_ids` is then one shorter. While a step that checks drafts is unseen, it is the
    most that there can be, as if all were accepted; `drafts.num_unseen` fewer are certain.
    """

    def __init__(
        self, seq_id: int, token_ids: list[int], sampling_params: SamplingParams, seed: int, priority: int = 0
    ) -> None:
        """`seed` is what the draws of the request depend on, besides positions; a lower `priority` goes first."""
        self.seq_id = self.request_number = seq_id  # a request's further samples have the number of its first one
        self.priority = priority
        self.sampling_params = sampling_params
        self.seed = seed
        self.status = SequenceStatus.WAITING
        self.token_ids = list(token_ids)
        self.num_prompt_tokens = self.num_tokens = len(token_ids)
        self.num_computed_tokens = 0  # tokens whose KV the launched steps have stored, of those that num_tokens counts
        self.drafts = DraftRecord()
        self.num_cached_tokens = -1  # of these, found in the prefix cache when first admitted; -1 before
        self.block_table: list[int] = []
        self.block_names: list[BlockName] = []  # of its first full blocks, as far as they were needed
        self.row = -1  # row of the device's decode batch while running
        self.is_filtered = sampling_params.is_filtered
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.has_end_token = False  # whether the last token is one that ends the text
        self.detokenizer: Detokenizer | None = None
        self.adjustment: Adjustment | None = None  # of its logits
        self.logprobs: LogprobRecord | None = None
        # Samples of one prompt share its blocks, if need be under names that no other request can have.
        self.cache_salt: int | None = None
        self.num_handed_out = 0  # generated tokens, of a request that hands out each once
        self.first_scheduled_time: float | None = None  # these in seconds of time.time()
        self.first_token_time: float | None = None  # when the first token was seen
        self.finished_time: float | None = None

    @property
    def num_completion_tokens(self) -> int:
        """Generated tokens, an unseen one included, but no unseen drafts."""
        return self.num_tokens - self.drafts.num_unseen - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        """Generated tokens that the host has seen."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def constraint(self) -> Constraint | None:
        """What says which tokens may come next; None: nothing does."""
        return self.adjustment.constraint if self.adjustment is not None else None

    @property
    def waits_for_host(self) -> bool:
        """Whether its next token cannot be drawn before the last one is seen, as a constraint depends on that."""
        return self.has_unseen_token and self.constraint is not None

    @property
    def has_unseen_token(self) -> bool:
        """Whether a step was launched that draws its last token, but the host has not seen it."""
        return len(self.token_ids) < self.num_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether all tokens of the prompt must be computed for the sake of their logprobs."""
        return self.logprobs is not None and self.logprobs.prompt_logprobs is not None

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, by itself or by an abort."""
        return self.status is SequenceStatus.FINISHED
