"""Matrix products of few rows, where reading the weight is all the work: y = x W^T + b, and the gated pair of an MLP.

`SKINNY_ROWS` says up to how many rows these kernels are quicker than the library (bench/bench_kernels.py prints the
table); callers use the library's product above it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.kernels.activation import silu_mul_torch

SKINNY_ROWS = 4


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x [num_rows <= SKINNY_ROWS, in_features], weight [out_features, in_features] -> [num_rows, out_features]."""
    if not x.is_cuda:
        return skinny_linear_torch(x, weight, bias, out_dtype)
    from kvist.kernels.gpu import skinny

    return skinny.linear(x, weight, bias, out_dtype)


def skinny_linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    product = x.float() @ weight.float().t()
    return (product if bias is None else product + bias.float()).to(out_dtype)


def skinny_gated(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU(x G^T) * (x U^T), weight [2 * n, in_features] being G over U -> [num_rows, n]."""
    if not x.is_cuda:
        return skinny_gated_torch(x, weight)
    from kvist.kernels.gpu import skinny

    return skinny.gated(x, weight)


def skinny_gated_torch(x: Tensor, weight: Tensor) -> Tensor:
    return silu_mul_torch(F.linear(x.float(), weight.float())).to(x.dtype)
