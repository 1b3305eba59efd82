"""Counts the pages, requests, files and processes that a chaos run leaves behind, and finds its longest pauses."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chaos_cluster import ChaosCluster, ChaosFailure, Suspension, num_open_files
from kvist.http_client import HttpFailure

RELEASE_TIMEOUT_S = 20.0  # --gateway-timeout-s, an abort, and a report of each worker
_MAX_MORE_DESCRIPTORS = 16  # of one process: connections that are made on demand
_KILLS, _WORKERS, _GATEWAYS = "beside kills", "beside suspended workers", "beside suspended gateways"
_PAGES = (
    ("kvist:kv_pages", "owned"),
    ("kvist:kv_pages", "in_flight"),
    ("kvist:host_pages", "in_flight"),
)
_REQUESTS = (
    "kvist:gateway_requests_in_flight",
    "kvist:cancelled_requests_held",
    "kvist:num_requests_running",
    "kvist:num_requests_waiting",
)


@dataclass(slots=True, kw_only=True)
class Leaks:
    num_pages: int = 0
    num_requests: int = 0
    num_descriptors: int = 0
    files: list[str] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.num_pages + self.num_requests + self.num_descriptors + len(self.files) + len(self.pids)


async def leaks_of(cluster: ChaosCluster, runtime: Path, stop_timeout_s: float) -> Leaks:
    """Return what idle processes hold, then stop the cluster, and return what is left of it too."""
    leaks = Leaks()
    give_up_s = time.monotonic() + RELEASE_TIMEOUT_S
    while True:
        held = [held_in(await _metrics(cluster, gateway.name)) for gateway in cluster.gateways]
        leaks.num_pages, leaks.num_requests = (max(counts) for counts in zip(*held, strict=True))
        if not (leaks.num_pages or leaks.num_requests) or time.monotonic() > give_up_s:
            break
        await asyncio.sleep(0.5)
    leaks.pids = cluster.leftovers()
    for pid, (name, before) in cluster.descriptors_before.items():
        more = num_open_files(pid) - before if Path(f"/proc/{pid}").exists() else 0
        if more > _MAX_MORE_DESCRIPTORS:
            leaks.num_descriptors += more
            leaks.notes.append(f"{name} has {more} more open files than before the load")
    await cluster.stop(stop_timeout_s)
    leaks.pids += [pid for pid in cluster.leftovers() if pid not in leaks.pids]
    # the empty lock file of a dead epoch stays for some time, so that peers can distinguish "dead" from "unknown"
    leaks.files = [str(path) for path in runtime.rglob("*") if path.is_file() and path.stat().st_size]
    return leaks


async def _metrics(cluster: ChaosCluster, gateway: str) -> str:
    try:
        return await cluster.metrics(gateway)
    except HttpFailure as failure:
        raise ChaosFailure(f"{gateway} is ready and has no metrics: {failure}") from failure


def held_in(metrics: str) -> tuple[int, int]:
    """Return the pages and the requests that a gateway and its workers hold, by the text of its /metrics."""
    values = [(name, labels, float(value)) for name, labels, value in _SAMPLE.findall(metrics)]
    pages = sum(
        value
        for name, labels, value in values
        for page, state in _PAGES
        if name == page and f'state="{state}"' in labels
    )
    return int(pages), int(sum(value for name, _, value in values if name in _REQUESTS))


_SAMPLE = re.compile(r"^(kvist:\w+)(\{[^}]*\})? (\S+)$", re.MULTILINE)


def longest_pauses(gaps: Sequence[tuple[float, float]], suspensions: Sequence[Suspension]) -> Mapping[str, float]:
    """Return the longest of the gaps (begin, end), in seconds, by what happened meanwhile: a gateway was suspended,
    else a worker was, else processes were killed or nothing."""
    longest = {_KILLS: 0.0, _WORKERS: 0.0, _GATEWAYS: 0.0}
    for begin_s, end_s in gaps:
        beside = [each.of_gateway for each in suspensions if begin_s <= each.end_s and each.begin_s <= end_s]
        cause = _GATEWAYS if any(beside) else _WORKERS if beside else _KILLS
        longest[cause] = max(longest[cause], end_s - begin_s)
    return longest
