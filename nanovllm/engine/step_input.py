"""What the ranks are told of a step: only what the device cannot know, so that it does not grow with the context.

Nothing here knows how a step is chosen, or how the device keeps what it is told.
"""

from typing import NamedTuple

import numpy as np

from nanovllm.engine.scheduler import Batch

COLDEST = 1e-5  # colder draws are greedy, and logits / temperature might overflow


class StepInput(NamedTuple):
    """Changes to the device's rows, then what to compute: D decodes of one token and parts of P prompts.

    Attributes:
        joined_ints: [J, 5] int64, rows that join: row, last token, context length, top_k, seed.
        joined_floats: [J, 3] float32, their temperature, top_p, min_p.
        new_blocks: [B, 3] int64, entries of the block tables: row, index, block.
        decode_rows: [D] int64.
        prompts: [P, 3] int64, row, first position and number of tokens of each part.
        token_ids: [sum of the numbers] int64, those tokens.
        is_last_partial: whether the last part does not reach its prompt's end, so that it samples nothing.
        is_filtered: whether a row asks for top-k, top-p or min-p.
    """

    joined_ints: np.ndarray
    joined_floats: np.ndarray
    new_blocks: np.ndarray
    decode_rows: np.ndarray
    prompts: np.ndarray
    token_ids: np.ndarray
    is_last_partial: bool
    is_filtered: bool


def build_step_input(batch: Batch) -> StepInput:
    """What the ranks are told of a batch that has sequences."""
    joined_ints, joined_floats = [], []
    first_joined = len(batch.seqs) - batch.num_joined
    for seq, start in zip(batch.seqs[first_joined:], batch.starts[first_joined:], strict=True):
        params = seq.sampling_params
        temperature = params.temperature if params.temperature >= COLDEST else 0.0
        joined_ints.append((seq.row, seq.token_ids[-1], start, params.top_k, _as_int64(seq.seed)))
        joined_floats.append((temperature, params.top_p, params.min_p))
    decode_rows, prompts, token_ids = [], [], []
    parts = zip(batch.seqs, batch.rows, batch.starts, batch.num_tokens, strict=True)
    for index, (seq, row, start, num_tokens) in enumerate(parts):
        is_sampled = index < batch.num_samples
        if num_tokens == 1 and is_sampled:  # its newest token, which the device has
            decode_rows.append(row)
        else:
            prompts.append((row, start, num_tokens))
            token_ids += seq.token_ids[start : start + num_tokens]
    return StepInput(
        joined_ints=np.array(joined_ints, dtype=np.int64).reshape(-1, 5),
        joined_floats=np.array(joined_floats, dtype=np.float32).reshape(-1, 3),
        new_blocks=np.array(batch.new_blocks, dtype=np.int64).reshape(-1, 3),
        decode_rows=np.array(decode_rows, dtype=np.int64),
        prompts=np.array(prompts, dtype=np.int64).reshape(-1, 3),
        token_ids=np.array(token_ids, dtype=np.int64),
        is_last_partial=batch.is_last_partial,
        is_filtered=any(seq.sampling_params.is_filtered for seq in batch.seqs),
    )


def _as_int64(seed: int) -> int:
    """The signed number with the bits of an unsigned one, modulo 2**64."""
    return (seed + 2**63) % 2**64 - 2**63
