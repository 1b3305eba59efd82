"""Makes the load reports: the status of this engine and the changes of its cached pages, for every gateway.

Reports are sent `MAX_INTERVAL_S` after the previous ones, and after `MIN_INTERVAL_S` if cached pages have changed or a
gateway needs a snapshot. All gateways get their reports at the same time, so one set of pending changes is enough. A
gateway that is new, or has requested a snapshot, gets every cached page instead of the changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import get_args

from kvist import wire
from kvist.engine.gateways import Gateways
from kvist.kv.changes import PageChanges
from kvist.kv.tiers.host import HostCounts
from kvist.scheduler.status import SchedulerStatus

MIN_INTERVAL_S = 0.05
MAX_INTERVAL_S = 1.0


class LoadReports:
    """Mutable; owned by the engine loop."""

    def __init__(self, *, snapshot: Callable[[], Sequence[wire.PageEvents]]) -> None:
        self._snapshot = snapshot
        self._changes = {tier: PageChanges(tier) for tier in get_args(wire.PageTier)}  # since the last report
        self._last_sent_s = float("-inf")

    def record(self, events: Sequence[wire.PageEvents]) -> None:
        for event in events:
            changes = self._changes[event.tier]
            for digest in event.removed:
                changes.on_removed(digest)
            for digest in event.stored:
                changes.on_stored(digest)

    def make_due(self) -> None:
        """Make the next reports due at once."""
        self._last_sent_s = float("-inf")

    def due_at_s(self, gateways: Gateways) -> float:
        urgent = any(self._changes.values()) or any(gateway.wants_snapshot for gateway in gateways)
        return self._last_sent_s + (MIN_INTERVAL_S if urgent else MAX_INTERVAL_S)

    def make(
        self,
        gateways: Gateways,
        status: SchedulerStatus,
        totals: dict[str, float],
        now_s: float,
        storage: wire.StorageStatus | None = None,
        *,
        draining: bool = False,
    ) -> Iterator[tuple[bytes, wire.LoadReport]]:
        """Make one report per gateway. Exhaust the iterator: the pending changes are in these reports only."""
        events = tuple(event for changes in self._changes.values() for event in changes.take())
        everything: tuple[wire.PageEvents, ...] | None = None
        self._last_sent_s = now_s
        for gateway in gateways:
            if gateway.wants_snapshot and everything is None:
                everything = tuple(self._snapshot())
            report = wire.LoadReport(
                sequence=gateway.next_sequence,
                num_running=status.num_running,
                num_waiting=status.num_waiting,
                num_free_pages=status.pages.free,
                num_cached_pages=status.pages.cached,
                num_owned_pages=status.pages.owned,
                num_in_flight_pages=status.pages.in_flight,
                service_s=status.service_s,
                num_host_pages=_by_state(status.host_pages),
                storage=storage,
                draining=draining,
                snapshot=gateway.wants_snapshot,
                page_events=everything or () if gateway.wants_snapshot else events,
                totals={**status.totals, **totals},
            )
            gateway.next_sequence += 1
            gateway.wants_snapshot = False
            yield gateway.identity, report


def _by_state(counts: HostCounts | None) -> dict[str, int]:
    return {} if counts is None else {"free": counts.free, "cached": counts.cached, "in_flight": counts.in_flight}
