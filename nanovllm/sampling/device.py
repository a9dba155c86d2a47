"""Draws from adjusted logits, and logprobs, on the device: the sampler of steps with more than plain requests.

The tables take memory for each row and token of the vocabulary, so each is allocated when the first request needs it.
CUDA graphs hold their addresses: a graph reads the tables that its `adjusting` names. Knows nothing of requests.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanovllm.engine.device_rows import DeviceRows
from nanovllm.engine.step_input import StepShape
from nanovllm.kernels import sampling_torch
from nanovllm.kernels.adjust_logits import USES_BIAS, USES_MASK, LogitTables, adjust_logits, count_tokens
from nanovllm.kernels.sampling import unpack_token_ids
from nanovllm.layers.layernorm import Normalised
from nanovllm.layers.sampler import Sampler
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.sampling.adjustments import TableChanges
from nanovllm.sampling.logprobs import pack_logprobs
from nanovllm.sampling.step_sampling import SamplingInput
from nanovllm.utils.context import StepTensors

if TYPE_CHECKING:
    from nanovllm.engine.model_runner import ModelRunner

PROMPT_ROWS = 256  # of a prompt whose logits are there at once


class AdjustedSampler:
    """Adjusts, draws, counts what was drawn and tells logprobs; all ranks do so alike, on whole distributions."""

    def __init__(self, tp: TensorParallel, sampler: Sampler, rows: DeviceRows, vocab_size: int) -> None:
        """Takes no memory yet."""
        self.tp = tp
        self.sampler = sampler
        self.rows = rows
        self.vocab_size = vocab_size
        self.tokens: Tensor | None = None
        self.bias: Tensor | None = None
        self.mask: Tensor | None = None
        # By the number of the most likely tokens: the rows' on the device, and copies of the last steps' on the host.
        self.logprobs: dict[int, Tensor] = {}
        self.logprob_rings: dict[int, Tensor] = {}

    def prepare(self, shape: StepShape, changes: TableChanges | None) -> None:
        """Allocates what a step of this shape needs, and writes what has changed."""
        num_rows = len(self.rows.last_tokens)
        if shape.adjusting and self.tokens is None:
            self.tokens = self._zeros(num_rows, self.vocab_size)
        if shape.adjusting & USES_BIAS and self.bias is None:
            self.bias = self._zeros(num_rows, self.vocab_size, dtype=torch.float32)
        if shape.adjusting & USES_MASK and self.mask is None:
            self.mask = self._zeros(num_rows, -(-self.vocab_size // 32))
        if shape.num_logprobs and shape.num_logprobs not in self.logprobs:
            size = 2 * shape.num_logprobs + 1
            self.logprobs[shape.num_logprobs] = self._zeros(num_rows, size)
            shape_of_ring = self.rows.ring_size, num_rows, size
            ring = torch.zeros(shape_of_ring, dtype=torch.int32, pin_memory=self.tp.device.type == "cuda")
            self.logprob_rings[shape.num_logprobs] = ring
        if changes is not None:
            self._apply(changes)

    def sample(self, logits: Tensor, step: StepTensors, shape: StepShape) -> Tensor:
        """The draws, packed, int64 [S], of this rank's logits [S, vocab / ranks]."""
        rows = self.rows
        logits = adjusted = self._whole(logits)
        row_ints, row_floats, positions = rows.row_ints, rows.row_floats, step.context.context_lens
        if shape.adjusting:
            tables = LogitTables(
                self.tokens,
                self.bias if shape.adjusting & USES_BIAS else None,
                self.mask if shape.adjusting & USES_MASK else None,
            )
            adjusted = adjust_logits(logits, step.rows, positions, row_ints, row_floats, tables)
        packed = self.sample_whole(adjusted, step.rows, row_ints, row_floats, positions, shape.is_filtered)
        token_ids = unpack_token_ids(packed)
        if shape.adjusting:
            count_tokens(self.tokens, step.sample_rows, token_ids)
        if shape.num_logprobs:
            own_and_best = pack_logprobs(logits, token_ids, shape.num_logprobs - 1)
            self.logprobs[shape.num_logprobs][step.sample_rows] = own_and_best
        return packed

    def sample_whole(
        self, logits: Tensor, rows: Tensor, row_ints: Tensor, row_floats: Tensor, positions: Tensor, is_filtered: bool
    ) -> Tensor:
        """`Sampler.forward` of logits [B, vocab] that every rank has: each draws alike.

        Never compiled: these logits are of a dtype of their own, and would be further cases.
        """
        function = self.sampler.choose(logits)
        function = sampling_torch.sample if function is sampling_torch.compiled_sample else function
        return function(logits, rows, row_ints, row_floats, positions, 0, is_filtered)

    def forward_with_prompt_logprobs(self, runner: "ModelRunner", shape: StepShape, sampling: SamplingInput) -> Tensor:
        """A runner's step that also tells the logprobs of prompts' tokens; returns where they will be."""
        step = runner.lay_out(shape, shape.num_tokens)
        indices, targets = self.rows.to_device(sampling.prompt_targets).unbind(1)
        sampled = step.context.logits_indices
        context = step.context._replace(logits_indices=torch.cat([sampled, shape.num_decodes + indices]))
        hidden_states = runner.model(step.input_ids, step.positions, context)
        runner.sample(runner.model.compute_logits(rows_of(hidden_states, 0, len(sampled))), step, shape)
        hidden_states = rows_of(hidden_states, len(sampled), len(sampled) + len(targets))
        return self.prompt_logprobs(runner.model, hidden_states, targets, sampling.num_prompt_logprobs)

    def prompt_logprobs(
        self, model: Qwen3ForCausalLM, hidden_states: Normalised | Tensor, targets: Tensor, num_logprobs: int
    ) -> Tensor:
        """The packed logprobs of targets, int64 [L], by the hidden states before them; in the host's memory.

        A few rows at a time, as logits of a whole prompt may not fit into memory. Does not wait for a GPU.
        """
        parts = []
        for start in range(0, len(targets), PROMPT_ROWS):
            end = min(start + PROMPT_ROWS, len(targets))
            logits = self._whole(model.compute_logits(rows_of(hidden_states, start, end)))
            parts.append(pack_logprobs(logits, targets[start:end], num_logprobs - 1))
        packed = torch.cat(parts)
        if packed.is_cuda:
            return torch.empty_like(packed, device="cpu", pin_memory=True).copy_(packed, non_blocking=True)
        return packed

    def fetch_logprobs(self, num_logprobs: int, step_count: int) -> Tensor:
        """The host's memory where the logprobs of the step just launched will be, by row; does not wait."""
        entry = self.logprob_rings[num_logprobs][step_count % self.rows.ring_size]
        return entry.copy_(self.logprobs[num_logprobs], non_blocking=True)

    def _whole(self, logits: Tensor) -> Tensor:
        """All logits, [N, vocab], of this rank's; the last rank's may go beyond the vocabulary."""
        return self.tp.all_gather(logits)[:, : self.vocab_size].contiguous()

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.tp.device)

    def _apply(self, changes: TableChanges) -> None:
        to_device = self.rows.to_device
        if len(changes.rows):
            joined = to_device(changes.rows)
            for table in (self.tokens, self.bias):
                if table is not None:
                    table[joined] = 0
        if len(changes.entries):
            rows, token_ids, values = to_device(changes.entries).unbind(1)
            self.tokens.view(-1).index_add_(0, rows * self.vocab_size + token_ids, values.int())
        if len(changes.bias_entries):
            rows, token_ids = to_device(changes.bias_entries).unbind(1)
            self.bias[rows, token_ids] = to_device(changes.bias_values)
        if len(changes.mask_rows):
            self.mask[to_device(changes.mask_rows)] = to_device(changes.masks)


def rows_of(x: Normalised | Tensor, start: int, end: int) -> Normalised | Tensor:
    """The rows from start to end of normalised rows, computed or not."""
    if isinstance(x, Normalised):
        return x._replace(x=x.x[start:end])
    return x[start:end]
