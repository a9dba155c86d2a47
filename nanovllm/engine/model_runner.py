"""One rank: weights, KV cache, the decode batch that lives on the device, CUDA graphs, sampling.

Each running sequence has a row of device memory: its last token, context length, block table and sampling parameters.
A step of decodes reads and advances these rows and needs nothing else from the host, so that it can be launched before
the tokens of the step before it are seen, and replayed as one CUDA graph from token ids to sampled token ids.
"""

from __future__ import annotations

import gc

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.step_input import StepInput
from nanovllm.layers.attention import Attention
from nanovllm.layers.sampler import Sampler, SamplingInputs
from nanovllm.models import model_class
from nanovllm.utils.context import Context
from nanovllm.utils.loader import fill_dummy, load_model
from nanovllm.utils.tensor_parallel import TensorParallel

CPU_KVCACHE_BYTES = 4 * 2**30


class SampledTokens:
    """The tokens that a launched step samples, on their way to the host."""

    def __init__(self, last_tokens: torch.Tensor) -> None:
        self._tokens = last_tokens.to("cpu", non_blocking=True, copy=True)
        self._event = torch.cuda.Event() if last_tokens.is_cuda else None
        if self._event is not None:
            self._event.record()

    def is_ready(self) -> bool:
        """Whether the step is done."""
        return self._event is None or self._event.query()

    def wait(self) -> list[int]:
        """The last token of each row once the step is done."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.tolist()


class ModelRunner:
    """Executes step inputs on one rank."""

    def __init__(self, config: Config, tp: TensorParallel) -> None:
        """Loads the model; the KV cache is yet to be allocated."""
        self.config = config
        self.tp = tp
        self.device = tp.device
        self.model = model_class(config.model_config.architecture)(config, tp)
        if config.load_format == "dummy":
            fill_dummy(self.model, config.seed)
        else:
            load_model(self.model, config.model)
        self.sampler = Sampler(tp)
        self.graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self.graph_pool: tuple[int, int] | None = None
        self._allocate_rows()

    def _allocate_rows(self) -> None:
        """One row more than sequences: graphs are padded with the last one, whose context stays empty."""
        num_rows, max_blocks = self.config.max_num_seqs + 1, self.config.max_blocks_per_seq

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.padding_row = num_rows - 1
        self.last_tokens = zeros(num_rows, dtype=torch.int64)
        self.context_lens = zeros(num_rows, dtype=torch.int32)
        self.block_tables = zeros(num_rows, max_blocks, dtype=torch.int32)
        self.row_ints = zeros(num_rows, 2, dtype=torch.int64)  # top_k, seed
        self.row_floats = zeros(num_rows, 3, dtype=torch.float32)  # temperature, top_p, min_p
        self.decode_rows = zeros(self.config.max_num_seqs, dtype=torch.int64)
        self.num_decode_rows = 0
        # Decode steps are padded to these batch sizes: finely where padding would cost much.
        sizes = [1, 2, 4, *range(8, self.config.max_num_seqs + 8, 8)]
        self.graph_sizes = sorted({min(size, self.config.max_num_seqs) for size in sizes})

    # ---- start-up -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def warmup_model(self) -> int:
        """Runs the largest steps on a cache of one block; returns the bytes of GPU memory they took at most."""
        self._bind_kv_cache(1)
        limit, length = self.config.max_num_batched_tokens, self.config.max_model_len - 1
        num_seqs = min(self.config.max_num_seqs, -(-limit // length))
        lengths = np.full(num_seqs, min(length, limit // num_seqs), dtype=np.int64)
        step = StepInput(
            joined_ints=np.zeros((0, 5), dtype=np.int64),
            joined_floats=np.zeros((0, 3), dtype=np.float32),
            new_blocks=np.zeros((0, 3), dtype=np.int64),
            rows=np.arange(num_seqs),
            starts=np.zeros(num_seqs, dtype=np.int64),
            num_tokens=lengths,
            token_ids=np.zeros(lengths.sum(), dtype=np.int64),
            num_samples=num_seqs,
            is_filtered=False,
        )
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.run(step)
        self.context_lens.zero_()
        self.decode_rows.copy_(torch.arange(self.config.max_num_seqs))
        self._decode(self.config.max_num_seqs, is_filtered=False)
        self.context_lens.zero_()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        return peak

    def allocate_kv_cache(self) -> int:
        """Allocates the KV cache and returns its number of blocks, the same on every rank.

        Raises:
            ValueError: a request of max_model_len tokens does not fit.
        """
        config = self.config
        peak = self.warmup_model() if self.device.type == "cuda" else 0
        block_bytes = self._kv_cache_bytes(1)
        num_blocks = config.num_kvcache_blocks
        if num_blocks == -1:
            num_blocks = self.tp.min(self._memory_for_cache(peak) // block_bytes)
        needed = config.max_blocks_per_seq
        if num_blocks < needed:
            raise ValueError(
                f"max_model_len={config.max_model_len} needs {needed} blocks of {config.kvcache_block_size} tokens, "
                f"the KV cache has {max(num_blocks, 0)}; lower max_model_len, or raise "
                + ("gpu_memory_utilization" if config.num_kvcache_blocks == -1 else "num_kvcache_blocks")
            )
        self._bind_kv_cache(num_blocks)
        return num_blocks

    def _memory_for_cache(self, peak: int) -> int:
        """Bytes for the KV cache: what the engine may take, less what is taken and what a step takes at its peak."""
        if self.device.type == "cpu":
            one_request = self._kv_cache_bytes(self.config.max_blocks_per_seq)
            return max(one_request, min(one_request * self.config.max_num_seqs, CPU_KVCACHE_BYTES))
        free, total = torch.cuda.mem_get_info(self.device)
        reserve = 2 * peak if not self.config.enforce_eager else peak
        return int(total * self.config.gpu_memory_utilization) - (total - free) - reserve

    def _kv_cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        model = self.config.model_config
        heads = model.num_key_value_heads // self.tp.size
        return (2, model.num_hidden_layers, num_blocks, self.config.kvcache_block_size, heads, model.head_dim)

    def _kv_cache_bytes(self, num_blocks: int) -> int:
        return int(np.prod(self._kv_cache_shape(num_blocks))) * self.config.torch_dtype.itemsize

    def _bind_kv_cache(self, num_blocks: int) -> None:
        """Zeros, for what lies behind a sequence's end may be read and must then be finite."""
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        for layer in layers:
            layer.k_cache = layer.v_cache = torch.empty(0)
        caches = torch.zeros(self._kv_cache_shape(num_blocks), dtype=self.config.torch_dtype, device=self.device)
        semaphores = torch.zeros(self.config.max_num_seqs * caches.size(4), dtype=torch.int32, device=self.device)
        for layer, k_cache, v_cache in zip(layers, caches[0], caches[1], strict=True):
            layer.k_cache, layer.v_cache, layer.semaphores = k_cache, v_cache, semaphores

    def capture_cudagraph(self) -> None:
        """Captures a step of decodes for each of the graph sizes, the largest first to share its memory."""
        for size in reversed(self.graph_sizes):
            self._capture(size, is_filtered=False)

    @torch.inference_mode()
    def _capture(self, size: int, is_filtered: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        rows = self.decode_rows.clone()
        self.decode_rows.fill_(self.padding_row)
        # Once outside of the graph, where kernels may be compiled and memory be asked for.
        self._decode(size, is_filtered)
        with torch.cuda.graph(graph, self.graph_pool, capture_error_mode="thread_local"):
            self._decode(size, is_filtered)
        self.graph_pool = graph.pool()
        self.decode_rows.copy_(rows)
        self.graphs[size, is_filtered] = graph
        return graph

    # ---- steps ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, step: StepInput) -> SampledTokens:
        """Launches a step; does not wait for a GPU."""
        self._apply_changes(step)
        if len(step.num_tokens):
            self._prefill(step)
        else:
            self._launch_decode(step)
        return SampledTokens(self.last_tokens)

    def _apply_changes(self, step: StepInput) -> None:
        if len(step.joined_ints):
            ints, floats = self._to_device(step.joined_ints), self._to_device(step.joined_floats)
            rows = ints[:, 0]
            self.last_tokens[rows] = ints[:, 1]
            self.context_lens[rows] = ints[:, 2].int()
            self.row_ints[rows] = ints[:, 3:]
            self.row_floats[rows] = floats
        if len(step.new_blocks):
            blocks = self._to_device(step.new_blocks)
            self.block_tables[blocks[:, 0], blocks[:, 1]] = blocks[:, 2].int()

    def _launch_decode(self, step: StepInput) -> None:
        if step.rows is not None:
            self.num_decode_rows = len(step.rows)
            rows = np.full(self.config.max_num_seqs, self.padding_row)
            rows[: len(step.rows)] = step.rows
            self.decode_rows.copy_(self._to_device(rows))
        if self.device.type == "cpu" or self.config.enforce_eager:
            self._decode(self.num_decode_rows, step.is_filtered)
            return
        size = next(size for size in self.graph_sizes if size >= self.num_decode_rows)
        graph = self.graphs.get((size, step.is_filtered)) or self._capture(size, step.is_filtered)
        graph.replay()

    def _decode(self, batch_size: int, is_filtered: bool) -> None:
        """One token for each of the first `batch_size` decode rows. Reads and writes device memory only."""
        rows = self.decode_rows[:batch_size]
        is_padding = rows == self.padding_row
        starts = self.context_lens[rows]
        block_tables = self.block_tables[rows]
        context_lens = torch.where(is_padding, 0, starts + 1)
        context = Context(
            slot_mapping=torch.where(is_padding, -1, self._slots(block_tables, starts)),
            context_lens=context_lens,
            block_tables=block_tables,
            num_decodes=batch_size,
            cu_seqlens_q=torch.arange(batch_size + 1, dtype=torch.int32, device=self.device),
            cu_seqlens_k=context_lens,
            max_seqlen_q=1,
            max_seqlen_k=self.config.max_model_len,
        )
        hidden_states = self.model(self.last_tokens[rows], starts, context)
        self.context_lens[rows] = context_lens
        self._sample(hidden_states, rows, context_lens, is_filtered)

    def _prefill(self, step: StepInput) -> None:
        """A step in which some rows, the last ones, compute parts of their prompts and the others decode."""
        num_decodes = len(step.rows) - len(step.num_tokens)
        num_tokens = np.concatenate([np.ones(num_decodes, dtype=np.int64), step.num_tokens])
        cu_seqlens_q = np.concatenate([[0], num_tokens.cumsum()])
        rows = self._to_device(step.rows)
        # Where a row begins is known on the device for decodes, on the host for prompts.
        starts = self.context_lens[rows]
        starts[num_decodes:] = self._to_device(step.starts.astype(np.int32))
        offsets = self._to_device(np.arange(cu_seqlens_q[-1]) - np.repeat(cu_seqlens_q[:-1], num_tokens)).int()
        owners = self._to_device(np.repeat(np.arange(len(num_tokens)), num_tokens))
        cu_seqlens = self._to_device(cu_seqlens_q)
        positions = starts[owners] + offsets
        block_tables = self.block_tables[rows]
        context_lens = starts + cu_seqlens.diff().int()
        context = Context(
            slot_mapping=self._slots(block_tables, positions, owners),
            context_lens=context_lens,
            block_tables=block_tables,
            num_decodes=num_decodes,
            cu_seqlens_q=cu_seqlens.int(),
            cu_seqlens_k=torch.nn.functional.pad(context_lens.cumsum(0), (1, 0)).int(),
            max_seqlen_q=int(step.num_tokens.max()),
            max_seqlen_k=self.config.max_model_len,
        )
        input_ids = torch.cat([self.last_tokens[rows[:num_decodes]], self._to_device(step.token_ids)])
        hidden_states = self.model(input_ids, positions, context)
        self.context_lens[rows] = context_lens
        if step.num_samples:
            last = cu_seqlens[1 : step.num_samples + 1] - 1
            self._sample(hidden_states[last], rows[: step.num_samples], context_lens, step.is_filtered)

    def _slots(
        self, block_tables: torch.Tensor, positions: torch.Tensor, owners: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Slots of positions [N], of the block tables' rows in order or of rows `owners` [N]."""
        size = self.config.kvcache_block_size
        index = (positions // size).long()
        blocks = block_tables.gather(1, index[:, None])[:, 0] if owners is None else block_tables[owners, index]
        return blocks * size + positions % size

    def _sample(
        self, hidden_states: torch.Tensor, rows: torch.Tensor, context_lens: torch.Tensor, is_filtered: bool
    ) -> None:
        """Samples the rows' next tokens; a token's draw depends on its position, which is the context length."""
        ints, floats = self.row_ints[rows], self.row_floats[rows]
        inputs = SamplingInputs(
            temperatures=floats[:, 0],
            top_ks=ints[:, 0].int(),
            top_ps=floats[:, 1],
            min_ps=floats[:, 2],
            seeds=ints[:, 1],
            positions=context_lens[: len(rows)].long(),
            is_filtered=is_filtered,
        )
        self.last_tokens[rows] = self.sampler(self.model.compute_logits(hidden_states), inputs)

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def exit(self) -> None:
        """Frees the rank's memory."""
        self.graphs.clear()
        del self.model, self.sampler
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
