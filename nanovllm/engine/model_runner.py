"""One step of one rank: the host's changes to the device's rows, the model, the sampler, the tokens on their way back.

The runner owns the model and what it works on. It is told of a step what the device cannot know (`StepInput`) and
launches it; it waits for nothing, and knows neither requests nor why a step is what it is.
"""

import gc
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.config import Config
from nanovllm.engine.device_rows import DeviceRows
from nanovllm.engine.kv_cache import bind_kv_cache
from nanovllm.engine.step_input import StepInput, StepShape
from nanovllm.graphs.cuda_graphs import GRAPH_TOKENS, CudaGraphs
from nanovllm.kernels.cublas import limit_cublas_workspace
from nanovllm.kernels.decode_rows import advance_rows, store_tokens
from nanovllm.layers.sampler import Sampler
from nanovllm.memory.num_blocks import find_num_blocks
from nanovllm.memory.warm_up import warm_up
from nanovllm.models import model_class
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.pipeline.cut import cut
from nanovllm.quantization import describe_weights
from nanovllm.sampling.device import AdjustedSampler
from nanovllm.speculative.draft_rows import DraftRows
from nanovllm.utils.context import Context, StepTensors
from nanovllm.weights.load import load_weights


class StepOutput(NamedTuple):
    """Where what a launched step gives will be, in the host's memory; and the event that says when.

    Attributes:
        tokens: int64 [rows], -1 for none; with speculation reports, int64 [rows, ...], see kernels/verify_rows.py.
        logprobs: of the tokens, int32 [rows, ...], packed; None if nobody asked for any.
        prompt_logprobs: of the tokens of prompts, in the order of the step's targets, packed; or None.
        event: None if all is there.
    """

    tokens: Tensor
    logprobs: Tensor | None
    prompt_logprobs: Tensor | None
    event: torch.cuda.Event | None


class ModelRunner:
    """Executes step inputs on one rank."""

    def __init__(self, config: Config, tp: TensorParallel) -> None:
        """Loads the model; the KV cache is yet to be allocated."""
        self.config = config
        self.tp = tp
        self.device = tp.device
        limit_cublas_workspace(self.device)
        self.model = model_class(config.model_config.architecture)(config, tp)
        max_prompt_tokens = max(config.max_num_batched_tokens, GRAPH_TOKENS[-1])
        if config.pipeline_parallel_size > 1:
            cut(self.model, config, tp.stage, config.max_num_seqs + max_prompt_tokens)
        load_weights(self.model, config, tp)
        self.sampler = Sampler(tp, config.sampler_backend)
        self.graphs = CudaGraphs(config, tp.stream)
        self.rows = DeviceRows(config, self.device, max_prompt_tokens)
        drafts = config.speculation is not None
        self.draft_rows = DraftRows(config, self.rows, tp, self.sampler) if drafts else None
        self.adjusted_sampler = AdjustedSampler(tp, self.sampler, self.rows, config.model_config.vocab_size)
        self.counts = torch.arange(config.max_num_decodes + 2, dtype=torch.int32, device=self.device)

    # ---- start-up -------------------------------------------------------------------------------------------------

    def describe_weights(self) -> str:
        """How the weights are stored, in words; "" if they are plain."""
        return describe_weights(self.model, self.config)

    @torch.inference_mode()
    def warmup_model(self) -> int:
        """Runs the largest steps; returns the bytes of GPU memory that steps take. Any KV cache will do."""
        return warm_up(self.config, self.rows, self.graphs, self._forward)

    def allocate_kv_cache(self) -> int:
        """Allocates the KV cache and returns its number of blocks, the same on every rank.

        Raises:
            ValueError: a request of max_model_len tokens does not fit.
        """
        num_blocks = find_num_blocks(self.config, self.tp, self._bind_kv_cache(1), self.warmup_model)
        self._bind_kv_cache(num_blocks)
        return num_blocks

    def _bind_kv_cache(self, num_blocks: int) -> int:
        """Allocates a cache in place of the one before; returns the bytes."""
        draft_bytes = self.draft_rows.bind_kv_cache(num_blocks) if self.draft_rows is not None else 0
        return bind_kv_cache(self.model, self.config, self.tp, num_blocks) + draft_bytes

    @torch.inference_mode()
    def capture_cudagraph(self) -> None:
        """Captures the steps of all shapes that have a graph; the KV cache stays where it is from now on."""
        num_weights = sum(parameter.numel() for parameter in self.model.parameters())
        self.graphs.capture(self._forward, self.tp.min(num_weights))

    # ---- steps ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, step: StepInput) -> StepOutput:
        """Launches a step; does not wait for a GPU."""
        shape, sampling, stage = step.shape, step.sampling, self.tp.stage
        self.rows.apply_changes(step)
        if self.draft_rows is not None:
            self.draft_rows.apply_changes(step)
        if not shape.is_plain and stage.is_last:
            self.adjusted_sampler.prepare(shape, sampling.table_changes)
        tells_prompts = sampling is not None and len(sampling.prompt_targets) > 0
        graph_shape = self.graphs.padded_shape(shape) if not tells_prompts else None
        padded = graph_shape or self.graphs.with_known_rows(shape)
        if shape.num_prompts:
            self.rows.set_prompts(step.prompts, step.token_ids, step.is_last_partial, padded)
        stage.receive(padded.num_decodes + padded.num_tokens)
        prompt_logprobs = None
        if tells_prompts and stage.is_last:
            prompt_logprobs = self.adjusted_sampler.forward_with_prompt_logprobs(self, padded, sampling)
        elif graph_shape is None:
            self._forward(padded, max_seqlen_q=int(step.prompts[:, 2].max(initial=0)))
        else:
            self.graphs.replay(graph_shape, self._forward)
        stage.send(padded.num_decodes + padded.num_tokens)
        logprobs = None
        if shape.num_logprobs and stage.is_last:
            logprobs = self.adjusted_sampler.fetch_logprobs(shape.num_logprobs, self.rows.step_count)
        event = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
        return StepOutput(self.rows.count_step(), logprobs, prompt_logprobs, event)

    def _forward(self, shape: StepShape, max_seqlen_q: int | None = None) -> None:
        """Computes and samples a step.

        Reads and writes only what outlives the step, so that it can be captured: parameters, KV cache, rows.
        `max_seqlen_q` bounds the tokens of one prompt's part; None: by those of all.
        """
        step = self.lay_out(shape, shape.num_tokens if max_seqlen_q is None else max_seqlen_q)
        hidden_states = self.model(step.input_ids, step.positions, step.context)
        if self.tp.stage.is_last:
            self.sample(self.model.compute_logits(hidden_states), step, shape)

    def sample(self, logits: Tensor, step: StepTensors, shape: StepShape) -> None:
        """Draws the step's tokens of this rank's logits [S, vocab / ranks], and stores them."""
        rows = self.rows
        if shape.is_plain:
            # A token's draw depends on its position, which is the context length.
            positions = step.context.context_lens
            packed = self.sampler(logits, step.rows, rows.row_ints, rows.row_floats, positions, shape.is_filtered)
        else:
            packed = self.adjusted_sampler.sample(logits, step, shape)
        if self.draft_rows is None:
            store_tokens(packed, step.sample_rows, rows.last_tokens, rows.token_ring, rows.device_step_count)
        else:
            self.draft_rows.store(packed, step)

    def lay_out(self, shape: StepShape, max_seqlen_q: int) -> StepTensors:
        """Lays out a step: one token of each row that decodes, then the prompts' parts, one behind the other.

        A sequence that decodes gives its last token, which the device has, and its context grows by it. A part of a
        prompt gives the tokens that the host sent, and sets the context length to where it ends.
        """
        rows, block_size, num_decodes = self.rows, self.config.kvcache_block_size, shape.num_decodes
        decode_rows = all_rows = sample_rows = rows.decode_rows[:num_decodes]
        if shape.num_drafts:  # there are no prompts then
            return self.draft_rows.lay_out(decode_rows, shape.num_drafts, self.counts, max_seqlen_q)
        inputs = advance_rows(decode_rows, rows.last_tokens, rows.context_lens, rows.block_tables, block_size)
        input_ids, positions, slots, context_lens, block_tables = inputs
        cu_seqlens_q = self.counts[: num_decodes + 1]
        cu_seqlens_k = context_lens  # not their running sum: nothing reads it where all decode
        logits_indices = None
        if shape.num_prompts:
            parts = rows.prompt_parts(shape.num_prompts, shape.num_tokens)
            prompt_lens = parts.context_lens.int()
            rows.context_lens[parts.rows] = prompt_lens
            blocks = rows.block_tables[parts.token_rows, parts.positions // block_size]
            prompt_slots = blocks * block_size + parts.positions % block_size
            prompt_slots = torch.where(parts.token_rows == rows.padding_row, -1, prompt_slots)
            slots = torch.cat([slots, prompt_slots.int()])
            input_ids = torch.cat([input_ids, parts.token_ids])
            positions = torch.cat([positions, parts.positions.int()])
            block_tables = torch.cat([block_tables, rows.block_tables[parts.rows]])
            context_lens = torch.cat([context_lens, prompt_lens])
            cu_seqlens_q = torch.cat([self.counts[:num_decodes], parts.cu_seqlens.int() + num_decodes])
            all_rows = torch.cat([decode_rows, parts.rows])
            sample_rows = torch.cat([decode_rows, parts.sample_rows])
            cu_seqlens_k = torch.nn.functional.pad(context_lens.cumsum(0), (1, 0)).int()
            logits_indices = cu_seqlens_q[1:] - 1  # of each sequence its last token's
        context = Context(
            slot_mapping=slots,
            context_lens=context_lens,
            block_tables=block_tables,
            num_decodes=num_decodes,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            logits_indices=logits_indices,
            decode_groups={},
        )
        return StepTensors(input_ids, positions, context, all_rows, sample_rows)

    def exit(self) -> None:
        """Frees the rank's memory."""
        self.graphs.clear()
        del self.model, self.sampler, self.adjusted_sampler, self.draft_rows
        if self.device.type == "cuda":  # on a CPU nothing has to be found: it was freed by now
            gc.collect()
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
