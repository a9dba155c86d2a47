"""One request's state on the host: its tokens, and how far they got.

Nothing here knows of devices or other requests; of text it only keeps who makes it.
"""

from enum import Enum, auto
from typing import NamedTuple

from nanovllm.outputs import Result
from nanovllm.sampling_params import SamplingParams
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
    seen by the host yet, so that `token_ids` is then one shorter.
    """

    def __init__(self, seq_id: int, token_ids: list[int], sampling_params: SamplingParams, seed: int) -> None:
        """`seed` is what the draws of the request depend on, besides positions."""
        self.seq_id = seq_id
        self.sampling_params = sampling_params
        self.seed = seed
        self.status = SequenceStatus.WAITING
        self.token_ids = list(token_ids)
        self.num_prompt_tokens = self.num_tokens = len(token_ids)
        self.num_computed_tokens = 0  # tokens whose KV the launched steps have stored
        self.num_cached_tokens = -1  # of these, found in the prefix cache when first admitted; -1 before
        self.block_table: list[int] = []
        self.block_names: list[BlockName] = []  # of its first full blocks, as far as they were needed
        self.row = -1  # row of the device's decode batch while running
        self.finish_reason: str | None = None
        self.results: dict[int, Result] = {}  # where its result is to be put, by its id
        self.detokenizer: Detokenizer | None = None
        self.first_token_time: float | None = None  # time.perf_counter() when the first token was seen

    @property
    def num_completion_tokens(self) -> int:
        """Generated tokens, an unseen one included."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        """Generated tokens that the host has seen."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended, by itself or by an abort."""
        return self.status is SequenceStatus.FINISHED
