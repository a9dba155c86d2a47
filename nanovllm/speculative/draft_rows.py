"""What the device has of speculation, beside its rows: their texts and drafts, checked and proposed without the host.

All tensors are allocated once, as CUDA graphs hold their addresses. Nothing here knows of models, or why drafts are
checked in one step and not in another.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanovllm.config import Config
from nanovllm.engine.device_rows import DeviceRows
from nanovllm.engine.step_input import StepInput
from nanovllm.kernels.ngrams import propose_ngrams
from nanovllm.kernels.verify_rows import REPORT_HEAD, lay_out_drafts, store_verified
from nanovllm.layers.sampler import Sampler
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.speculative.draft_model import DraftModel
from nanovllm.utils.context import Context, StepTensors


class DraftRows:
    """The texts and drafts of R rows, of which K drafts each may be proposed.

    The rows' `token_ring` becomes int64 [ring_size, R, W], where steps write what kernels/verify_rows.py reports.

    Attributes:
        history: int32 [R, max_model_len], the tokens by position, the last one included.
        drafts: int32 [R, K], tokens that may follow.
        num_drafts: int32 [R], how many of them are proposed.
        draft_model: what proposes them; None: a look-up in the texts.
        propose: fills `drafts` and `num_drafts` of a step's rows, whose tokens are stored.
    """

    def __init__(self, config: Config, rows: DeviceRows, tp: TensorParallel, sampler: Sampler) -> None:
        """`config` asks for speculation; `rows` are the ones that are drafted for."""
        self.config = config
        self.rows = rows
        num_rows, num_drafts = len(rows.last_tokens), config.speculation.num_speculative_tokens
        rows.token_ring = rows.make_ring(num_rows, REPORT_HEAD + 1 + num_drafts)
        self.history = self._zeros(num_rows, config.max_model_len)
        self.drafts = self._zeros(num_rows, num_drafts)
        self.num_drafts = self._zeros(num_rows)
        self.draft_model = DraftModel(config, rows, tp, sampler) if config.draft_config is not None else None
        self.propose: Callable[[StepTensors], None] = self._look_up if self.draft_model is None else self._draft

    def apply_changes(self, step: StepInput) -> None:
        """Writes the texts of the rows that join, for which nothing is proposed yet."""
        if len(step.joined_texts):
            rows, positions, token_ids = self.rows.to_device(step.joined_texts).unbind(1)
            self.history[rows, positions] = token_ids.int()
            self.num_drafts[rows] = 0

    def lay_out(self, rows: Tensor, num_drafts: int, counts: Tensor, max_seqlen_q: int) -> StepTensors:
        """A step that computes the last token and so many drafts of each of the rows, int64 [B].

        Each of a row's tokens is a decode of its own. `counts` are the numbers from 0 on, int32, as many as decodes
        may need.
        """
        state, config = self.rows, self.config
        input_ids, positions, slots, context_lens, block_tables = lay_out_drafts(
            rows,
            state.last_tokens,
            self.drafts,
            state.context_lens,
            state.block_tables,
            config.kvcache_block_size,
            num_drafts,
            config.max_model_len,
        )
        queries_per_row = 1 + num_drafts
        num_decodes = len(rows) * queries_per_row
        context = Context(
            slot_mapping=slots,
            context_lens=context_lens,
            block_tables=block_tables,
            num_decodes=num_decodes,
            cu_seqlens_q=counts[: num_decodes + 1],
            cu_seqlens_k=context_lens,  # not their running sum: nothing reads it where all decode
            max_seqlen_q=max_seqlen_q,
            logits_indices=None,
            decode_groups={},
            queries_per_row=queries_per_row,
        )
        of_each_token = rows[:, None].expand(-1, queries_per_row).flatten()
        return StepTensors(input_ids, positions, context, of_each_token, rows)

    def bind_kv_cache(self, num_blocks: int) -> int:
        """Allocates what the draft model, if there is one, has of the KV cache. Returns the bytes."""
        return self.draft_model.bind_kv_cache(num_blocks) if self.draft_model is not None else 0

    def store(self, packed: Tensor, step: StepTensors) -> None:
        """Stores what a step has drawn, packed, for each of its rows, and proposes what may follow.

        int64 [B * (1 + D)], where D drafts of each of B rows were computed.
        """
        state, rows = self.rows, step.sample_rows
        store_verified(
            packed,
            rows,
            self.drafts,
            self.num_drafts,
            self.history,
            state.last_tokens,
            state.context_lens,
            state.token_ring,
            state.device_step_count,
            self.config.max_model_len,
        )
        self.propose(step)

    def _draft(self, step: StepTensors) -> None:
        rows, num_drafts = step.sample_rows, self.config.speculation.num_drafts_of(len(step.sample_rows))
        self.drafts[rows, :num_drafts] = self.draft_model.draft(step, num_drafts).int()
        num_left = self.config.max_model_len - 2 - self.rows.context_lens[rows]  # none may be a text's last token
        self.num_drafts[rows] = num_left.clamp(0, num_drafts)

    def _look_up(self, step: StepTensors) -> None:
        state, speculation = self.rows, self.config.speculation
        propose_ngrams(
            step.sample_rows,
            self.history,
            state.context_lens,
            self.drafts,
            self.num_drafts,
            state.token_ring,
            state.device_step_count,
            speculation.prompt_lookup_min,
            speculation.prompt_lookup_max,
            self.config.max_model_len,
        )

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.rows.device)
