"""Counts the cores that this process may use: fewer than the machine has, in a container or under `taskset`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> frozenset[int]:
    """Return the CPUs that this process may use; empty on systems without CPU affinity."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def num_usable_cores(quota: Path = _QUOTA) -> int:
    """Return the number of cores that this process can use now.

    A container with a CPU set or a quota has fewer cores than the machine. Additional threads would wait for each
    other, or be throttled for the rest of each period."""
    num_cores = len(usable_cores()) or os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no quota ("max")
        time_us, period_us = map(int, quota.read_text().split())
        num_cores = min(num_cores, max(1, -(-time_us // period_us)))
    return num_cores
