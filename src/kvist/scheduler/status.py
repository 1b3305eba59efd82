"""The status of a scheduler, for load reports: queue lengths, pages and counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvist.kv.pages import PageCounts
from kvist.kv.tiers.host import HostCounts
from kvist.lease_messages import LeaseCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStatus:
    num_running: int  # with pages, computing or waiting for a handoff
    num_waiting: int  # without pages
    pages: PageCounts
    totals: Mapping[str, float]  # SCHEDULER_COUNTERS, and the cache's CACHE_COUNTERS
    service_s: float | None = None  # recent mean time from admission to end; None: no request has ended yet
    queue_wait_s: float | None = None  # how long the queue lasts (service_time.py); None: not measured yet
    leases: LeaseCounts = field(default_factory=LeaseCounts)
    host_pages: HostCounts | None = None  # None: there is no host tier
