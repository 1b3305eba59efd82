"""The two steps between any two blocks of a decoder: residual add and RMSNorm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (RMSNorm(x + residual) * weight, x + residual); x, residual [num_rows, hidden_size], weight
    [hidden_size]."""
    if not x.is_cuda:
        return add_rms_norm_torch(x, residual, weight, eps)
    from kvist.kernels.gpu import norm

    return norm.add_rms_norm(x, residual, weight, eps)


def add_rms_norm_torch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total
