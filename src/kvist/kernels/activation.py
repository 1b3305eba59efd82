"""The gate of a gated MLP: SiLU(gate) * up, over the fused product of both."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [num_rows, 2 * n], gate first -> [num_rows, n]."""
    if not gate_up.is_cuda:
        return silu_mul_torch(gate_up)
    from kvist.kernels.gpu import activation

    return activation.silu_mul(gate_up)


def silu_mul_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
