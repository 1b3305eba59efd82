"""The memory of this host. Does not import torch."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def available_host_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the host memory that the kernel and the cgroup (v2) allow this process to allocate: the cached contents of
    files give way to it."""
    limits: list[int] = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, KeyError, ValueError):  # "max" is not a number
        limit = int((cgroup / "memory.max").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        file_cache = int(stat["inactive_file"]) + int(stat["active_file"])
        limits.append(max(0, limit - int((cgroup / "memory.current").read_text()) + file_cache))
    if not limits and hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=1 << 62)
