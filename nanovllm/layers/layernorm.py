"""Root-mean-square layer normalisation (arXiv 1910.07467)."""

from torch import nn

from nanovllm.parallel.tensor_parallel import TensorParallel


class RMSNorm(nn.Module):
    """The weight [size] and epsilon of x / sqrt(mean(x^2) + eps) * weight.

    The kernel that reads x applies it on the way, so that no normalised copy need go through memory.
    """

    def __init__(self, size: int, eps: float, tp: TensorParallel) -> None:
        super().__init__()
        self.eps = eps
        self.weight = tp.parameter(size)
