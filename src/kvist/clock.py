"""The only place that reads a clock. Everything else takes `now_s` or a `Clock` as an argument."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    def now_s(self) -> float:
        """Seconds on a clock that never goes back; comparable within one process only."""


class MonotonicClock:
    def now_s(self) -> float:
        return time.monotonic()


class FakeClock:
    """A clock that tests and the simulator move by hand."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, by_s: float) -> None:
        assert by_s >= 0, "time does not go back"
        self._now_s += by_s


def unix_time_s() -> int:
    """Wall-clock seconds since 1970, for `created` fields and logs only; never for durations."""
    return int(time.time())


def unix_time_ns() -> int:
    """Wall-clock nanoseconds since 1970, for the time stamps of files that several processes share."""
    return time.time_ns()


def cpu_s() -> float:
    """CPU seconds this process has used; for what measuring costs, never for durations."""
    return time.process_time()


def thread_cpu_s() -> float:
    """CPU seconds the calling thread has used."""
    return time.thread_time()


def thread_cpu_clock(thread_id: int) -> Callable[[], float]:
    """CPU seconds that another thread of this process (`threading.get_ident()`) has used so far."""
    clock_id = time.pthread_getcpuclockid(thread_id)
    return lambda: time.clock_gettime(clock_id)


class Oversleep:
    """Finds the time in which we did not look, because this process was stopped, or its loop held up, or the machine
    slept.

    Then many seconds are gone at once and messages are still unread: who judges others by their silence must not count
    that time, or it takes them for dead. Mutable; one owner.
    """

    def __init__(self, now_s: float, *, longest_s: float) -> None:
        """`longest_s`: looks are usually not farther apart."""
        self._last_look_s = now_s
        self._longest_s = longest_s

    def look(self, now_s: float) -> float:
        """Seconds since the last look, beyond `longest_s`."""
        late_s = max(0.0, now_s - self._last_look_s - self._longest_s)
        self._last_look_s = now_s
        return late_s
