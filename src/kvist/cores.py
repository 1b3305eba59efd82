"""How many cores this process may use; and keeps a GPU's engine and its gateway off each other's cores.

Both are one busy thread and some helpers. Where they share a core, or the two threads of one, planning a step waits
for somebody's stream, and the GPU for the plan. So the usable cores are split in halves: every other physical core of
each package is the engines', the rest the gateways'. All workers of a host come to the same halves without asking each
other; within them the system places threads as it likes, so no choice of ours can put two engines on one core.

The engine decides, once it is warm (loading may use every core), and binds itself; its parent binds itself to what the
engine announces, and takes all cores again while the next engine loads. Started under `taskset` or `numactl`, both stay
within the cores that those left them. Nothing is bound where there is no GPU, where cores are few, or where the system
does not say how they lie.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

MIN_CORES = 8  # fewer are better left to the system
MIN_ENGINE_CORES = 4  # for each engine of the host: its loop, and threads that move bytes
_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")

logger = logging.getLogger(__name__)

Place = tuple[int, int]  # package, physical core; a core has two CPUs where it runs two threads


def usable_cores() -> frozenset[int]:
    """CPUs that this process may use; empty where the system has no such thing as affinity."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def num_usable_cores(quota: Path = _QUOTA) -> int:
    """Fewer than the machine has, in a container with a CPU set or a quota: more threads than that wait for each other,
    or are stopped for the rest of each period. As of now: threads may have been bound meanwhile."""
    num_cores = len(usable_cores()) or os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2; "max" is no number
        time_us, period_us = map(int, quota.read_text().split())
        num_cores = min(num_cores, max(1, -(-time_us // period_us)))
    return num_cores


def read_places(cores: Collection[int], cpus: Path = _CPUS) -> dict[int, Place]:
    """Empty when the system does not say."""
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
    """(the engines' CPUs, the gateways'). Both threads of a core are on one side, and a package is on both."""
    engines: set[Place] = set()
    for package in {package for package, _ in places.values()}:
        engines |= set(sorted({place for place in places.values() if place[0] == package})[::2])
    mine = frozenset(core for core, place in places.items() if place in engines)
    return mine, frozenset(places) - mine


def separate(num_engines: int) -> frozenset[int]:
    """Binds this engine, one of so many on this host. Returns the gateway's cores, none when nothing was bound."""
    cores = usable_cores()
    engine, gateway = split(read_places(cores)) if len(cores) >= MIN_CORES else (frozenset[int](), frozenset[int]())
    if not gateway or len(engine) < MIN_ENGINE_CORES * num_engines or not bind_process(engine):
        return frozenset()
    logger.info("the engine runs on cores %s, its gateway on %s", sorted(engine), sorted(gateway))
    return gateway


def bind_process(cores: Collection[int]) -> bool:
    """Every thread of this process; threads to come inherit it. Whether the system allowed it."""
    try:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(int(thread), cores)
    except OSError as error:
        logger.warning("cannot bind this process to cores %s: %s", sorted(cores), error)
        return False
    return True
