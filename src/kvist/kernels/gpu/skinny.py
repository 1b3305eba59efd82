"""Skinny products: each program owns a few rows of the weight and streams them past all rows of x.

The weight's first block is asked for before the program waits for the kernel that makes x, so that reading the weight
never stops between kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.gpu.launch import has_dependent_launch, wait_for_inputs


@dataclass(frozen=True, slots=True)
class Tiling:
    outputs: int  # weight rows a program
    block: int  # columns a step
    num_warps: int


@triton.jit
def _product(
    x, weight, bias, out, x_stride, num_rows, num_outputs,
    IN: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, BIASED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    # Rows beyond the end are read from the last one and not stored: no mask on the stream of weights.
    start = tl.minimum(output, num_outputs - 1).to(tl.int64)[:, None] * IN
    x_row = tl.minimum(row, num_rows - 1)[:, None] * x_stride
    upper = num_outputs.to(tl.int64) * IN  # of the second half of a gated weight
    total = tl.zeros((ROWS, OUTPUTS, BLOCK), dtype=tl.float32)
    total_up = tl.zeros((ROWS, OUTPUTS, BLOCK), dtype=tl.float32)
    place = start + column[None, :]
    w = tl.load(weight + place, mask=(column < IN)[None, :], other=0.0)
    if GATED:
        w_up = tl.load(weight + upper + place, mask=(column < IN)[None, :], other=0.0)
    wait_for_inputs(DEPENDENT)
    for first in tl.range(0, IN, BLOCK):
        values = tl.load(x + x_row + (first + column)[None, :], mask=(first + column < IN)[None, :], other=0.0)
        values = values.to(tl.float32)[:, None, :]
        total += w.to(tl.float32)[None, :, :] * values
        after = first + BLOCK + column
        w = tl.load(weight + start + after[None, :], mask=(after < IN)[None, :], other=0.0)
        if GATED:
            total_up += w_up.to(tl.float32)[None, :, :] * values
            w_up = tl.load(weight + upper + start + after[None, :], mask=(after < IN)[None, :], other=0.0)
    result = tl.sum(total, axis=2)
    if BIASED:
        result += tl.load(bias + tl.minimum(output, num_outputs - 1)).to(tl.float32)[None, :]
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * tl.sum(total_up, axis=2)
    keep = (row < num_rows)[:, None] & (output < num_outputs)[None, :]
    tl.store(out + row[:, None] * num_outputs + output[None, :], result.to(out.dtype.element_ty), mask=keep)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return launch(x, weight, bias, out_dtype, gated=False, tiling=_tiling(x.shape[0], weight.shape[1], gated=False))


def gated(x: Tensor, weight: Tensor) -> Tensor:
    return launch(x, weight, None, x.dtype, gated=True, tiling=_tiling(x.shape[0], weight.shape[1], gated=True))


def _tiling(num_rows: int, in_features: int, *, gated: bool) -> Tiling:
    if num_rows > 1:
        return Tiling(1 if gated else 2, 512, 2)
    if gated:
        return Tiling(1, 512, 2)
    return Tiling(4, 1024, 4) if in_features > 8192 else Tiling(2, 512, 2)


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, *, gated: bool, tiling: Tiling
) -> Tensor:
    num_rows, in_features = x.shape
    num_outputs = weight.shape[0] // (2 if gated else 1)
    assert x.stride(1) == 1, "a row of x is one piece"
    assert weight.is_contiguous()
    out = torch.empty((num_rows, num_outputs), dtype=out_dtype, device=x.device)
    dependent = has_dependent_launch(x.device)
    _product[(triton.cdiv(num_outputs, tiling.outputs),)](
        x, weight, bias, out, x.stride(0), num_rows, num_outputs,
        in_features, triton.next_power_of_2(num_rows), tiling.outputs, tiling.block,
        gated, bias is not None, dependent,
        num_warps=tiling.num_warps, launch_pdl=dependent,
    )  # fmt: skip
    return out
