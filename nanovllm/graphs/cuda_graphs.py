"""CUDA graphs of whole steps: for which shapes they are captured, which of them a step is padded to, their replay.

A graph launches a step's kernels, from token ids to sampled token ids, at once, where the host would take longer to
launch one after the other than a GPU takes to run them. It fixes the sizes and the addresses of all tensors. So
nothing that a step reads or writes may be allocated anew once graphs are captured. What a step computes is not known
here: the capture calls a function that does it.
"""

import math
from collections.abc import Callable

import torch

from nanovllm.config import Config
from nanovllm.engine.step_input import StepShape
from nanovllm.kernels.tuning import HOPPER_ROWS

# The lengths to which the tokens of prompts are padded. Of one prompt alone the first ones are captured at the start.
GRAPH_TOKENS = (64, 128, 256, 384, 512)
MORE_TOKENS = (768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)

# Tokens times weights of a step with prompts up to which it is worth a graph: to launch it one kernel after the other
# takes the host 25 to 50 ms, and 6e12 take an H200 17. With 64 decodes of Qwen3-0.6B and a prompt of 300 tokens in
# every fourth step, steps took 2.2 ms on average, else 10.7. Prompts in bulk, steps of 16,384 tokens, gain no more
# than the captures cost them.
MAX_WORK = 6e12


def list_graph_shapes(config: Config) -> list[StepShape]:
    """In ascending order, what CUDA graphs are captured for."""
    if config.device == "cpu" or config.enforce_eager:
        return []
    # Batch sizes are fine-grained: all but a step's attention takes time for padding too. Up to 208 rows, cuBLAS does
    # best with multiples of 16, beyond with odd multiples of 8 (on an H200).
    sizes = {1, 2, 4, 8, 16, 24, *range(32, 209, 16), *range(216, config.max_num_seqs + 16, 16)}
    sizes = sorted({min(size, config.max_num_seqs) for size in sizes})
    shapes = [StepShape(size, num_prompts=0, num_tokens=0, is_filtered=False) for size in sizes]
    if config.speculation is not None:
        checked = [shape._replace(num_drafts=config.speculation.num_drafts_of(shape.num_decodes)) for shape in shapes]
        shapes += [shape for shape in checked if shape.num_drafts]
    # The torch backend attends to prompts in a loop of the host's over sequences, which no graph can hold.
    if config.attention_backend != "torch":
        shapes += [StepShape(0, num_prompts=1, num_tokens=length, is_filtered=False) for length in GRAPH_TOKENS]
    return shapes


def list_sizes(first: int, factor: int, last: int) -> list[int]:
    """Numbers below `last` that grow by a factor, then it."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return [*sizes, last]


def next_size(sizes: list[int], size: int) -> int | None:
    """The first of ascending sizes that is not smaller."""
    return next((padded for padded in sizes if padded >= size), None)


class CudaGraphs:
    """The graphs of one rank, by shape; they share their memory."""

    def __init__(self, config: Config, stream: torch.cuda.Stream | None) -> None:
        """Captures nothing yet. `stream` is the one of all work on the rank's GPU."""
        self.shapes = list_graph_shapes(config)
        self.stream = stream
        self.captured: dict[StepShape, torch.cuda.CUDAGraph] = {}
        self.pool: tuple[int, int] | None = None
        self.max_rows = math.inf  # of a step with prompts; `capture` knows it
        self.seen: set[StepShape] = set()  # of steps with prompts: what they would have been padded to
        self.decode_sizes, self.prompt_sizes, self.known_rows = [0], [1], []
        self.token_sizes = [shape.num_tokens for shape in self.shapes if shape.num_prompts]
        # FlashAttention reads memory that is not there if sequences without tokens are among those of a step.
        if self.token_sizes and config.attention_backend != "flash_attn":
            self.known_rows = [shape.num_decodes for shape in self.shapes if not shape.num_prompts + shape.num_drafts]
            self.decode_sizes += list_sizes(8, 2, config.max_num_seqs)
            self.prompt_sizes = list_sizes(1, 4, config.max_num_seqs)
            most = max(config.max_num_batched_tokens, *self.token_sizes)
            self.token_sizes = sorted({*self.token_sizes, *(size for size in MORE_TOKENS if size < most), most})

    def padded_shape(self, shape: StepShape) -> StepShape | None:
        """The shape of the graph that a step of this shape is to be padded to, None if it is to be launched as it is.

        A shape with prompts, of which there are many, gets a graph when it is asked for the second time.
        """
        padded = self._padded_prompts(shape) if shape.num_prompts else self._padded_decodes(shape)
        if padded is None or not padded.num_prompts or padded in self.captured:
            return padded
        if padded not in self.seen:
            self.seen.add(padded)
            return None
        return padded

    def _padded_decodes(self, shape: StepShape) -> StepShape | None:
        """The shape with as many decodes as the smallest one captured at the start that holds a step without prompts.

        What the step asks of its draws stays, captured or not.
        """
        for padded in self.shapes:
            if (
                not padded.num_prompts
                and padded.num_drafts == shape.num_drafts
                and padded.num_decodes >= shape.num_decodes
            ):
                return shape._replace(num_decodes=padded.num_decodes)
        return None

    def _padded_prompts(self, shape: StepShape) -> StepShape | None:
        """The smallest shape that holds a step with prompts, None if it is too large for a graph."""
        num_decodes = next_size(self.decode_sizes, shape.num_decodes)
        num_prompts = next_size(self.prompt_sizes, shape.num_prompts)
        num_tokens = next_size(self.token_sizes, shape.num_tokens)
        if None in (num_decodes, num_prompts, num_tokens):
            return None
        padded = shape._replace(num_decodes=num_decodes, num_prompts=num_prompts, num_tokens=num_tokens)
        is_worth_it = num_decodes + num_tokens <= self.max_rows
        return padded if is_worth_it or padded in self.captured else None

    def with_known_rows(self, shape: StepShape) -> StepShape:
        """A step that has no graph, with prompts of no tokens added, so that it samples from as many rows as others.

        Libraries have kernels for numbers of rows, of which a new one is loaded only when the GPU has nothing to do:
        the host would wait, and see first tokens late. Those of the captured decodes have been loaded.
        """
        num_rows = next_size(self.known_rows, shape.num_decodes + shape.num_prompts)
        if not shape.num_prompts or num_rows is None:
            return shape
        return shape._replace(num_prompts=num_rows - shape.num_decodes)

    def rehearse(self, forward: Callable[[StepShape], None], others: list[StepShape]) -> None:
        """Has the kernels of all shapes, and of others, compiled at once: by captures that are thrown away.

        `forward` must keep no tensor that it makes: in a capture nothing is computed.
        """
        from nanovllm.kernels.compile_ahead import compiling_together  # where there is a GPU, there is Triton

        # Larger batches of decodes have the same kernels. Prompts have what takes longest to compile.
        shapes = [shape for shape in self.shapes if shape.num_decodes <= HOPPER_ROWS]
        with compiling_together():
            for shape in others + shapes:
                with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="relaxed"):
                    forward(shape)
        torch._C._cuda_clearCublasWorkspaces()  # they may lie in such a capture's memory

    def capture(self, forward: Callable[[StepShape], None], num_weights: int) -> None:
        """Captures `forward` for all shapes, the largest first, so that the others fit into its memory.

        Steps of how many rows are worth a graph depends on `num_weights`, which must be alike on all ranks, as they
        are to pad steps alike.
        """
        self.max_rows = MAX_WORK / num_weights
        # See _capture; kept, as the graphs name the event.
        self.branch = torch.cuda.Stream(self.stream.device)
        self.past = torch.cuda.Event(external=True)
        for shape in reversed(self.shapes):
            self.captured[shape] = self._capture(shape, forward)

    def replay(self, shape: StepShape, forward: Callable[[StepShape], None]) -> None:
        """Launches a step of a shape that `padded_shape` has given, as `forward` would."""
        if shape not in self.captured:  # not a plain one: captured when it first comes
            self.captured[shape] = self._capture(shape, forward)
        self.captured[shape].replay()

    def clear(self) -> None:
        """Gives up all graphs."""
        self.captured.clear()

    def _capture(self, shape: StepShape, forward: Callable[[StepShape], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self.past.record(self.stream)
        # "relaxed": a kernel may have to be loaded, or compiled, on the way.
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="relaxed"):
            # A branch that only waits for what is long past: in a graph that is a mere chain, a GPU starts kernels
            # later. One / two H200s, what one of two has of Qwen3-8B: a step of 16 rows 3,218 -> 3,160 / 3,239 ->
            # 3,181 us, one of 112 rows 4,589 -> 4,537 / 4,761 -> 4,710.
            self.branch.wait_stream(self.stream)
            self.branch.wait_event(self.past)
            forward(shape)
            self.stream.wait_stream(self.branch)
        self.pool = graph.pool()
        return graph
