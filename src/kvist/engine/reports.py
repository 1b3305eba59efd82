"""Makes LoadReports: the load of this engine and its cached pages, for every gateway.

Reports are sent once a second, and `MIN_INTERVAL_S` after the previous one if cached pages changed or a gateway asked
for a snapshot. All gateways get their reports at the same time, so one set of pending changes is enough; a gateway that
is new or asked for a resync gets every cached digest instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvist import wire
from kvist.engine.gateways import Gateways
from kvist.kv.tiers.host import HostCounts
from kvist.scheduler.load import SchedulerLoad

MIN_INTERVAL_S = 0.05
MAX_INTERVAL_S = 1.0


class LoadReports:
    """Mutable; owned by the engine loop."""

    def __init__(self, *, cached_digests: Callable[[], Sequence[bytes]]) -> None:
        self._cached_digests = cached_digests
        self._changes: dict[
            bytes, bool
        ] = {}  # digest → whether now cached; since the last report, at most one per page
        self._last_sent_s = float("-inf")

    def record_changes(self, added: Sequence[bytes], removed: Sequence[bytes]) -> None:
        for digest in removed:
            self._record_change(digest, now_cached=False)
        for digest in added:
            self._record_change(digest, now_cached=True)

    def make_due(self) -> None:
        """Make the next reports due at once."""
        self._last_sent_s = float("-inf")

    def due_at_s(self, gateways: Gateways) -> float:
        urgent = self._changes or any(gateway.wants_snapshot for gateway in gateways)
        return self._last_sent_s + (MIN_INTERVAL_S if urgent else MAX_INTERVAL_S)

    def make(
        self,
        gateways: Gateways,
        load: SchedulerLoad,
        totals: dict[str, float],
        now_s: float,
        storage: wire.StorageStatus | None = None,
        *,
        draining: bool = False,
    ) -> Iterator[tuple[bytes, wire.LoadReport]]:
        """Make one report per gateway. Exhaust the iterator: the pending changes are in these reports only."""
        added = tuple(digest for digest, cached in self._changes.items() if cached)
        removed = tuple(digest for digest, cached in self._changes.items() if not cached)
        everything: tuple[bytes, ...] | None = None
        self._changes.clear()
        self._last_sent_s = now_s
        for gateway in gateways:
            if gateway.wants_snapshot and everything is None:
                everything = tuple(self._cached_digests())
            report = wire.LoadReport(
                sequence=gateway.next_sequence,
                num_running=load.num_running,
                num_waiting=load.num_waiting,
                num_free_pages=load.pages.free,
                num_cached_pages=load.pages.cached,
                num_owned_pages=load.pages.owned,
                num_in_flight_pages=load.pages.in_flight,
                service_s=load.service_s,
                num_host_pages=_by_state(load.host_pages),
                storage=storage,
                draining=draining,
                snapshot=gateway.wants_snapshot,
                cached_added=everything or () if gateway.wants_snapshot else added,
                cached_removed=() if gateway.wants_snapshot else removed,
                totals={**load.totals, **totals},
            )
            gateway.next_sequence += 1
            gateway.wants_snapshot = False
            yield gateway.identity, report

    def _record_change(self, digest: bytes, *, now_cached: bool) -> None:
        # A digest's changes alternate, so a second change cancels the first.
        if self._changes.get(digest, now_cached) is not now_cached:
            del self._changes[digest]
        else:
            self._changes[digest] = now_cached


def _by_state(counts: HostCounts | None) -> dict[str, int]:
    return {} if counts is None else {"free": counts.free, "cached": counts.cached, "in_flight": counts.in_flight}
