"""Rotary embeddings for more positions than a model was trained with: what config.json's kinds make of frequencies.

Kinds that look at the length of a text look at the longest one that the engine takes (`max_model_len`), where
transformers looks at each text as it grows. So the two agree for "dynamic" as long as max_model_len is within the
positions of the training; for "longrope" where max_model_len and the text are both within them, or both beyond.
"""

import math

import torch
from torch import Tensor

from nanovllm.checkpoint.rope import Rope


def scale_frequencies(rope: Rope, frequencies: Tensor, exponents: Tensor, max_positions: int) -> Tensor:
    """Frequencies theta ** -exponents, float64 [rotary_dim / 2], as a kind that is not "default" has them.

    The kinds, by the names of config.json:
        linear: positions are brought within the trained ones (position interpolation, arXiv 2306.15595).
        dynamic: theta grows with the positions beyond the trained ones ("NTK-aware" scaling, here with the length
            known; YaRN's paper, section 3.3).
        yarn: see `yarn_interpolated` (arXiv 2309.00071).
        longrope: a factor for each frequency, found by a search; of two lists, the one for the length (arXiv
            2402.13753).
        llama3: see `llama3_kept` (Hugging Face's documentation of that kind).
    """
    dim = 2 * len(frequencies)
    trained = rope.original_max_position_embeddings
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "dynamic":
        growth = 1 + rope.factor * (max(max_positions, trained) / trained - 1)
        return (rope.theta * growth ** (dim / (dim - 2))) ** -exponents
    if rope.kind == "yarn":
        interpolated = yarn_interpolated(rope, dim)
        return frequencies * (1 - interpolated + interpolated / rope.factor)
    if rope.kind == "longrope":
        factors = rope.long_factor if max_positions > trained else rope.short_factor
        return frequencies / torch.tensor(factors, dtype=torch.float64, device="cpu")
    kept = llama3_kept(rope, frequencies)
    return frequencies * (kept + (1 - kept) / rope.factor)


def yarn_interpolated(rope: Rope, dim: int) -> Tensor:
    """How much of each frequency is interpolated: nothing of those with many turns over the trained positions.

    None of those with more than `beta_fast` turns, all of those with fewer than `beta_slow`, and linearly between.
    """

    def pair_with(turns: float) -> float:
        wavelength = rope.original_max_position_embeddings / turns
        return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)  # dim - 1, though there are but dim / 2 pairs: as it was published
    width = last - first or 0.001
    return ((torch.arange(dim // 2, dtype=torch.float64, device="cpu") - first) / width).clamp(0, 1)


def llama3_kept(rope: Rope, frequencies: Tensor) -> Tensor:
    """How much of each frequency stays as it is; the rest is interpolated.

    All of those with more than `high_freq_factor` turns over the trained positions, none of those with fewer than
    `low_freq_factor`, and linearly in the turns between.
    """
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    return ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
