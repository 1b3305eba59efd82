"""Estimates how long a queue lasts, and Retry-After for a refused client, from measured times and rates. Pure."""

from __future__ import annotations

import math

_WEIGHT = 1 / 16  # of the newest request in the mean
SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
_MEMORY_S = 10.0  # of time with a queue: older measurements count less


class ServiceTime:
    """The moving mean of the time from admission to end of a request. Mutable; its one owner adds each duration."""

    def __init__(self) -> None:
        self.mean_s: float | None = None

    def add(self, duration_s: float) -> None:
        self.mean_s = duration_s if self.mean_s is None else self.mean_s + _WEIGHT * (duration_s - self.mean_s)


class DrainRate:
    """The tokens per second that leave a queue, measured only while requests wait: the rate of the bottleneck, which
    may be the computation of prompts, the places of running requests or their pages.

    Mutable. In each step its one owner calls `begin`, `left` for each request that is admitted, and `end`."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._time_s = 0.0  # with a queue
        self._last_s = 0.0
        self._has_queue = False

    def begin(self, now_s: float) -> None:
        past_s = now_s - self._last_s if self._has_queue else 0.0
        self._last_s = now_s
        if past_s > 0:
            kept = math.exp(-past_s / _MEMORY_S)
            self._num_tokens *= kept
            self._time_s = self._time_s * kept + past_s

    def left(self, num_tokens: int) -> None:
        if self._has_queue:  # otherwise the request did not wait
            self._num_tokens += num_tokens

    def end(self, *, has_queue: bool) -> None:
        self._has_queue = has_queue

    @property
    def tokens_per_s(self) -> float | None:
        """The rate; None if no request that had waited has left the queue."""
        return self._num_tokens / self._time_s if self._num_tokens > 0 and self._time_s > 0 else None


def bounded_retry_after_s(wait_s: float | None) -> float:
    """Return the wait for `Retry-After`; None: unknown."""
    return SHORTEST_WAIT_S if wait_s is None else min(LONGEST_WAIT_S, max(SHORTEST_WAIT_S, wait_s))


def retry_after_s(service_s: float | None, *, num_ahead: int, num_served: int) -> float:
    """Return the wait until `num_ahead` requests have been admitted, if `num_served` run at once, each for
    `service_s`."""
    return bounded_retry_after_s(None if service_s is None else service_s * num_ahead / max(1, num_served))
