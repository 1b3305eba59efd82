"""Estimates how long a queue lasts, and Retry-After for a refused client, from measured times and rates. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

_WEIGHT = 1 / 16  # of the newest request in the mean, at least
_SEVERAL = 4
SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
_MEMORY_S = 10.0  # of full steps: older ones count less


class ServiceTime:
    """The moving mean of the time from admission to end of a request. Mutable; its one owner adds each duration."""

    def __init__(self) -> None:
        self.mean_s: float | None = None
        self._num_added = 0

    def add(self, duration_s: float) -> None:
        self._num_added += 1
        before_s, weight = self.mean_s or 0.0, max(_WEIGHT, 1 / self._num_added)
        self.mean_s = before_s + weight * (duration_s - before_s)

    @property
    def is_settled(self) -> bool:
        """Whether several requests have ended: one may be an exception."""
        return self._num_added >= _SEVERAL


class PromptRate:
    """The prompt tokens per second that a worker computes in full steps, which have no room for another token. Steps
    with room say how few tokens arrive, not how many can be computed. Mutable; its one owner adds each full step."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._time_s = 0.0

    def add(self, num_tokens: int, duration_s: float) -> None:
        kept = math.exp(-duration_s / _MEMORY_S)
        self._num_tokens = self._num_tokens * kept + num_tokens
        self._time_s = self._time_s * kept + duration_s

    @property
    def tokens_per_s(self) -> float | None:
        """The rate; None before the first full step."""
        return self._num_tokens / self._time_s if self._num_tokens > 0 and self._time_s > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """A queue, or the part of it before a new request."""

    num_requests: int
    num_tokens: float  # to be computed before all of them have begun; tokens that several requests share count once
    num_free: int  # places that requests can have at once: none while the next request finds too few pages
    num_places: int  # requests that are served at once when no place is free


def queue_wait_s(queue: Queue, *, tokens_per_s: float | None, service_s: float | None) -> float | None:
    """Return how long a queue lasts: until its tokens are computed, or until its requests have had places, whichever
    takes longer. `service_s`: the mean time of a request in its place. None: nothing has been measured."""
    waits_s = [] if queue.num_requests else [0.0]
    if tokens_per_s is not None:
        waits_s.append(queue.num_tokens / tokens_per_s)
    if service_s is not None:
        waits_s.append(service_s * max(0, queue.num_requests - queue.num_free) / max(1, queue.num_places))
    return max(waits_s, default=None)


def bounded_retry_after_s(wait_s: float | None) -> float:
    """Return the wait for `Retry-After`; None: unknown."""
    return SHORTEST_WAIT_S if wait_s is None else min(LONGEST_WAIT_S, max(SHORTEST_WAIT_S, wait_s))


def retry_after_s(service_s: float | None, *, num_ahead: int, num_served: int) -> float:
    """Return the wait until `num_ahead` requests have been admitted, if `num_served` run at once, each for
    `service_s`."""
    return bounded_retry_after_s(None if service_s is None else service_s * num_ahead / max(1, num_served))
