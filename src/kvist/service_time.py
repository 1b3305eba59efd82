"""How long a queue takes, by how long requests were served lately: what a refused client is told to wait. Pure."""

from __future__ import annotations

_WEIGHT = 1 / 16  # of the newest request in the mean
SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


class ServiceTime:
    """The recent mean of a request's time from its first turn to its end. Mutable; its one owner notes each end."""

    def __init__(self) -> None:
        self.mean_s: float | None = None

    def note(self, duration_s: float) -> None:
        self.mean_s = duration_s if self.mean_s is None else self.mean_s + _WEIGHT * (duration_s - self.mean_s)


def retry_after_s(service_s: float | None, *, num_ahead: int, num_served: int) -> float:
    """Until `num_ahead` requests have had their turn, when `num_served` at once take `service_s` each."""
    if service_s is None:
        return SHORTEST_WAIT_S
    return min(LONGEST_WAIT_S, max(SHORTEST_WAIT_S, service_s * num_ahead / max(1, num_served)))
