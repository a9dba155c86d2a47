"""Root-mean-square layer normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import nn

from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.utils.tensor_parallel import TensorParallel


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float, tp: TensorParallel) -> None:
        super().__init__()
        self.eps = eps
        self.weight = tp.parameter(size)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalises x [N, size]; with a residual, x is added to it in place first and both are returned."""
        return rms_norm(x, self.weight, self.eps, residual)
