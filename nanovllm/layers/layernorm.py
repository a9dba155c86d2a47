"""Root-mean-square layer normalisation (arXiv 1910.07467)."""

from typing import NamedTuple

from torch import Tensor, nn

from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.layers.residual import Residual
from nanovllm.parallel.row_parallel import PendingSum
from nanovllm.parallel.tensor_parallel import TensorParallel


class Normalised(NamedTuple):
    """x / sqrt(mean(x^2) + eps) * weight of the rows of x [N, size], not computed yet.

    The product that reads it computes it on the way, so that no normalised copy need go through memory.
    """

    x: Tensor
    weight: Tensor
    eps: float

    def compute(self) -> Tensor:
        """The normalised rows."""
        return rms_norm(self.x, self.weight, self.eps)


class RMSNorm(nn.Module):
    """Normalises rows [N, size] with a weight [size]."""

    def __init__(self, size: int, eps: float, tp: TensorParallel) -> None:
        super().__init__()
        self.eps = eps
        self.weight = tp.parameter(size)

    def forward(self, x: Residual) -> Normalised | Tensor:
        """With several ranks, whoever receives their parts of a sum normalises what they come to at once."""
        if isinstance(x, PendingSum):
            return x.add_and_normalise(self.weight, self.eps)
        return Normalised(x, self.weight, self.eps)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the normalised rows of x, in place of the residual; of what all ranks have."""
        return rms_norm(x, self.weight, self.eps, residual)
