"""One matrix product by the fastest method of the device: y = x W^T + b.

On CPUs oneDNN packs the weight once, and the plain form is dropped; batches below four rows are padded to four, where
the packed kernel is fastest per call. Measured on 2 cores of an AMD EPYC (Zen 4, AVX-512, bf16 instructions)
with torch 2.13: milliseconds for all 121 matrices of one SmolLM2-135M step, by number of rows;
best of 3 to 8. Packed results below 16 rows are from a second run (in the first run 1 and 2 rows were up to a third
slower).

    fp32, threads    rows: 1     2     3     4     8    16    64   256
    F.linear        1     64   162   143    82    87   111   301   988
    w @ x.t()       1     66    54    74    47    79   114   261   923
    packed          1     41    55    46    44    54    67   200   719
    packed, padded  1     37    42    48     -     -     -     -     -
    F.linear        2     57    89   114    74    66    85   165   608
    w @ x.t()       2     53    30    35    37    41    63   141   480
    packed          2     36    40    39    21    33    52    96   373
    packed, padded  2     32    26    26     -     -     -     -     -
    bf16
    F.linear        2     28    23    28    28    30    36    70   295
    packed          2     20    21    20    15    21    20    55   184
    packed, padded  2     18    23    22     -     -     -     -     -

With more threads than free cores every product waits for a thread that is not scheduled, and OpenMP spins meanwhile: a
step of 1 or 8 rows took 630 to 1560 ms with two threads, 48 to 140 with two and OMP_WAIT_POLICY=passive, 54 to 112
with one (single runs; other programs kept both cores busy to a varying degree).

On GPUs a few rows use our own kernels (kernels/skinny.py), more rows cuBLAS, and gated products on Hopper our own
kernel (kernels/gated.py).

The hint for packing (expected rows) hardly matters: 4, 8, 16 and 32 are within the noise of each other.

oneDNN compiles a kernel of half a megabyte for each pair of a weight's shape and a number of rows, and caches a
thousand kernels; torch has a second cache of the same size. The number of rows changes from step to step, so both
caches are limited to `MAX_COMPILED_KERNELS`: compiling the 5 kernels of a step takes 2 to 3 ms, below 2% of any step
with many rows.
"""

from __future__ import annotations

import os
from functools import singledispatch
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.kernels.activation import silu_mul
from kvist.kernels.gated import make_gated_product
from kvist.kernels.skinny import GATED_ROWS, LINEAR_ROWS, skinny_gated, skinny_linear
from kvist.models.formats import PlainWeight, Weight

PACK_ROWS_HINT = 16
MIN_PACKED_ROWS = 4
MAX_COMPILED_KERNELS = 32


class Linear(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """x [num_rows, in_features] -> [num_rows, out_features], in the dtype of x unless `out_dtype` was given."""


class PlainLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight  # [out_features, in_features]
        self._bias = bias  # [out_features]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """A weight packed by oneDNN. The result of a row depends on the other rows only by rounding."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS_HINT)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        if num_rows < MIN_PACKED_ROWS:
            x = F.pad(x, (0, 0, 0, MIN_PACKED_ROWS - num_rows))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._packed, self._bias, "none", [], "")
        return y[:num_rows]


class GpuLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
        self._weight = weight.contiguous()
        self._bias = bias
        self._out_dtype = out_dtype

    def __call__(self, x: Tensor) -> Tensor:
        if 0 < x.shape[0] <= LINEAR_ROWS:
            return skinny_linear(x, self._weight, self._bias, self._out_dtype)
        if self._out_dtype is x.dtype:
            return F.linear(x, self._weight, self._bias)
        product = torch.mm(x, self._weight.t(), out_dtype=self._out_dtype)  # fp32 sums, not rounded to 16 bits
        return product if self._bias is None else product + self._bias


class WideGatedLinear:
    """The whole product, then the gate."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        return silu_mul(self._linear(x))


class GpuGatedLinear:
    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.contiguous()
        self._product = make_gated_product(self._weight)

    def __call__(self, x: Tensor) -> Tensor:
        if 0 < x.shape[0] <= GATED_ROWS:
            return skinny_gated(x, self._weight)
        gated = self._product(x) if self._product else None
        return silu_mul(F.linear(x, self._weight)) if gated is None else gated


@singledispatch
def make_linear(weight: Weight, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None) -> Linear:
    """Make the product for the weight's format, device and dtype. The caller must not keep `weight`: packing replaces
    it. `out_dtype`: a result more precise than x; only GPUs support it, CPUs ignore it. A format registers its product
    by its class of weights."""
    raise NotImplementedError(f"no product is registered for {type(weight).__name__}, {bias=}, {out_dtype=}")


@make_linear.register
def _(weight: PlainWeight, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None) -> Linear:
    values = weight.values
    if values.is_cuda:
        return GpuLinear(values, bias, out_dtype or values.dtype)
    if values.device.type == "cpu" and _can_pack(values.dtype):
        _bound_compiled_kernels()
        return PackedLinear(values, bias)
    return PlainLinear(values, bias)


@singledispatch
def make_gated_linear(weight: Weight) -> Linear:
    """Make the map x [num_rows, in_features] -> SiLU(x G^T) * (x U^T). `weight` is G over U; the caller must not keep
    it. A format with a fused product registers it; otherwise the gate follows the product."""
    return WideGatedLinear(make_linear(weight))


@make_gated_linear.register
def _(weight: PlainWeight) -> Linear:
    return GpuGatedLinear(weight.values) if weight.values.is_cuda else WideGatedLinear(make_linear(weight))


def _bound_compiled_kernels() -> None:
    """Limit the kernel caches of oneDNN and torch, which read these variables once, before their first kernel."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(MAX_COMPILED_KERNELS))


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch._C._has_mkldnn:
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32
