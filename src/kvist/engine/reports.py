"""Makes LoadReports: the load of this engine, for every gateway.

Reports are sent once a second, and `MIN_INTERVAL_S` after the previous one if cached pages changed or a gateway is new.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvist import wire
from kvist.engine.gateways import Gateways
from kvist.engine.roles import RoleSwitch
from kvist.kv.tiers.host import HostCounts
from kvist.scheduler.status import SchedulerStatus

MIN_INTERVAL_S = 0.05
MAX_INTERVAL_S = 1.0


class LoadReports:
    """Mutable; owned by the engine loop."""

    def __init__(self) -> None:
        self._pages_changed = False  # since the last report
        self._last_sent_s = float("-inf")

    def on_pages_changed(self) -> None:
        self._pages_changed = True

    def make_due(self) -> None:
        """Make the next reports due at once."""
        self._last_sent_s = float("-inf")

    def due_at_s(self, gateways: Gateways) -> float:
        urgent = self._pages_changed or any(not gateway.has_report for gateway in gateways)
        return self._last_sent_s + (MIN_INTERVAL_S if urgent else MAX_INTERVAL_S)

    def make(
        self,
        gateways: Gateways,
        status: SchedulerStatus,
        totals: dict[str, float],
        now_s: float,
        roles: RoleSwitch,
        storage: wire.StorageStatus | None = None,
        *,
        draining: bool = False,
    ) -> Iterator[tuple[bytes, wire.LoadReport]]:
        """Make one report per gateway."""
        self._last_sent_s, self._pages_changed = now_s, False
        report = wire.LoadReport(
            num_running=status.num_running,
            num_waiting=status.num_waiting,
            num_free_pages=status.pages.free,
            num_cached_pages=status.pages.cached,
            num_owned_pages=status.pages.owned,
            num_in_flight_pages=status.pages.in_flight,
            leases=status.leases,
            service_s=status.service_s,
            queue_wait_s=status.queue_wait_s,
            num_host_pages=_by_state(status.host_pages),
            storage=storage,
            draining=draining,
            role=roles.role,
            earlier_roles=roles.earlier_roles,
            totals={**status.totals, **totals},
        )
        for gateway in gateways:
            gateway.has_report = True
            yield gateway.identity, report


def _by_state(counts: HostCounts | None) -> dict[str, int]:
    return {} if counts is None else {"free": counts.free, "cached": counts.cached, "in_flight": counts.in_flight}
