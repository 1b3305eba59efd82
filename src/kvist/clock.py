"""The only module that reads a clock. All others take `now_s` or a `Clock` as an argument."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    def now_s(self) -> float:
        """Return seconds on a monotonic clock; comparable within one process only."""


class MonotonicClock:
    def now_s(self) -> float:
        return time.monotonic()


def unix_time_s() -> int:
    """Return wall-clock seconds since 1970, for `created` fields and logs only; never for durations."""
    return int(time.time())


def unix_time_ns() -> int:
    """Return wall-clock nanoseconds since 1970, for time stamps of files that several processes share."""
    return time.time_ns()


def cpu_s() -> float:
    """Return the CPU seconds used by this process; to measure cost, never for durations."""
    return time.process_time()


def thread_cpu_s() -> float:
    """Return the CPU seconds used by the calling thread."""
    return time.thread_time()


def thread_cpu_clock(thread_id: int) -> Callable[[], float]:
    """Return a function that reads the CPU seconds used by another thread of this process (`threading.get_ident()`)."""
    clock_id = time.pthread_getcpuclockid(thread_id)
    return lambda: time.clock_gettime(clock_id)


class PauseMeter:
    """Measures the time during which this process did not run its checks, because it was stopped, its loop was blocked,
    or the machine slept.

    After such a pause many seconds have passed at once and messages are still unread. A check for silent peers must not
    count that time, or it considers live peers dead. Mutable; one owner.
    """

    def __init__(self, now_s: float, *, max_interval_s: float) -> None:
        """`max_interval_s`: the longest usual interval between two calls of `measure_s`."""
        self._last_call_s = now_s
        self._max_interval_s = max_interval_s

    def measure_s(self, now_s: float) -> float:
        """Return by how much the interval since the last call exceeds `max_interval_s`; 0 if it does not."""
        pause_s = max(0.0, now_s - self._last_call_s - self._max_interval_s)
        self._last_call_s = now_s
        return pause_s
