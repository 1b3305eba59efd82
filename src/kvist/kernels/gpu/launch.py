"""Programmatic dependent launch: a kernel may start while the one before it still runs, prepare what does not depend
on it (addresses, weights), then wait for it. It hides most of the gap between the small kernels of a decode step.

The rule that keeps it right: every program of every kernel calls `wait_for_inputs` before it reads what another kernel
wrote, or writes anything at all. So when a kernel has ended, all kernels before it have.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def has_dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_inputs(DEPENDENT: tl.constexpr):
    """Lets the next kernel start, then waits for the end of the one before."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
