"""Token embedding and LM head, both split by vocabulary over tensor-parallel ranks."""

import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.kernels.linear import linear
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.utils.loader import Shard
from nanovllm.utils.tensor_parallel import TensorParallel


class VocabParallelEmbedding(nn.Module):
    """Looks up rows of a table of which each rank holds a part: token ids [N] -> [N, hidden]."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        size = vocab_size // tp.size
        self.start = tp.rank * size
        self.weight = tp.parameter(size, hidden_size)
        self.weight.shards = [Shard((vocab_size, hidden_size), 0, self.start, 0, size)]

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        local_ids = token_ids - self.start
        is_local = (local_ids >= 0) & (local_ids < len(self.weight))
        return self.tp.all_reduce(F.embedding(local_ids * is_local, self.weight) * is_local[:, None])


class ParallelLMHead(VocabParallelEmbedding):
    """This rank's logits of normalised x: [N, hidden] -> [N, vocab / ranks], those of token ids from `start` on."""

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return linear(x, self.weight, norm=norm.weight, eps=norm.eps)
