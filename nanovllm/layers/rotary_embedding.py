"""Tables of rotary position embeddings (RoFormer, arXiv 2104.09864); the kernel that stores KV applies them."""

import math

import torch

from nanovllm.checkpoint.model_config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Angle per position of each pair of dimensions, float64 [head_dim / 2].

    With Llama 3's scaling, long wavelengths are stretched by `factor` and those between the two wavelength limits in
    part (Hugging Face's documentation of rope type "llama3").
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu") / config.head_dim
    frequencies = config.rope_theta**-exponents
    if not (scaling := config.rope_scaling):
        return frequencies
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def rotary_table(config: ModelConfig, max_positions: int, device: torch.device) -> torch.Tensor:
    """cos | sin of every position's angles, float32 [max_positions, head_dim]."""
    positions = torch.arange(max_positions, dtype=torch.float64, device="cpu")
    angles = positions[:, None] * inverse_frequencies(config)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(device, torch.float32)
