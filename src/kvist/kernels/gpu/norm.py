"""Residual add and RMSNorm: one program per row; the row stays in registers between the two passes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.gpu.launch import has_dependent_launch, wait_for_inputs


@triton.jit
def _add_rms_norm(
    x, residual, weight, normed, total, x_stride, num_columns, eps, ADD: tl.constexpr, BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(DEPENDENT)
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    if ADD:
        value += tl.load(residual + row * num_columns + columns, mask=inside, other=0.0)
        tl.store(total + row * num_columns + columns, value, mask=inside)
    value = value.to(tl.float32)
    mean_square = tl.sum(value * value, axis=0) / num_columns
    result = value * (1.0 / tl.sqrt(mean_square + eps)) * scale
    tl.store(normed + row * num_columns + columns, result.to(normed.dtype.element_ty), mask=inside)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    num_rows, num_columns = x.shape
    normed = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(normed)
    block = triton.next_power_of_2(num_columns)
    dependent = has_dependent_launch(x.device)
    if num_rows:
        _add_rms_norm[(num_rows,)](
            x, residual, weight, normed, total, x.stride(0), num_columns, eps, residual is not None, block, dependent,
            num_warps=min(16, max(4, block // 512)), launch_pdl=dependent,
        )  # fmt: skip
    return normed, total
