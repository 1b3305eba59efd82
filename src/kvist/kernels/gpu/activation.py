"""SiLU x up, elementwise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.gpu.launch import has_dependent_launch, wait_for_inputs

_BLOCK = 1024


@triton.jit
def _silu_mul(gate_up, out, num_columns, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    wait_for_inputs(DEPENDENT)
    start = gate_up + row * 2 * num_columns
    gate = tl.load(start + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + num_columns + columns, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * num_columns + columns, result.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    num_rows, num_columns = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up = gate_up.contiguous()
    out = torch.empty((num_rows, num_columns), dtype=gate_up.dtype, device=gate_up.device)
    dependent = has_dependent_launch(gate_up.device)
    if num_rows:
        grid = (num_rows, triton.cdiv(num_columns, _BLOCK))
        _silu_mul[grid](gate_up, out, num_columns, _BLOCK, dependent, num_warps=4, launch_pdl=dependent)
    return out
