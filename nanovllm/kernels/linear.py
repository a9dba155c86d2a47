"""Linear layers with what surrounds them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.kernels.silu_and_mul import silu_and_mul


def linear(x, weight, bias=None, norm=None, eps=0.0, residual=None, gated=False):  # noqa: ANN001, ANN201
    """Placeholder."""
    if norm is not None:
        x = rms_norm(x, norm, eps)
    if gated:
        x = silu_and_mul(x)
    if residual is None:
        return F.linear(x, weight, bias)
    if bias is not None:
        residual = residual + bias
    return torch.addmm(residual, x, weight.t())
