"""What the ranks are told of a step: only what the device cannot know, so that it does not grow with the context."""

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


def step_input(batch: Batch) -> StepInput:
    """What the ranks are told of a batch that has sequences."""
    ints, floats, decode_rows, prompts, token_ids = [], [], [], [], []
    for i in range(len(batch.seqs) - batch.num_joined, len(batch.seqs)):
        seq, params = batch.seqs[i], batch.seqs[i].sampling_params
        signed_seed = (seq.seed + 2**63) % 2**64 - 2**63
        ints.append((seq.row, seq.token_ids[-1], batch.starts[i], params.top_k, signed_seed))
        floats.append((params.temperature if params.temperature >= COLDEST else 0.0, params.top_p, params.min_p))
    for i, (row, start, num_tokens) in enumerate(zip(batch.rows, batch.starts, batch.num_tokens, strict=True)):
        if num_tokens == 1 and i < batch.num_samples:
            decode_rows.append(row)
        else:
            prompts.append((row, start, num_tokens))
            token_ids += batch.seqs[i].token_ids[start : start + num_tokens]
    return StepInput(np.array(ints, dtype=np.int64).reshape(-1, 5), np.array(floats, dtype=np.float32).reshape(-1, 3),
        np.array(batch.new_blocks, dtype=np.int64).reshape(-1, 3), np.array(decode_rows, dtype=np.int64),
        np.array(prompts, dtype=np.int64).reshape(-1, 3), np.array(token_ids, dtype=np.int64),
        is_last_partial=batch.num_samples < len(batch.seqs),
        is_filtered=any(seq.sampling_params.is_filtered for seq in batch.seqs))  # fmt: skip
