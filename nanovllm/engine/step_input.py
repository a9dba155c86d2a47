"""What the ranks are told of a step: only what the device cannot know, so that it does not grow with the context.

Nothing here knows how a step is chosen, or how the device keeps what it is told.
"""

from typing import NamedTuple

import numpy as np

from nanovllm.engine.scheduler import Batch
from nanovllm.sampling.row_params import row_floats, row_ints
from nanovllm.sampling.step_sampling import SamplingInput, add_sampling
from nanovllm.speculative.policy import list_texts


class StepShape(NamedTuple):
    """The sizes of a step's tensors, which a CUDA graph fixes."""

    num_decodes: int
    num_prompts: int
    num_tokens: int  # of the prompts
    is_filtered: bool  # whether a row asks for top-k, top-p or min-p
    adjusting: int = 0  # the tables by which logits are adjusted, flags of kernels/adjust_logits.py
    num_logprobs: int = 0  # the logprobs told of each row: its token's and the best ones'; 0: none
    num_drafts: int = 0  # computed of each row that decodes, beside its last token

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the logits as they are, and nothing is told of these."""
        return not self.adjusting and not self.num_logprobs


class StepInput(NamedTuple):
    """Changes to the device's rows, then what to compute: D decodes of one token and parts of P prompts.

    Attributes:
        shape: how much there is to compute.
        joined_ints: [J, 7] int64, rows that join: row, last token, context length, then what DeviceRows.row_ints has.
        joined_floats: [J, 6] float32, what DeviceRows.row_floats has of them.
        new_blocks: [B, 3] int64, entries of the block tables: row, index, block.
        decode_rows: [D] int64.
        decode_token_ids: [D] int64, their last tokens; None: the device has drawn them itself.
        prompts: [P, 3] int64, row, first position and number of tokens of each part.
        token_ids: [sum of the numbers] int64, those tokens.
        is_last_partial: whether the last part does not reach its prompt's end, so that it samples nothing.
        sampling: of requests that ask for more than plain draws; None: there are none.
        joined_texts: [T, 3] int64, what speculation asks for of the rows that join; None: nothing.
    """

    shape: StepShape
    joined_ints: np.ndarray
    joined_floats: np.ndarray
    new_blocks: np.ndarray
    decode_rows: np.ndarray
    decode_token_ids: np.ndarray | None
    prompts: np.ndarray
    token_ids: np.ndarray
    is_last_partial: bool
    sampling: SamplingInput | None
    joined_texts: np.ndarray | None


def build_step_input(
    batch: Batch, vocab_size: int, tells_texts: bool = False, tells_last_tokens: bool = False
) -> StepInput:
    """What the ranks are told of a batch that has sequences.

    `tells_texts`: all tokens of those that join, too; `tells_last_tokens`: the last one of those that decode, which
    has been seen then.
    """
    starts = batch.starts[len(batch.seqs) - batch.num_joined :]
    joined_ints = [
        (seq.row, seq.token_ids[-1], start, *row_ints(seq)) for seq, start in zip(batch.joined, starts, strict=True)
    ]
    joined_floats = [row_floats(seq) for seq in batch.joined]
    decode_rows, prompts, token_ids = [], [], []
    for index, (seq, row) in enumerate(zip(batch.seqs, batch.rows, strict=True)):
        if batch.is_decode(index):  # its newest token, which the device has
            decode_rows.append(row)
        else:
            start, num_tokens = batch.starts[index], batch.num_tokens[index]
            prompts.append((row, start, num_tokens))
            token_ids += seq.token_ids[start : start + num_tokens]
    decode_token_ids = None
    if tells_last_tokens:
        decodes = [seq for index, seq in enumerate(batch.seqs) if batch.is_decode(index)]
        decode_token_ids = np.array([seq.token_ids[-1] for seq in decodes], dtype=np.int64)
    is_filtered = any(seq.is_filtered for seq in batch.seqs)
    shape = StepShape(len(decode_rows), len(prompts), len(token_ids), is_filtered, num_drafts=batch.num_drafts)
    shape, sampling = add_sampling(shape, batch, vocab_size)
    return StepInput(
        shape=shape,
        joined_ints=np.array(joined_ints, dtype=np.int64).reshape(-1, 7),
        joined_floats=np.array(joined_floats, dtype=np.float32).reshape(-1, 6),
        new_blocks=np.array(batch.new_blocks, dtype=np.int64).reshape(-1, 3),
        decode_rows=np.array(decode_rows, dtype=np.int64),
        decode_token_ids=decode_token_ids,
        prompts=np.array(prompts, dtype=np.int64).reshape(-1, 3),
        token_ids=np.array(token_ids, dtype=np.int64),
        is_last_partial=batch.is_last_partial,
        sampling=sampling,
        joined_texts=list_texts(batch.joined) if tells_texts else None,
    )
