"""Tables of rotary position embeddings (RoFormer, arXiv 2104.09864); the kernel that stores KV applies them.

Angles are computed in float64: those of far positions are thousands of turns.

A table is made once, for the longest text that the engine takes (`max_model_len`), as cached keys cannot be rotated
anew.
"""

import torch
from torch import Tensor

from nanovllm.checkpoint.rope import Rope
from nanovllm.rope_scaling import scale_frequencies


def inverse_frequencies(rope: Rope, head_dim: int, max_positions: int) -> Tensor:
    """Angle per position of each pair of dimensions that rotates, float64 [rotary_dim / 2].

    That is theta ** -(2 i / rotary_dim), or what a kind makes of it that brings positions within the trained ones.
    """
    dim = rope.rotary_dim(head_dim)
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    frequencies = rope.theta**-exponents
    return frequencies if rope.kind == "default" else scale_frequencies(rope, frequencies, exponents, max_positions)


def rotary_table(rope: Rope | None, head_dim: int, max_positions: int, device: torch.device) -> Tensor:
    """cos | sin of every position's angles, times the attention factor, float32 [max_positions, rotary_dim].

    Where rope is None, that of a layer whose queries and keys do not rotate: all angles are 0.
    """
    positions = torch.arange(max_positions, dtype=torch.float64, device="cpu")
    if rope is None:
        frequencies, scale = torch.zeros(head_dim // 2, dtype=torch.float64, device="cpu"), 1.0
    else:
        frequencies, scale = inverse_frequencies(rope, head_dim, max_positions), rope.attention_factor
    angles = positions[:, None] * frequencies
    return (torch.cat([angles.cos(), angles.sin()], dim=-1) * scale).to(device, torch.float32)
