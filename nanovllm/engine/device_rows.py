"""The decode batch that lives on the device, one row for each running sequence, and the host's changes to it.

A row is a sequence's last token, context length, block table and sampling parameters. A step of decodes reads and
advances the rows and needs nothing else from the host, so that it can be launched before the tokens of the step before
it are seen. The host sends only what a device cannot know: rows that join, new blocks, which rows decode, and prompts.

All tensors are allocated once, as CUDA graphs hold their addresses. Nothing here knows of models, of graphs, or why a
sequence has a row.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import Config
from nanovllm.engine.step_input import StepInput, StepShape

# The last steps, at least, whose memory of the host is left alone: two are in flight, or one for each stage, and
# before them may be as many that were surplus, for whose end nobody has waited.
RING_SIZE = 4


class PromptParts(NamedTuple):
    """The parts of P prompts that a step computes, of T tokens in all with padding; int64 each.

    Attributes:
        token_ids: [T].
        positions: [T].
        token_rows: [T], the row of each token's sequence; of padding, the padding row.
        rows: [P], the sequences' rows.
        context_lens: [P], the context lengths that the parts reach.
        sample_rows: [P], the rows that get the sampled tokens; the padding row where a prompt's end is not reached.
        cu_seqlens: [P + 1], where each part begins among the tokens, and where padding begins.
    """

    token_ids: Tensor | np.ndarray
    positions: Tensor | np.ndarray
    token_rows: Tensor | np.ndarray
    rows: Tensor | np.ndarray
    context_lens: Tensor | np.ndarray
    sample_rows: Tensor | np.ndarray
    cu_seqlens: Tensor | np.ndarray

    @staticmethod
    def lengths(num_prompts: int, num_tokens: int) -> tuple[int, ...]:
        """The fields' lengths, in their order."""
        per_token, per_prompt = (num_tokens,) * 3, (num_prompts,) * 3
        return (*per_token, *per_prompt, num_prompts + 1)


class DeviceRows:
    """R rows, one more than sequences may run: steps are padded with the last one, whose context stays empty.

    Attributes:
        last_tokens: int64 [R].
        context_lens: int32 [R], tokens whose KV is stored.
        block_tables: int32 [R, max_blocks].
        row_ints: int64 [4, R], top_k, seed, and of adjustments the least length and the flags.
        row_floats: float32 [6, R], temperature, top_p, min_p, penalties of presence, frequency and repetition.
        decode_rows: int64 [max_num_seqs], the rows that decode in this step, then padding rows.
        token_ring: int64 [ring_size, R] in host memory, where steps write their tokens in turn, by row; or with
            speculation what they report of each row.
        step_count, device_step_count: the steps launched, and those run, int64 [1] on the device.
    """

    def __init__(self, config: Config, device: torch.device, max_prompt_tokens: int) -> None:
        """`max_prompt_tokens` is the most that a step computes of prompts, with padding."""

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.device = device
        self.padding_row = config.max_num_seqs
        self.ring_size = max(RING_SIZE, 2 * config.pipeline_parallel_size)
        num_rows = config.max_num_seqs + 1
        self.last_tokens = zeros(num_rows, dtype=torch.int64)
        self.token_ring = self.make_ring(num_rows)
        self.step_count = 0
        self.device_step_count = zeros(1, dtype=torch.int64)
        self.context_lens = zeros(num_rows, dtype=torch.int32)
        self.block_tables = zeros(num_rows, config.max_blocks_per_seq, dtype=torch.int32)
        self.row_ints = zeros(4, num_rows, dtype=torch.int64)
        self.row_floats = zeros(6, num_rows, dtype=torch.float32)
        self.decode_rows = zeros(config.max_num_seqs, dtype=torch.int64)
        self.uploaded_decode_rows: np.ndarray | None = None  # what the host last wrote there
        self.prompts = zeros(sum(PromptParts.lengths(num_rows, max_prompt_tokens)), dtype=torch.int64)
        self.prompt_ring = self.make_ring(len(self.prompts))  # copied from, so that no step waits for a copy's end

    def make_ring(self, *shape: int) -> Tensor:
        """Memory of the host, int64 [ring_size, *shape], that the device can read and write."""
        return torch.zeros(self.ring_size, *shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")

    def apply_changes(self, step: StepInput) -> None:
        """Writes what the host has changed since the step before, and which rows decode."""
        if len(step.joined_ints):
            joined_ints, joined_floats = self.to_device(step.joined_ints), self.to_device(step.joined_floats)
            rows, last_tokens, context_lens = joined_ints[:, :3].unbind(1)
            self.last_tokens[rows] = last_tokens
            self.context_lens[rows] = context_lens.int()
            self.row_ints[:, rows] = joined_ints[:, 3:].T
            self.row_floats[:, rows] = joined_floats.T
        if len(step.new_blocks):
            rows, indices, blocks = self.to_device(step.new_blocks).unbind(1)
            self.block_tables[rows, indices] = blocks.int()
        decode_rows = np.full(len(self.decode_rows), self.padding_row)
        decode_rows[: len(step.decode_rows)] = step.decode_rows
        if not np.array_equal(decode_rows, self.uploaded_decode_rows):
            self.uploaded_decode_rows = decode_rows
            self.decode_rows.copy_(self.to_device(decode_rows))
        if step.decode_token_ids is not None:
            self.last_tokens[self.to_device(step.decode_rows)] = self.to_device(step.decode_token_ids)

    def set_prompts(self, prompts: np.ndarray, token_ids: np.ndarray, is_last_partial: bool, shape: StepShape) -> None:
        """Writes the parts of prompts that the step computes, as a StepInput has them, in one copy.

        The shape's numbers, not smaller than those that there are, are what `prompt_parts` will be asked for. Prompts
        are padded with parts of no tokens.
        """
        num_prompts = len(prompts)
        no_part = np.array([[self.padding_row, 0, 0]])
        prompts = np.concatenate([prompts, no_part.repeat(shape.num_prompts - num_prompts, axis=0)])
        rows, starts, num_tokens = prompts.T
        begins = num_tokens.cumsum() - num_tokens  # of the parts, among the step's tokens
        num_real = len(token_ids)
        padded_token_ids, positions, token_rows = np.zeros((3, shape.num_tokens), dtype=np.int64)
        padded_token_ids[:num_real] = token_ids
        positions[:num_real] = np.arange(num_real) + np.repeat(starts - begins, num_tokens)
        token_rows[:num_real] = np.repeat(rows, num_tokens)
        token_rows[num_real:] = self.padding_row
        sample_rows = rows.copy()
        if is_last_partial:
            sample_rows[num_prompts - 1] = self.padding_row
        parts = PromptParts(
            token_ids=padded_token_ids,
            positions=positions,
            token_rows=token_rows,
            rows=rows,
            context_lens=starts + num_tokens,
            sample_rows=sample_rows,
            cu_seqlens=np.append(begins, num_real),
        )
        size = sum(map(len, parts))
        entry = self.prompt_ring[self.step_count % self.ring_size, :size]
        np.concatenate(parts, out=entry.numpy())
        self.prompts[:size].copy_(entry, non_blocking=True)

    def prompt_parts(self, num_prompts: int, num_tokens: int) -> PromptParts:
        """What `set_prompts` wrote, for a step of so many prompts and tokens with padding: views of one buffer."""
        lengths = PromptParts.lengths(num_prompts, num_tokens)
        return PromptParts(*self.prompts[: sum(lengths)].split(lengths))

    def count_step(self) -> Tensor:
        """Counts a step that was launched; returns the host's memory where its tokens will be, by row."""
        entry = self.token_ring[self.step_count % self.ring_size]
        self.step_count += 1
        return entry

    def to_device(self, values: np.ndarray) -> Tensor:
        """The host's numbers on the device, without waiting for it."""
        tensor = torch.from_numpy(values)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)
