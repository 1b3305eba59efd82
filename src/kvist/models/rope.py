"""How fast each dimension of a head turns with its position. The turning itself is kernels/rotary.py.

Angles are computed for the positions of each step: for the few positions of a step this costs less than a table of
the whole context, and it has no limit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvist.models.config import DividedRope, LinearRope, Llama3Rope, ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position, [head_dim / 2], fp32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if isinstance(scaling, LinearRope):
        return frequencies / scaling.factor
    if isinstance(scaling, DividedRope):
        return frequencies / torch.tensor(scaling.divisors)
    if isinstance(scaling, Llama3Rope):
        return _llama3(frequencies, scaling)
    return frequencies


def _llama3(frequencies: Tensor, scaling: Llama3Rope) -> Tensor:
    """Wavelengths beyond original/low are slowed down, those under original/high are kept, between them a blend."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return frequencies * keep + frequencies / scaling.factor * (1.0 - keep)
