"""Programmatic dependent launch: a kernel may start while the previous kernel still runs, prepare everything that does
not depend on it (addresses, weights), then wait for its end. This hides most of the gap between the small kernels of a
decode step.

Correctness rule: every program of every kernel calls `wait_for_inputs` before it reads the result of another kernel and
before it writes anything. Therefore, when a kernel has ended, all kernels before it have ended.
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
    """Let the next kernel start, then wait for the end of the previous kernel."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
