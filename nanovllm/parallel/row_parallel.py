"""Row-parallel products: each rank has a part of the sum, which is added to the residual stream by whoever reads that.

On one GPU nothing here is used.
"""

from typing import NamedTuple

from torch import Tensor

from nanovllm.kernels.linear import linear
from nanovllm.parallel.all_reduce import Peers, add_sum, send_linear, send_part
from nanovllm.parallel.tensor_parallel import TensorParallel


class PendingSum(NamedTuple):
    """A residual stream [N, hidden], without the sum of the parts that the ranks leave with `peers`.

    The sum is added to x, in place, by the first who reads it: a norm, or `add`.
    """

    x: Tensor
    peers: Peers

    def add_and_normalise(self, weight: Tensor, eps: float) -> Tensor:
        """Adds the sum; returns the normalised rows [N, hidden]."""
        return add_sum(self.x, weight, eps, self.peers)

    def add(self) -> Tensor:
        """Adds the sum; returns the rows [N, hidden], which need not lie in x."""
        return add_sum(self.x, None, 0.0, self.peers)


def linear_and_sum(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | PendingSum | None, tp: TensorParallel
) -> Tensor | PendingSum:
    """residual + the sum over ranks of x W^T, + bias: x [N, in / ranks], residual [N, out], changed in place.

    The norm that read the residual before x was computed has added the sum that was pending there. Without a residual
    the sum is made at once, for what must see it whole.
    """
    if residual is None:
        return linear_sum(x, weight, bias, tp)
    stream = residual.x if isinstance(residual, PendingSum) else residual
    own_bias = bias if tp.rank == 0 else None
    peers = tp.next_peers(len(x), weight)
    if peers is None:
        return stream.add_(tp.all_reduce(linear(x, weight, own_bias)))
    send_linear(x, weight, own_bias, peers)
    return PendingSum(stream, peers)


def linear_sum(x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel) -> Tensor:
    """The sum over ranks of x W^T, + bias, made at once: x [N, in / ranks]."""
    y = linear_and_sum(x, weight, bias, x.new_zeros(len(x), len(weight)), tp)
    return y.add() if isinstance(y, PendingSum) else y


def add_parts(part: Tensor, residual: Tensor | PendingSum, tp: TensorParallel) -> Tensor | PendingSum:
    """residual + the sum over ranks of their parts: both [N, out], as `linear_and_sum` of what was computed."""
    stream = residual.x if isinstance(residual, PendingSum) else residual
    peers = tp.next_peers(len(part))
    if peers is None:
        return stream.add_(tp.all_reduce(part))
    send_part(part, peers)
    return PendingSum(stream, peers)
