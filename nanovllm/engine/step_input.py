"""What the ranks are told of a step: only what the device cannot know, so that it does not grow with the context."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanovllm.engine.scheduler import Batch


@dataclass(slots=True)
class StepInput:
    """Changes to the device's rows, then what to compute.

    Attributes:
        joined_ints: [J, 5] int64, rows that join: row, last token, context length, top_k, seed.
        joined_floats: [J, 3] float32, their temperature, top_p, min_p.
        new_blocks: [B, 3] int64, entries of the block tables: row, index, block.
        rows: [S] int64, the rows that compute, decodes first and the longest of them first; None: those of the last
            step of decodes.
        starts, num_tokens: [P] int64, of the last P rows, which compute parts of prompts: the first position and the
            number of tokens. P is 0 in a step of decodes.
        token_ids: [sum(num_tokens)] int64, those tokens.
        num_samples: rows that sample a token, the first ones.
        is_filtered: whether a row asks for top-k, top-p or min-p.
    """

    joined_ints: np.ndarray
    joined_floats: np.ndarray
    new_blocks: np.ndarray
    rows: np.ndarray | None
    starts: np.ndarray
    num_tokens: np.ndarray
    token_ids: np.ndarray
    num_samples: int
    is_filtered: bool


class StepInputBuilder:
    """Turns batches into step inputs, remembering the last step of decodes so as not to send its rows again."""

    def __init__(self) -> None:
        self.decode_rows: list[int] = []
        self.is_filtered = False

    def build(self, batch: Batch) -> StepInput:
        """The step input of a batch that has sequences."""
        first_joined = len(batch.seqs) - batch.num_joined
        ints, floats = [], []
        for seq, start in zip(batch.seqs[first_joined:], batch.starts[first_joined:], strict=True):
            params = seq.sampling_params
            ints.append((seq.row, seq.token_ids[-1], start, params.top_k, _as_int64(seq.seed)))
            floats.append((params.temperature, params.top_p, params.min_p))
        is_decode = [n == 1 and i < batch.num_samples for i, n in enumerate(batch.num_tokens)]
        rows: np.ndarray | None = None
        prefills = [i for i, decode in enumerate(is_decode) if not decode]
        if prefills or batch.num_joined or batch.rows != self.decode_rows:
            decodes = [i for i, decode in enumerate(is_decode) if decode]
            decodes.sort(key=batch.starts.__getitem__, reverse=True)
            rows = np.array([batch.rows[i] for i in decodes + prefills], dtype=np.int64)
            self.decode_rows = [] if prefills else batch.rows
            self.is_filtered = any(seq.sampling_params.is_filtered for seq in batch.seqs)
        token_ids: list[int] = []
        for i in prefills:
            start = batch.starts[i]
            token_ids += batch.seqs[i].token_ids[start : start + batch.num_tokens[i]]
        return StepInput(
            joined_ints=np.array(ints, dtype=np.int64).reshape(-1, 5),
            joined_floats=np.array(floats, dtype=np.float32).reshape(-1, 3),
            new_blocks=np.array(batch.new_blocks, dtype=np.int64).reshape(-1, 3),
            rows=rows,
            starts=np.array([batch.starts[i] for i in prefills], dtype=np.int64),
            num_tokens=np.array([batch.num_tokens[i] for i in prefills], dtype=np.int64),
            token_ids=np.array(token_ids, dtype=np.int64),
            num_samples=batch.num_samples,
            is_filtered=self.is_filtered,
        )


def _as_int64(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63
