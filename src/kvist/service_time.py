"""Estimates Retry-After for a refused client from the recent service time of requests. Pure."""

from __future__ import annotations

_WEIGHT = 1 / 16  # of the newest request in the mean
SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


class ServiceTime:
    """The moving mean of the time from admission to end of a request. Mutable; its one owner adds each duration."""

    def __init__(self) -> None:
        self.mean_s: float | None = None

    def add(self, duration_s: float) -> None:
        self.mean_s = duration_s if self.mean_s is None else self.mean_s + _WEIGHT * (duration_s - self.mean_s)


def retry_after_s(service_s: float | None, *, num_ahead: int, num_served: int) -> float:
    """Return the wait until `num_ahead` requests have been admitted, if `num_served` run at once, each for
    `service_s`."""
    if service_s is None:
        return SHORTEST_WAIT_S
    return min(LONGEST_WAIT_S, max(SHORTEST_WAIT_S, service_s * num_ahead / max(1, num_served)))
