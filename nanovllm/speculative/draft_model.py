"""Drafts by another, smaller model (speculative decoding, Leviathan et al., arXiv 2211.17192).

It has layers' caches of its own in the blocks of the engine's model, so that block tables, slots and cached prefixes
are the same for both. Behind each step it computes what the step has computed, and then, one after the other, drafts.
They are drawn as the model will draw, with the row's parameters and noise: an equal distribution is an equal token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanovllm.engine.kv_cache import bind_kv_cache
from nanovllm.kernels.decode_rows import advance_rows
from nanovllm.kernels.sampling import unpack_token_ids
from nanovllm.models import model_class
from nanovllm.utils.context import Context, StepTensors
from nanovllm.weights.load import load_weights

if TYPE_CHECKING:
    from nanovllm.config import Config
    from nanovllm.engine.device_rows import DeviceRows
    from nanovllm.layers.sampler import Sampler
    from nanovllm.parallel.tensor_parallel import TensorParallel


class DraftModel:
    """A model that drafts for the device's rows, on one rank."""

    def __init__(self, config: Config, rows: DeviceRows, tp: TensorParallel, sampler: Sampler) -> None:
        """Loads the model of `config.draft_config`; `rows` are drafted for, and `sampler` draws."""
        self.config = config
        self.rows = rows
        self.tp = tp
        self.sampler = sampler
        draft_config = config.draft_config
        self.model = model_class(draft_config.model_config.architecture)(draft_config, tp)
        load_weights(self.model, draft_config, tp)
        self.counts = torch.arange(len(rows.last_tokens) + 1, dtype=torch.int32, device=rows.device)

    def bind_kv_cache(self, num_blocks: int) -> int:
        """Allocates its part of the KV cache, of as many blocks as the engine's has. Returns the bytes."""
        return bind_kv_cache(self.model, self.config.draft_config, self.tp, num_blocks)

    def draft(self, step: StepTensors, num_drafts: int) -> Tensor:
        """Behind a step whose tokens are stored: drafts of its rows, int64 [B, num_drafts].

        Of a row that nears max_model_len, drafts beyond are arbitrary.
        """
        self.model(step.input_ids, step.positions, step.context)  # stores the KV of all that the step has computed
        rows = step.sample_rows
        drafts = rows.new_empty(len(rows), num_drafts)
        tokens, context_lens = self.rows.last_tokens.clone(), self.rows.context_lens.clone()
        for index in range(num_drafts):
            drafts[:, index] = self._next_tokens(rows, tokens, context_lens)
            tokens[rows] = drafts[:, index]
        return drafts

    def _next_tokens(self, rows: Tensor, tokens: Tensor, context_lens: Tensor) -> Tensor:
        """What it draws behind the rows' tokens, int64 [B]; the context lengths grow by these."""
        state, num_rows = self.rows, len(rows)
        context_lens.clamp_(max=self.config.max_model_len - 1)
        block_size = self.config.kvcache_block_size
        inputs = advance_rows(rows, tokens, context_lens, state.block_tables, block_size)
        context = Context(
            slot_mapping=inputs.slots,
            context_lens=inputs.context_lens,
            block_tables=inputs.block_tables,
            num_decodes=num_rows,
            cu_seqlens_q=self.counts[: num_rows + 1],
            cu_seqlens_k=inputs.context_lens,
            max_seqlen_q=1,
            logits_indices=None,
            decode_groups={},
        )
        logits = self.model.compute_logits(self.model(inputs.tokens, inputs.positions, context))
        positions = inputs.context_lens
        packed = self.sampler(logits, rows, state.row_ints, state.row_floats, positions, is_filtered=False)
        return unpack_token_ids(packed).clamp(min=0)
