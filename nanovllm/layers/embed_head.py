"""The two ends of a model: token ids to hidden states, and hidden states to logits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.checkpoint.loader import Shard
from nanovllm.kernels.cpu_products import half_logits
from nanovllm.layers.layernorm import Normalised
from nanovllm.layers.linear import apply_linear
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.weights.parts import part_of


class VocabParallelEmbedding(nn.Module):
    """Token ids [N] -> rows of the table [vocab, hidden].

    The table is whole on every rank, whatever its name says: one split by vocabulary would take a sum over the ranks.
    Rows may be multiplied by a number, which families set.
    """

    multiplier: float = 1.0

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = tp.parameter(vocab_size, hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = F.embedding(input_ids, self.weight)
        return x if self.multiplier == 1 else x.mul_(self.multiplier)


class ParallelLMHead(nn.Module):
    """Hidden states [N, hidden] -> this rank's logits [N, vocab / ranks rounded up], one rank's after the other's.

    A `soft_cap` makes logits cap * tanh(logits / cap). Beyond the vocabulary they are -inf. With `tied_weight`, the
    embedding's table, the weight is a part of that and no parameter of its own.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        tp: TensorParallel,
        tied_weight: Tensor | None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        self.soft_cap = soft_cap
        _, start, size = part_of(vocab_size, tp)
        self.num_missing = -(-vocab_size // tp.size) - size
        if tied_weight is None:
            self.weight = tp.parameter(size, hidden_size)
        else:
            self.weight = tied_weight[start : start + size]
        self.weight.shards = [Shard((vocab_size, hidden_size), 0, start, 0, size)]

    def forward(self, x: Normalised | Tensor) -> Tensor:
        if self.weight.is_cpu and self.weight.dtype != torch.float32:  # torch rounds these: the best would tie
            logits = half_logits(x.compute() if isinstance(x, Normalised) else x, self.weight)
        else:
            logits = apply_linear(x, self.weight)
        if self.soft_cap is not None:
            logits = logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return F.pad(logits, (0, self.num_missing), value=-math.inf) if self.num_missing else logits
