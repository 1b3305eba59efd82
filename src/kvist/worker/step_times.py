"""Where an engine step's own time goes: to planning it, launching it, reading it back. Told in the load reports.

Seconds of processor time of the loop's thread. Reading includes the wait for the device, which a GPU's driver spends
looking: on a GPU that is idle time, planning and launching are what could ever hold it up. What the loop's total has
beyond the three is receiving, sending and reports; what the process has beyond its loop is other threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kvist.clock import cpu_s, thread_cpu_s


class StepTimes:
    """Mutable; owned by the engine loop. Its numbers only grow."""

    def __init__(self) -> None:
        self._plan_s = self._launch_s = self._read_s = 0.0
        self._before_s = thread_cpu_s()  # spent on loading, by the thread that is the loop's from here on

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        started_s = thread_cpu_s()
        yield
        self._plan_s += thread_cpu_s() - started_s

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        started_s = thread_cpu_s()
        yield
        self._launch_s += thread_cpu_s() - started_s

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        started_s = thread_cpu_s()
        try:
            yield
        finally:
            self._read_s += thread_cpu_s() - started_s

    def totals(self) -> dict[str, float]:
        """Asked by the loop's thread."""
        return {
            "plan_cpu_seconds": self._plan_s,
            "launch_cpu_seconds": self._launch_s,
            "read_cpu_seconds": self._read_s,
            "loop_cpu_seconds": thread_cpu_s() - self._before_s,
            "process_cpu_seconds": cpu_s(),
        }
