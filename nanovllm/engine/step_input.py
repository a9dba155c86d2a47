"""What the ranks are told of a step: only what the device cannot know, so that it does not grow with the context."""

from dataclasses import dataclass

import numpy as np

from nanovllm.engine.scheduler import Batch

COLDEST = 1e-5  # colder draws are greedy, and logits / temperature might overflow


@dataclass(slots=True)
class StepInput:
    """Changes to the device's rows, then what to compute: D decodes of one token and parts of P prompts.

    Attributes:
        joined_ints: [J, 5] int64, rows that join: row, last token, context length, top_k, seed.
        joined_floats: [J, 3] float32, their temperature, top_p, min_p.
        new_blocks: [B, 3] int64, entries of the block tables: row, index, block.
        decode_rows: [D] int64; None: as in the step before.
        prompt_rows, starts, num_tokens: [P] int64, row, first position and number of tokens of each part.
        token_ids: [sum(num_tokens)] int64, those tokens.
        is_last_partial: whether the last part does not reach its prompt's end, so that it samples nothing.
        is_filtered: whether a row asks for top-k, top-p or min-p.
    """

    joined_ints: np.ndarray
    joined_floats: np.ndarray
    new_blocks: np.ndarray
    decode_rows: np.ndarray | None
    prompt_rows: np.ndarray
    starts: np.ndarray
    num_tokens: np.ndarray
    token_ids: np.ndarray
    is_last_partial: bool
    is_filtered: bool


class StepInputBuilder:
    """Turns batches into step inputs, remembering the rows that decode so as not to send them again."""

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
            temperature = params.temperature if params.temperature >= COLDEST else 0.0
            floats.append((temperature, params.top_p, params.min_p))
        prompts: list[int] = []
        rows = batch.rows
        if batch.num_samples < len(rows) or batch.num_tokens.count(1) < len(rows):
            is_prompt = [n > 1 or i >= batch.num_samples for i, n in enumerate(batch.num_tokens)]
            prompts = [i for i, part in enumerate(is_prompt) if part]
            rows = [row for row, part in zip(rows, is_prompt, strict=True) if not part]
        is_changed = batch.num_joined > 0 or rows != self.decode_rows
        if is_changed or prompts:
            self.is_filtered = any(seq.sampling_params.is_filtered for seq in batch.seqs)
        self.decode_rows = rows
        token_ids: list[int] = []
        for i in prompts:
            start = batch.starts[i]
            token_ids += batch.seqs[i].token_ids[start : start + batch.num_tokens[i]]
        return StepInput(
            joined_ints=np.array(ints, dtype=np.int64).reshape(-1, 5),
            joined_floats=np.array(floats, dtype=np.float32).reshape(-1, 3),
            new_blocks=np.array(batch.new_blocks, dtype=np.int64).reshape(-1, 3),
            decode_rows=np.array(rows, dtype=np.int64) if is_changed else None,
            prompt_rows=np.array([batch.rows[i] for i in prompts], dtype=np.int64),
            starts=np.array([batch.starts[i] for i in prompts], dtype=np.int64),
            num_tokens=np.array([batch.num_tokens[i] for i in prompts], dtype=np.int64),
            token_ids=np.array(token_ids, dtype=np.int64),
            is_last_partial=batch.num_samples < len(batch.seqs),
            is_filtered=self.is_filtered,
        )


def _as_int64(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63
