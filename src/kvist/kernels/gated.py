"""The gated pair of an MLP at more rows than kernels/skinny.py is for, on Hopper: SiLU(x G^T) * (x U^T) in one kernel.

cuBLAS writes both products and reads them again for the gate, and most of its tiles fit no number of rows between 129
and 256. Measured on an H200: docs/performance.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from kvist.kernels.gpu import cuda, gated

logger = logging.getLogger(__name__)

GatedProduct = Callable[[Tensor], Tensor | None]


def make_gated_product(weight: Tensor) -> GatedProduct | None:
    """weight [2 * n, in_features], G over U, kept and not copied. The product takes x [num_rows, in_features] and gives
    [num_rows, n], or None where cuBLAS is quicker (its twin is `skinny_gated_torch`).

    None where the kernel does not run at all: it wants Hopper, 16-bit numbers, n and in_features multiples of 8, tiles
    that fill the multiprocessors, and the compiler that torch brings.
    """
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) != (9, 0):
        return None
    if weight.dtype not in (torch.bfloat16, torch.float16) or weight.shape[0] % 16 or weight.shape[1] % 8:
        return None
    # Two multiprocessors run a cluster. Where no weight fills them, nothing is compiled.
    if not gated.fills_gpu(weight.shape[0], torch.cuda.get_device_properties(weight.device).multi_processor_count // 2):
        return None
    if (reason := cuda.missing_library()) is not None:
        logger.warning("gate and up stay with cuBLAS: %s", reason)
        return None
    return gated.GatedProduct(weight)
