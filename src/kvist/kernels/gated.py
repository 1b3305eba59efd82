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
    """weight [2 * n, in_features], G over U, referenced and not copied. The product maps x [num_rows, in_features] to
    [num_rows, n], or returns None where cuBLAS is faster (its twin is `skinny_gated_torch`).

    Returns None where the kernel cannot run: it needs Hopper, a 16-bit type, n and in_features multiples of 8, tiles
    that fill the multiprocessors, and the compiler that torch includes.
    """
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) != (9, 0):
        return None
    if weight.dtype not in (torch.bfloat16, torch.float16) or weight.shape[0] % 16 or weight.shape[1] % 8:
        return None
    # A cluster runs on two multiprocessors. A weight that does not fill them needs no compilation.
    if not gated.fills_gpu(weight.shape[0], torch.cuda.get_device_properties(weight.device).multi_processor_count // 2):
        return None
    if (reason := cuda.missing_library()) is not None:
        logger.warning("the MLP's gate and up products use cuBLAS, not the faster kernel: %s", reason)
        return None
    return gated.GatedProduct(weight)
