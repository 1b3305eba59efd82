"""CPU seconds of the loop's thread, by part of a step: planning, launching, reading back. Sent in load reports.

A step that is read has ended, so reading includes no wait. On a GPU only planning and launching can delay the device.
On a CPU launching computes the step, and the loop plans between its layers too: that time counts as planning only. The
rest of `loop_cpu_seconds` is receiving, sending and reports; the rest of `process_cpu_seconds` is other threads, with
that of step_waiter.py, which uses a core while a GPU's driver polls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from kvist.clock import cpu_s, thread_cpu_s


class StepCpuTimes:
    """Mutable; owned by the engine loop. Its numbers only grow."""

    def __init__(self, thread_s: Callable[[], float] = thread_cpu_s, process_s: Callable[[], float] = cpu_s) -> None:
        """`thread_s` and `process_s` return the CPU seconds of this thread and of this process."""
        self._thread_s, self._process_s = thread_s, process_s
        self._spent_s = dict.fromkeys(("plan_cpu_seconds", "launch_cpu_seconds", "read_cpu_seconds"), 0.0)
        self._sum_s = 0.0  # of all parts: a part inside another counts once
        self._before_s = thread_s()  # spent on loading, by the same thread

    def planning(self) -> contextlib.AbstractContextManager[None]:
        return self._spent_on("plan_cpu_seconds")

    def launching(self) -> contextlib.AbstractContextManager[None]:
        return self._spent_on("launch_cpu_seconds")

    def reading(self) -> contextlib.AbstractContextManager[None]:
        return self._spent_on("read_cpu_seconds")

    @contextlib.contextmanager
    def _spent_on(self, name: str) -> Iterator[None]:
        started_s, inner_before_s = self._thread_s(), self._sum_s
        try:
            yield
        finally:
            spent_s = self._thread_s() - started_s - (self._sum_s - inner_before_s)
            self._spent_s[name] += spent_s
            self._sum_s += spent_s

    def totals(self) -> dict[str, float]:
        """Return the totals. Call in the loop's thread."""
        since_s = self._thread_s() - self._before_s
        return {**self._spent_s, "loop_cpu_seconds": since_s, "process_cpu_seconds": self._process_s()}
