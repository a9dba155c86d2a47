"""Linear layers split over tensor-parallel ranks (Megatron-LM, arXiv 1909.08053).

The `shards` of a parameter tell the loader which part of a checkpoint's tensors it holds.
"""

from dataclasses import replace

from torch import Tensor, nn

from nanovllm.kernels.linear import linear
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.parallel.all_reduce import Peers
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.utils.loader import Shard

Parts = Peers | None  # of a sum over the ranks that is still to be added to the residual stream


class ColumnParallelLinear(nn.Module):
    """y = norm(x) W^T + b with the output features of each of `output_sizes` split over the ranks.

    x is [N, in], y is [N, sum(output_sizes) / ranks]. `parts` of a sum over the ranks are added to x first.
    """

    def __init__(self, input_size: int, output_sizes: list[int], bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        local_sizes = [size // tp.size for size in output_sizes]
        self.weight = tp.parameter(sum(local_sizes), input_size)
        self.bias = tp.parameter(sum(local_sizes)) if bias else None
        self.weight.shards, offset = [], 0
        for full, size in zip(output_sizes, local_sizes, strict=True):
            self.weight.shards.append(Shard((full, input_size), 0, tp.rank * size, offset, size))
            offset += size
        if bias:
            self.bias.shards = [replace(shard, full_shape=shard.full_shape[:1]) for shard in self.weight.shards]

    def forward(self, x: Tensor, parts: Parts, norm: RMSNorm) -> Tensor:
        return linear(x, self.weight, self.bias, norm=norm.weight, eps=norm.eps, parts=parts)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """The MLP's gate and up projections in one product, silu(gate) * up: [N, hidden] -> [N, intermediate / ranks]."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__(hidden_size, [intermediate_size] * 2, bias, tp)

    def forward(self, x: Tensor, parts: Parts, norm: RMSNorm) -> Tensor:
        return linear(x, self.weight, self.bias, norm=norm.weight, eps=norm.eps, parts=parts, gated=True)


class QKVParallelLinear(ColumnParallelLinear):
    """The query, key and value projections in one product: [N, hidden] -> [N, q heads | k heads | v heads]."""

    def __init__(self, hidden_size: int, head_dim: int, num_heads: int, num_kv_heads: int, bias: bool,
            tp: TensorParallel) -> None:  # fmt: skip
        super().__init__(hidden_size, [num_heads * head_dim] + [num_kv_heads * head_dim] * 2, bias, tp)


class RowParallelLinear(nn.Module):
    """residual += x W^T + b with the input features split over the ranks: x [N, in / ranks], residual [N, out].

    In place; or what it returns are the ranks' parts, for whoever reads the residual next to add.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        size = input_size // tp.size
        self.weight = tp.parameter(output_size, size)
        self.weight.shards = [Shard((output_size, input_size), 1, tp.rank * size, 0, size)]
        self.bias = tp.parameter(output_size) if bias else None

    def forward(self, x: Tensor, residual: Tensor) -> Parts:
        if self.tp.size == 1:
            linear(x, self.weight, self.bias, residual=residual)
            return None
        peers = self.tp.next_peers(len(x))
        y = linear(x, self.weight, self.bias if self.tp.rank == 0 else None, peers=peers)
        if peers is None:
            residual.add_(self.tp.all_reduce(y))
        return peers
