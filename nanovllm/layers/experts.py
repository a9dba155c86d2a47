"""A mixture of experts in place of an MLP: a router gives each token to a few of many (arXiv 1701.06538)."""

import torch
from torch import Tensor, nn

from nanovllm.checkpoint.loader import Shard
from nanovllm.checkpoint.mixture import Mixture
from nanovllm.kernels.experts import down_experts, gate_up_experts
from nanovllm.kernels.routing import Routing, route
from nanovllm.kernels.tuning import FEW_TOKENS
from nanovllm.layers.layernorm import Normalised
from nanovllm.layers.linear import Weighted, apply_linear, part_of
from nanovllm.layers.residual import Residual
from nanovllm.parallel.row_parallel import add_parts
from nanovllm.parallel.tensor_parallel import TensorParallel


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


class Experts(Weighted):
    """The experts' weights: gates and ups [E, 2 * share, hidden], downs [E, hidden, share].

    Each rank has a share of every expert, and so as much to do as the others.
    """

    def __init__(self, hidden_size: int, mixture: Mixture, tp: TensorParallel) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.mixture = mixture
        self.tp = tp

    def create_weights(self) -> None:
        tp, hidden_size = self.tp, self.hidden_size
        num_experts, intermediate_size = self.mixture.num_experts, self.mixture.intermediate_size
        _, start, size = part_of(intermediate_size, tp)
        self.gate_up_proj = tp.parameter(num_experts, 2 * size, hidden_size)
        self.gate_up_proj.shards = [
            Shard((intermediate_size, hidden_size), 0, start, offset, size) for offset in (0, size)
        ]
        self.down_proj = tp.parameter(num_experts, hidden_size, size)
        self.down_proj.shards = [Shard((hidden_size, intermediate_size), 1, start, 0, size)]

    def finish_weights(self) -> None:
        """There is nothing to do."""


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
