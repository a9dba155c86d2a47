"""One rank: weights, KV cache, the decode batch that lives on the device, CUDA graphs, sampling.

Each running sequence has a row of device memory: its last token, context length, block table and sampling parameters.
A step of decodes reads and advances these rows and needs nothing else from the host, so that it can be launched before
the tokens of the step before it are seen, and replayed as one CUDA graph from token ids to sampled token ids.
"""

import gc
import os
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import MAX_SLOTS, Config
from nanovllm.engine.step_input import StepInput
from nanovllm.kernels.decode_rows import advance_rows, store_tokens
from nanovllm.layers.attention import Attention
from nanovllm.layers.sampler import Sampler
from nanovllm.models import model_class
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.utils.context import Context
from nanovllm.utils.loader import fill_dummy, load_model

CPU_KVCACHE_BYTES = 4 * 2**30
MAX_BLOCKS = 2**20  # each has a record on the host; only toy models could have more

# A short prompt alone is padded to one of these lengths and replayed as a graph. Other steps with prompts are launched
# one kernel at a time, which takes the host less time than the GPU needs.
GRAPH_TOKENS = (64, 128, 256, 384, 512)


class StepShape(NamedTuple):
    """The sizes of a step's tensors, which a CUDA graph fixes."""

    num_decodes: int
    num_prompts: int
    num_tokens: int  # of the prompts
    is_filtered: bool


StepOutput = tuple[Tensor, torch.cuda.Event | None]


def list_graph_shapes(config: Config) -> list[StepShape]:
    """In ascending order, what CUDA graphs are captured for."""
    if config.device == "cpu" or config.enforce_eager:
        return []
    # Batch sizes are fine-grained: all but a step's attention takes time for padding too. Up to 208 rows, cuBLAS does
    # best with multiples of 16, beyond with odd multiples of 8 (on an H200).
    sizes = {1, 2, 4, 8, 16, 24, *range(32, 209, 16), *range(216, config.max_num_seqs + 16, 16)}
    sizes = {min(n, config.max_num_seqs) for n in sizes}
    # The torch backend attends to prompts in a loop of the host's over sequences.
    lengths = () if config.attention_backend == "torch" else GRAPH_TOKENS
    return [StepShape(n, 0, 0, False) for n in sorted(sizes)] + [StepShape(0, 1, n, False) for n in lengths]


class ModelRunner:
    """Executes step inputs on one rank."""

    def __init__(self, config: Config, tp: TensorParallel) -> None:
        """Loads the model; the KV cache is yet to be allocated."""
        self.config = config
        self.tp = tp
        self.device = tp.device
        if self.device.type == "cuda" and torch.cuda.get_device_capability(self.device)[0] == 9:
            # With 128 KiB for partial sums, cuBLAS does not split K, which costs Hopper more than it gains. Two H200s,
            # a layer's products of Qwen3-8B: 62 to 64 us at 48 to 112 rows, else 66 to 69.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
            os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "128")
        self.model = model_class(config.model_config.architecture)(config, tp)
        if config.load_format == "dummy":
            fill_dummy(self.model, config.seed)
        else:
            load_model(self.model, config.model, tp.check)
        self.sampler = Sampler(tp)
        self.graph_shapes = list_graph_shapes(config)
        self.graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}
        self.graph_pool: tuple[int, int] | None = None

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        # One row more than sequences: graphs are padded with the last one, whose context stays empty.
        self.padding_row, num_rows = config.max_num_seqs, config.max_num_seqs + 1
        self.last_tokens = zeros(num_rows, dtype=torch.int64)
        # Steps write their tokens to host memory in turn: at most two are in flight.
        self.token_ring = torch.zeros(4, num_rows, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self.step_count, self.device_step_count = 0, zeros(1, dtype=torch.int64)
        self.context_lens = zeros(num_rows, dtype=torch.int32)
        self.block_tables = zeros(num_rows, config.max_blocks_per_seq, dtype=torch.int32)
        self.row_ints = zeros(2, num_rows, dtype=torch.int64)  # top_k, seed
        self.row_floats = zeros(3, num_rows, dtype=torch.float32)  # temperature, top_p, min_p
        # What the steps read besides the rows: the rows that decode, and the prompts as _set_prompts lays them out.
        self.uploaded_rows: np.ndarray | None = None
        self.decode_rows = zeros(config.max_num_seqs, dtype=torch.int64)
        self.counts = torch.arange(num_rows + 1, dtype=torch.int32, device=self.device)
        longest = max(config.max_num_batched_tokens, GRAPH_TOKENS[-1])
        self.prompts = zeros(3 * longest + 4 * num_rows + 1, dtype=torch.int64)

    # ---- start-up -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def warmup_model(self) -> int:
        """Runs the largest steps; returns the bytes of GPU memory they took at most. Any KV cache will do."""
        max_num_seqs, limit = self.config.max_num_seqs, self.config.max_num_batched_tokens
        num_prompts = min(max_num_seqs, -(-limit // (self.config.max_model_len - 1)))
        num_tokens = min(limit // num_prompts, self.config.max_model_len - 1)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        # Decodes first, as kernels are not loaded while the GPU is busy, and the prompts will keep it busy.
        self.decode_rows.copy_(torch.arange(max_num_seqs))
        self._forward(StepShape(max_num_seqs, 0, 0, is_filtered=False))
        prompts = StepShape(0, num_prompts, num_prompts * num_tokens, is_filtered=False)
        parts = np.array([(row, 0, num_tokens) for row in range(num_prompts)])
        self._set_prompts(parts, np.zeros(prompts.num_tokens, dtype=np.int64), False, prompts)
        self._forward(prompts)
        self.context_lens.zero_()
        self.device_step_count.zero_()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        return peak

    def allocate_kv_cache(self) -> int:
        """Allocates the KV cache and returns its number of blocks, the same on every rank.

        Raises:
            ValueError: a request of max_model_len tokens does not fit.
        """
        config, needed = self.config, self.config.max_blocks_per_seq
        block_bytes = self._bind_kv_cache(1)
        if self.device.type == "cpu":
            fitting = max(needed, min(needed * config.max_num_seqs, CPU_KVCACHE_BYTES // block_bytes))
        else:  # into what the engine may take, less what is taken and what a step takes at its peak
            peak = self.warmup_model() * (2 if self.graph_shapes else 1)
            free, total = torch.cuda.mem_get_info(self.device)
            fitting = (int(total * config.gpu_memory_utilization) - (total - free) - peak) // block_bytes
        num_blocks = config.num_kvcache_blocks
        if num_blocks == -1:
            num_blocks = self.tp.min(min(fitting, MAX_SLOTS // config.kvcache_block_size, MAX_BLOCKS))
        if num_blocks < needed:
            option = "gpu_memory_utilization" if config.num_kvcache_blocks == -1 else "num_kvcache_blocks"
            raise ValueError(f"max_model_len={config.max_model_len} needs {needed} blocks of the KV cache, which has "
                f"{max(num_blocks, 0)}; lower max_model_len, or raise {option}")  # fmt: skip
        self._bind_kv_cache(num_blocks)
        return num_blocks

    def _bind_kv_cache(self, num_blocks: int) -> int:
        """Allocates the cache of all layers and hands each its part. Returns the bytes."""
        model, dtype = self.config.model_config, self.config.torch_dtype
        heads = model.num_key_value_heads // self.tp.size
        shape = (2, model.num_hidden_layers, num_blocks, self.config.kvcache_block_size, heads, model.head_dim)
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        for layer in layers:
            layer.k_cache = layer.v_cache = torch.empty(0)
        if self.device.type == "cpu":  # NumPy's zeros take no memory until they are written
            caches = torch.from_numpy(np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), np.uint8)).view(dtype)
        else:
            caches = torch.zeros(shape, dtype=dtype, device=self.device)
        semaphores = torch.zeros(self.config.max_num_seqs * heads, dtype=torch.int32, device=self.device)
        for layer, k_cache, v_cache in zip(layers, caches[0], caches[1], strict=True):
            layer.k_cache, layer.v_cache, layer.semaphores = k_cache, v_cache, semaphores
        return caches.nbytes

    @torch.inference_mode()
    def capture_cudagraph(self) -> None:
        """Captures the graph shapes, the largest first to share its memory."""
        # See _capture; kept, as the graphs name the event.
        self.branch, self.past = torch.cuda.Stream(self.device), torch.cuda.Event(external=True)
        for shape in reversed(self.graph_shapes):
            self.graphs[shape] = self._capture(shape)

    def _capture(self, shape: StepShape) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), self.tp.stream
        self.past.record(stream)
        # "relaxed": a kernel may have to be loaded, or compiled, on the way.
        with torch.cuda.graph(graph, self.graph_pool, stream, capture_error_mode="relaxed"):
            # A branch that only waits for what is long past: in a graph that is a mere chain, a GPU starts kernels
            # later. One / two H200s, what one of two has of Qwen3-8B: a step of 16 rows 3,218 -> 3,160 / 3,239 ->
            # 3,181 us, one of 112 rows 4,589 -> 4,537 / 4,761 -> 4,710.
            self.branch.wait_stream(stream)
            self.branch.wait_event(self.past)
            self._forward(shape)
            stream.wait_stream(self.branch)
        self.graph_pool = graph.pool()
        return graph

    # ---- steps ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, step: StepInput) -> StepOutput:
        """Launches a step; does not wait for a GPU.

        Returns host memory where, by row, the tokens of the rows that sample one will be, and the event that says so.
        """
        self._apply_changes(step)
        shape = StepShape(len(step.decode_rows), len(step.prompts), len(step.token_ids), step.is_filtered)
        padded = self._padded_shape(shape)
        if shape.num_prompts:
            self._set_prompts(step.prompts, step.token_ids, step.is_last_partial, padded or shape)
        if padded is None:
            self._forward(shape, int(step.prompts[:, 2].max(initial=0)))
        else:
            if padded not in self.graphs:  # of steps that filter: captured when they first come
                self.graphs[padded] = self._capture(padded)
            self.graphs[padded].replay()
        event = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
        self.step_count += 1
        return self.token_ring[(self.step_count - 1) % len(self.token_ring)], event

    def _apply_changes(self, step: StepInput) -> None:
        if len(step.joined_ints):
            ints, floats = self._to_device(step.joined_ints), self._to_device(step.joined_floats)
            rows = ints[:, 0]
            self.last_tokens[rows] = ints[:, 1]
            self.context_lens[rows] = ints[:, 2].int()
            self.row_ints[:, rows] = ints[:, 3:].T
            self.row_floats[:, rows] = floats.T
        if len(step.new_blocks):
            blocks = self._to_device(step.new_blocks)
            self.block_tables[blocks[:, 0], blocks[:, 1]] = blocks[:, 2].int()
        rows = np.full(self.config.max_num_seqs, self.padding_row)
        rows[: len(step.decode_rows)] = step.decode_rows
        if not np.array_equal(rows, self.uploaded_rows):
            self.uploaded_rows = rows
            self.decode_rows.copy_(self._to_device(rows))

    def _padded_shape(self, shape: StepShape) -> StepShape | None:
        """The shape of the graph that holds a step of this shape, None if none does."""
        decodes, prompts, tokens, is_filtered = shape
        for padded in self.graph_shapes:
            if padded.num_prompts == prompts and padded.num_decodes >= decodes and padded.num_tokens >= tokens:
                return padded._replace(is_filtered=is_filtered)
        return None

    def _set_prompts(self, parts: np.ndarray, token_ids: np.ndarray, is_last_partial: bool, shape: StepShape) -> None:
        """Writes, in one copy, what `_forward` reads of the prompts, padded to a shape.

        For each token its id, position and row; for each prompt its row, the context length it reaches, the row that
        gets its sample; then where each prompt's tokens begin.
        """
        rows, starts, num_tokens = parts.T
        per_token = np.zeros((3, shape.num_tokens), dtype=np.int64)
        per_token[2] = self.padding_row
        offsets = num_tokens.cumsum() - num_tokens
        positions = np.arange(len(token_ids)) + np.repeat(starts - offsets, num_tokens)
        per_token[:, : len(token_ids)] = token_ids, positions, np.repeat(rows, num_tokens)
        per_prompt = np.array([rows, starts + num_tokens, rows])
        if is_last_partial:
            per_prompt[2, -1] = self.padding_row
        values = np.concatenate([per_token.ravel(), per_prompt.ravel(), offsets, [len(token_ids)]])
        self.prompts[: len(values)].copy_(self._to_device(values))

    def _forward(self, shape: StepShape, max_seqlen_q: int | None = None) -> None:
        """Computes and samples a step: one token of each decode row, then the prompts' tokens.

        Reads and writes the tensors that `__init__` allocates only, so that it can be captured.
        """
        d, p, t, is_filtered = shape
        token_ids, positions, token_rows = self.prompts[: 3 * t].view(3, t)
        rows, prompt_lens, sample_rows = self.prompts[3 * t : 3 * t + 3 * p].view(3, p)
        cu_seqlens = self.prompts[3 * t + 3 * p : 3 * t + 4 * p + 1]
        decode_rows = self.decode_rows[:d]
        block_size = self.config.kvcache_block_size
        tokens, starts, slots, context_lens, block_tables = advance_rows(decode_rows, self.last_tokens,
            self.context_lens, self.block_tables, block_size)  # fmt: skip
        cu_seqlens_q = self.counts[: d + 1]
        if p:
            prompt_lens = prompt_lens.int()
            self.context_lens[rows] = prompt_lens
            prompt_slots = self.block_tables[token_rows, positions // block_size] * block_size + positions % block_size
            slots = torch.cat([slots, torch.where(token_rows == self.padding_row, -1, prompt_slots).int()])
            token_ids, positions = torch.cat([tokens, token_ids]), torch.cat([starts, positions.int()])
            block_tables = torch.cat([block_tables, self.block_tables[rows]])
            context_lens = torch.cat([context_lens, prompt_lens])
            cu_seqlens_q = torch.cat([cu_seqlens_q[:d], cu_seqlens.int() + d])
            rows, sample_rows = torch.cat([decode_rows, rows]), torch.cat([decode_rows, sample_rows])
        else:
            token_ids, positions, rows, sample_rows = tokens, starts, decode_rows, decode_rows
        context = Context(slot_mapping=slots, context_lens=context_lens, block_tables=block_tables, num_decodes=d,
            cu_seqlens_q=cu_seqlens_q, max_seqlen_q=t if max_seqlen_q is None else max_seqlen_q,
            cu_seqlens_k=torch.nn.functional.pad(context_lens.cumsum(0), (1, 0)).int() if p else context_lens,
            logits_indices=cu_seqlens_q[1:] - 1 if p else None)  # fmt: skip
        logits = self.model.compute_logits(*self.model(token_ids, positions, context))
        # A token's draw depends on its position, which is the context length.
        packed = self.sampler(logits, rows, self.row_ints, self.row_floats, context_lens, is_filtered)
        store_tokens(packed, sample_rows, self.last_tokens, self.token_ring, self.device_step_count)

    def _to_device(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def exit(self) -> None:
        """Frees the rank's memory."""
        self.graphs.clear()
        del self.model, self.sampler
        gc.collect()
        if self.device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
