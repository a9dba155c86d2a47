"""A mixture of experts in place of an MLP: a router gives each token to a few of many (arXiv 1701.06538)."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nanovllm.checkpoint.loader import Shard
from nanovllm.experts.mixture import Mixture
from nanovllm.kernels.e4m3 import check_e4m3
from nanovllm.kernels.experts import down_experts, gate_up_experts
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.kernels.routing import Routing, route
from nanovllm.kernels.tuning import FEW_TOKENS
from nanovllm.layers.layernorm import Normalised
from nanovllm.layers.linear import apply_linear
from nanovllm.layers.residual import Residual
from nanovllm.parallel.row_parallel import add_parts
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.weights.parts import Part, check_blocks, part_of
from nanovllm.weights.schemes import Plain, Weighted


class Router(nn.Module):
    """Gives each of the rows [N, hidden] to the experts with the largest logits; alike on all ranks."""

    def __init__(self, hidden_size: int, mixture: Mixture, tp: TensorParallel) -> None:
        super().__init__()
        self.mixture = mixture
        self.weight = tp.parameter(mixture.num_experts, hidden_size)
        self.counts = torch.zeros(mixture.num_experts, dtype=torch.int32, device=tp.device)  # `route` counts in it

    def forward(self, x: Normalised | Tensor) -> Routing:
        logits = apply_linear(x, self.weight)
        return route(logits, self.mixture.num_experts_per_tok, self.mixture.norm_topk_prob, self.counts)


@runtime_checkable
class ExpertsScheme(Protocol):
    """How experts' weights are stored, other than plainly: in 8 bits."""

    def create_experts(self, layer: "Experts") -> None:
        """Gives the layer parameters; see `Experts.add_parameters`."""

    def finish_experts(self, layer: "Experts") -> None:
        """Makes the layer's two `QuantizedWeight`s of the filled parameters."""


class Experts(Weighted):
    """The experts' weights: gates and ups [E, 2 * share, hidden], downs [E, hidden, share].

    Each rank has a share of every expert, and so as much to do as the others.
    """

    gate_up_proj: Tensor | QuantizedWeight
    down_proj: Tensor | QuantizedWeight

    def __init__(self, hidden_size: int, mixture: Mixture, tp: TensorParallel) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.mixture = mixture
        self.tp = tp

    def create_weights(self) -> None:
        """Raises ValueError if experts cannot be stored by the scheme."""
        if isinstance(self.scheme, Plain):
            self.add_parameters("", self.tp.dtype)
        elif isinstance(self.scheme, ExpertsScheme):
            check_e4m3("experts in FP8", self.tp.device)
            self.scheme.create_experts(self)
        else:
            raise ValueError(
                f"experts that are quantised by {self.scheme} are not supported, only plain ones, FP8 with scales of "
                'rows or blocks and, of a plain checkpoint, quantization="fp8"'
            )

    def finish_weights(self) -> None:
        if isinstance(self.scheme, ExpertsScheme):
            self.scheme.finish_experts(self)

    def add_parameters(self, suffix: str, dtype: torch.dtype, block: tuple[int, int] = (1, 1)) -> list[nn.Parameter]:
        """`gate_up_proj` and `down_proj`, with a suffix: each with an element for a block of rows and columns.

        A block of 0 columns is one of all, which belongs to every rank. The loader knows which tensors fill the
        parameters; those of an expert are called "weight" with the same suffix.

        Raises:
            ValueError: a block would be cut by the ranks.
        """
        height, width = block
        num_experts, part = self.mixture.num_experts, part_of(self.mixture.intermediate_size, self.tp)
        columns, hidden_columns = part, self.hidden_size
        if width == 0:
            columns, hidden_columns, width = Part(1, 0, 1), 1, 1
        check_blocks("gate_up_proj", part, height, self.tp)
        check_blocks("down_proj", columns, width, self.tp)
        # Rows of the gates and of the ups, and columns of the downs, count their blocks apart.
        hidden_rows, hidden_columns = -(-self.hidden_size // height), -(-hidden_columns // width)
        full_rows, start, rows = -(-part.full_size // height), part.start // height, -(-part.size // height)
        gate_up = self.tp.parameter(num_experts, 2 * rows, hidden_columns, dtype=dtype)
        gate_up.shards = [Shard((full_rows, hidden_columns), 0, start, offset, rows) for offset in (0, rows)]
        full_columns, start, size = -(-columns.full_size // width), columns.start // width, -(-columns.size // width)
        down = self.tp.parameter(num_experts, hidden_rows, size, dtype=dtype)
        down.shards = [Shard((hidden_rows, full_columns), 1, start, 0, size)]
        setattr(self, f"gate_up_proj{suffix}", gate_up)
        setattr(self, f"down_proj{suffix}", down)
        return [gate_up, down]


class SparseMLP(nn.Module):
    """x + the sum, weighted by the router, of the SwiGLU MLPs of each token's experts."""

    def __init__(self, hidden_size: int, mixture: Mixture, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.gate = Router(hidden_size, mixture, tp)
        self.experts = Experts(hidden_size, mixture, tp)

    def forward(self, x: Normalised | Tensor, residual: Residual) -> Residual:
        if isinstance(x, Normalised) and len(x.x) > FEW_TOKENS:
            x = x.compute()  # once, not by each of those that read it
        if self.tp.size > 1:
            return add_parts(self.add_to(None, x), residual, self.tp)
        return self.add_to(residual, x)

    def add_to(self, y: Tensor | None, x: Normalised | Tensor) -> Tensor:
        """Adds this rank's part of what the experts make of x to y [N, hidden], in place; None: to zeros."""
        routing = self.gate(x)
        x, norm, eps = x if isinstance(x, Normalised) else (x, None, 0.0)
        h = gate_up_experts(x, self.experts.gate_up_proj, routing, norm, eps)
        return down_experts(h, self.experts.down_proj, routing, y)
