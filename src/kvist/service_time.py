"""How long a queue takes, by how long requests took lately: what a refused client is told to wait. Pure."""

from __future__ import annotations

_WEIGHT = 1 / 16  # of the newest request in the mean
SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


class ServiceTime:
    """The recent mean of a request's time from arrival to end. Mutable; its one owner notes each end."""

    def __init__(self) -> None:
        self._mean_s: float | None = None

    def note(self, duration_s: float) -> None:
        self._mean_s = duration_s if self._mean_s is None else self._mean_s + _WEIGHT * (duration_s - self._mean_s)

    def retry_after_s(self, *, num_ahead: int, num_present: int) -> float:
        """Until `num_ahead` of the `num_present` requests will have ended.

        By Little's law `num_present` requests end in the mean time of one of them."""
        if self._mean_s is None:
            return SHORTEST_WAIT_S
        wait_s = self._mean_s * num_ahead / max(1, num_present)
        return min(LONGEST_WAIT_S, max(SHORTEST_WAIT_S, wait_s))
