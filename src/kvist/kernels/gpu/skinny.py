"""Skinny products: each program owns a few rows of the weight and streams them past all rows of x.

One row of x is multiplied on the ordinary cores. The program loads the first block of the weight before it waits for
the kernel that writes x, so that reading the weight never stops between kernels. More rows use the tensor cores, padded
to 16 or 32 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.gpu.launch import has_dependent_launch, wait_for_inputs

TILE_ROWS = 16
MAX_ROWS = 2 * TILE_ROWS


@dataclass(frozen=True, slots=True)
class Tiling:
    outputs: int  # weight rows per program
    block: int  # columns per iteration
    num_warps: int
    num_stages: int = 1  # blocks in flight, for tensor cores


@triton.jit
def _read(start, column, IN: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(start + column)
    return tl.load(start + column, mask=column < IN, other=0.0)


@triton.jit
def _row_product(
    x, weight, bias, out, num_outputs,
    IN: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
    GATED: tl.constexpr, BIASED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, BLOCK)[None, :]
    # Rows beyond the end read the last row and are not stored, so that weight loads need no mask.
    start = weight + tl.minimum(output, num_outputs - 1).to(tl.int64)[:, None] * IN
    start_up = start + num_outputs.to(tl.int64) * IN  # the second half of a gated weight
    total = tl.zeros((OUTPUTS, BLOCK), dtype=tl.float32)
    total_up = tl.zeros((OUTPUTS, BLOCK), dtype=tl.float32)
    w = _read(start, column, IN, EVEN)
    w_up = w
    if GATED:
        w_up = _read(start_up, column, IN, EVEN)
    wait_for_inputs(DEPENDENT)
    for first in tl.range(0, IN - BLOCK, BLOCK):
        values = tl.load(x + first + column).to(tl.float32)
        total += w.to(tl.float32) * values
        w = _read(start, first + BLOCK + column, IN, EVEN)
        if GATED:
            total_up += w_up.to(tl.float32) * values
            w_up = _read(start_up, first + BLOCK + column, IN, EVEN)
    values = _read(x, (IN - 1) // BLOCK * BLOCK + column, IN, EVEN).to(tl.float32)
    result = tl.sum(total + w.to(tl.float32) * values, axis=1)
    if BIASED:
        result += tl.load(bias + tl.minimum(output, num_outputs - 1)).to(tl.float32)
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * tl.sum(total_up + w_up.to(tl.float32) * values, axis=1)
    tl.store(out + output, result.to(out.dtype.element_ty), mask=output < num_outputs)


@triton.jit
def _tile_product(
    x, weight, bias, out, x_stride, num_rows, num_outputs,
    IN: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    kept = tl.minimum(output, num_outputs - 1)
    start = weight + kept.to(tl.int64)[None, :] * IN
    start_up = start + num_outputs.to(tl.int64) * IN
    x_start = x + row[:, None] * x_stride
    present = row[:, None] < num_rows
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    total_up = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    wait_for_inputs(DEPENDENT)
    for first in tl.range(0, IN, BLOCK, num_stages=STAGES):
        at = first + column
        values = tl.load(x_start + at[None, :], mask=present if EVEN else present & (at < IN)[None, :], other=0.0)
        total = tl.dot(values, _read(start, at[:, None], IN, EVEN), total, input_precision="ieee")
        if GATED:
            total_up = tl.dot(values, _read(start_up, at[:, None], IN, EVEN), total_up, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + kept).to(tl.float32)[None, :]
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * total_up
    keep = present & (output < num_outputs)[None, :]
    tl.store(out + row[:, None] * num_outputs + output[None, :], total.to(out.dtype.element_ty), mask=keep)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return launch(x, weight, bias, out_dtype, gated=False, tiling=_linear_tiling(x.shape[0], weight))


def gated(x: Tensor, weight: Tensor) -> Tensor:
    return launch(x, weight, None, x.dtype, gated=True, tiling=_gated_tiling(x.shape[0], weight))


# The fastest of 15 to 18 tilings on an H200; figures in kernels/skinny.py.


def _linear_tiling(num_rows: int, weight: Tensor) -> Tiling:
    if num_rows > 1:
        return Tiling(16, 512, 2, 3)
    num_out, num_in = weight.shape
    return Tiling(2, 1024, 2) if num_out <= num_in else Tiling(2, 512, 2)


def _gated_tiling(num_rows: int, weight: Tensor) -> Tiling:
    if num_rows > 1:
        return Tiling(32, 128, 2, 4)
    return Tiling(1, 4096, 4) if 2048 < weight.shape[1] <= 4096 else Tiling(2, 512, 2)


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, *, gated: bool, tiling: Tiling
) -> Tensor:
    num_rows, num_in = x.shape
    num_outputs = weight.shape[0] // (2 if gated else 1)
    assert x.stride(1) == 1, "a row of x is contiguous"
    assert weight.is_contiguous()
    out = torch.empty((num_rows, num_outputs), dtype=out_dtype, device=x.device)
    dependent = has_dependent_launch(x.device)
    grid = (triton.cdiv(num_outputs, tiling.outputs),)
    is_even, is_biased = num_in % tiling.block == 0, bias is not None
    if num_rows == 1:
        _row_product[grid](
            x, weight, bias, out, num_outputs,
            num_in, tiling.outputs, tiling.block, is_even, gated, is_biased, dependent,
            num_warps=tiling.num_warps, launch_pdl=dependent,
        )  # fmt: skip
        return out
    assert num_rows <= MAX_ROWS
    rows = TILE_ROWS if num_rows <= TILE_ROWS else MAX_ROWS
    _tile_product[grid](
        x, weight, bias, out, x.stride(0), num_rows, num_outputs,
        num_in, rows, tiling.outputs, tiling.block, tiling.num_stages, is_even, gated, is_biased, dependent,
        num_warps=tiling.num_warps, launch_pdl=dependent,
    )  # fmt: skip
    return out
