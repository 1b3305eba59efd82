"""Counts the cores this process may use, and binds a GPU's engine and its gateway to separate cores.

Engine and gateway each have one busy thread and some helpers. If they share a core, or the two hardware threads of one,
planning a step waits for a stream, and the GPU waits for the plan. Therefore the usable cores are split in two halves:
every other physical core of each package for the engines, the rest for the gateways. All workers of a host compute the
same halves without communication; within a half the operating system places the threads.

The engine splits the cores after warm-up (loading may use every core) and binds itself; its parent binds itself to the
cores that the engine reports, and uses all cores again while the next engine loads. Under `taskset` or `numactl` both
stay within the cores allowed there. Nothing is bound without a GPU, with few cores, or if the system does not report
its core topology.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

MIN_CORES = 8  # with fewer cores the operating system places threads better
MIN_ENGINE_CORES = 4  # per engine of the host: its loop, and threads that copy bytes
_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")

logger = logging.getLogger(__name__)

Place = tuple[int, int]  # package, physical core; a core with two hardware threads has two CPUs


def usable_cores() -> frozenset[int]:
    """Return the CPUs that this process may use; empty on systems without CPU affinity."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def num_usable_cores(quota: Path = _QUOTA) -> int:
    """Return the number of cores this process can use now; a later binding may change the number.

    A container with a CPU set or a quota has fewer cores than the machine. Additional threads would wait for each
    other, or be throttled for the rest of each period."""
    num_cores = len(usable_cores()) or os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no quota ("max")
        time_us, period_us = map(int, quota.read_text().split())
        num_cores = min(num_cores, max(1, -(-time_us // period_us)))
    return num_cores


def read_places(cores: Collection[int], cpus: Path = _CPUS) -> dict[int, Place]:
    """Return the place of each core; empty if the system does not report it."""
    places = {}
    try:
        for core in cores:
            topology = cpus / f"cpu{core}" / "topology"
            siblings = re.split("[,-]", (topology / "thread_siblings_list").read_text())
            places[core] = int((topology / "physical_package_id").read_text()), int(siblings[0])
    except (OSError, ValueError):
        return {}
    return places


def split(places: Mapping[int, Place]) -> tuple[frozenset[int], frozenset[int]]:
    """Return (CPUs of the engines, CPUs of the gateways). Both threads of a core are in one half; a package is in
    both."""
    engines: set[Place] = set()
    for package in {package for package, _ in places.values()}:
        engines |= set(sorted({place for place in places.values() if place[0] == package})[::2])
    mine = frozenset(core for core, place in places.items() if place in engines)
    return mine, frozenset(places) - mine


def separate(num_engines: int) -> frozenset[int]:
    """Bind this engine, one of `num_engines` on this host. Return the gateway's cores; empty if nothing was bound."""
    cores = usable_cores()
    engine, gateway = split(read_places(cores)) if len(cores) >= MIN_CORES else (frozenset[int](), frozenset[int]())
    if not gateway or len(engine) < MIN_ENGINE_CORES * num_engines or not bind_process(engine):
        return frozenset()
    logger.info("the engine runs on cores %s, its gateway on %s", sorted(engine), sorted(gateway))
    return gateway


def bind_process(cores: Collection[int]) -> bool:
    """Bind every thread of this process; new threads inherit the binding. Return whether the system allowed it."""
    try:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # the thread has ended meanwhile
                os.sched_setaffinity(int(thread), cores)
    except OSError as error:
        logger.warning("cannot bind this process to cores %s: %s", sorted(cores), error)
        return False
    return True
