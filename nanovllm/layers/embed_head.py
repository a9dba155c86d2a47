"""LM head, split by vocabulary over tensor-parallel ranks. The embedding is torch's, see layers/decoder.py."""

from torch import Tensor, nn

from nanovllm.kernels.linear import linear
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import Parts
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.utils.loader import Shard


class ParallelLMHead(nn.Module):
    """This rank's logits of normalised x: [N, hidden] -> [N, vocab / ranks], one rank's after the other's.

    With `table`, the embedding's, the weight is a part of that and no parameter of its own.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel, table: Tensor | None) -> None:
        super().__init__()
        size = vocab_size // tp.size
        self.weight = tp.parameter(size, hidden_size) if table is None else table.chunk(tp.size)[tp.rank]
        self.weight.shards = [Shard((vocab_size, hidden_size), 0, tp.rank * size, 0, size)]

    def forward(self, x: Tensor, parts: Parts, norm: RMSNorm) -> Tensor:
        return linear(x, self.weight, norm=norm.weight, eps=norm.eps, parts=parts)
