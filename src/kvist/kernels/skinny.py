"""Matrix products of few rows, where reading the weight is all the work: y = x W^T + b, and the gated pair of an MLP.

Above `LINEAR_ROWS` and `GATED_ROWS` rows, cuBLAS or, for the gated pair on Hopper, kernels/gated.py is faster, and
callers use that. Measured on an H200 for the matrices of Qwen2-7B in bf16, in microseconds, each kernel launched many
times in a row; for the gated pair cuBLAS is followed by a SiLU x up kernel:

    rows            1        2        8       16
              ours lib ours lib ours lib ours lib
    qkv        9.1  11   12  11   12  11   12  11
    o          7.3  11   10  11   10  11   10  11
    gated       64  73   70  73   70  75   71  75
    down        33  39   42  40   41  40   39  41
    head       272 274  276 256  278 257  276 261

At 32 rows the gated pair takes 68 and cuBLAS 74; at 64 rows, 77 and 75.

All matrices of a step (28 layers, 14.14 GB) as models/linear.py runs them, with SiLU, against cuBLAS without SiLU:
3.30 ms and 3.94 ms at one row, 3.77 and 3.93 at two, 3.83 and 3.99 at sixteen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.kernels.activation import silu_mul_torch

LINEAR_ROWS = 1
GATED_ROWS = 32


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x [num_rows <= 32, in_features], weight [out_features, in_features] -> [num_rows, out_features]."""
    if not x.is_cuda:
        return skinny_linear_torch(x, weight, bias, out_dtype)
    from kvist.kernels.gpu import skinny

    return skinny.linear(x, weight, bias, out_dtype)


def skinny_linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    product = x.float() @ weight.float().t()
    return (product if bias is None else product + bias.float()).to(out_dtype)


def skinny_gated(x: Tensor, weight: Tensor) -> Tensor:
    """Return SiLU(x G^T) * (x U^T), [num_rows, n]. `weight` [2 * n, in_features] is G over U."""
    if not x.is_cuda:
        return skinny_gated_torch(x, weight)
    from kvist.kernels.gpu import skinny

    return skinny.gated(x, weight)


def skinny_gated_torch(x: Tensor, weight: Tensor) -> Tensor:
    return silu_mul_torch(F.linear(x.float(), weight.float())).to(x.dtype)
