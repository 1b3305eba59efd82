"""Computes how fast each dimension of a head rotates with its position. kernels/rotary.py does the rotation.

Angles are computed for the positions of each step: for few positions this is cheaper than a table of the whole context,
and it has no length limit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvist.models.config import DividedRope, LinearRope, Llama3Rope, ModelConfig, YarnRope


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Return the radians per position, [head_dim / 2], fp32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if isinstance(scaling, LinearRope):
        return frequencies / scaling.factor
    if isinstance(scaling, DividedRope):
        return frequencies / torch.tensor(scaling.divisors)
    if isinstance(scaling, Llama3Rope):
        return _llama3(frequencies, scaling)
    if isinstance(scaling, YarnRope):
        return _yarn(frequencies, scaling, config.rope_theta)
    return frequencies


def rotation_scale(config: ModelConfig) -> float:
    """Return the factor of the sines and cosines, and so of q and k."""
    return config.rope_scaling.attention_factor if isinstance(config.rope_scaling, YarnRope) else 1.0


def _llama3(frequencies: Tensor, scaling: Llama3Rope) -> Tensor:
    """Slow down wavelengths above original/low, keep those below original/high, and blend in between."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return frequencies * keep + frequencies / scaling.factor * (1.0 - keep)


def _yarn(frequencies: Tensor, scaling: YarnRope, theta: float) -> Tensor:
    head_dim = 2 * len(frequencies)

    def dimension_with(turns: float) -> float:
        """Return the pair of dimensions that makes `turns` rotations over the original context."""
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = dimension_with(scaling.beta_fast), dimension_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    slowed = ((torch.arange(len(frequencies), dtype=torch.float32) - first) / width).clamp(0.0, 1.0)
    return frequencies / scaling.factor * slowed + frequencies * (1.0 - slowed)
