"""CPU seconds of the loop's thread, by part of a step: planning, launching, reading back. Sent in load reports.

Reading includes the wait for the device, during which a GPU's driver polls and uses the CPU: on a GPU this is idle
time, and only planning and launching can delay the device. The rest of `loop_cpu_seconds` is receiving, sending and
reports; the rest of `process_cpu_seconds` is other threads.
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
        self._before_s = thread_s()  # spent on loading, by the same thread

    def planning(self) -> contextlib.AbstractContextManager[None]:
        return self._spent_on("plan_cpu_seconds")

    def launching(self) -> contextlib.AbstractContextManager[None]:
        return self._spent_on("launch_cpu_seconds")

    def reading(self) -> contextlib.AbstractContextManager[None]:
        return self._spent_on("read_cpu_seconds")

    @contextlib.contextmanager
    def _spent_on(self, name: str) -> Iterator[None]:
        started_s = self._thread_s()
        try:
            yield
        finally:
            self._spent_s[name] += self._thread_s() - started_s

    def totals(self) -> dict[str, float]:
        """Return the totals. Call in the loop's thread."""
        since_s = self._thread_s() - self._before_s
        return {**self._spent_s, "loop_cpu_seconds": since_s, "process_cpu_seconds": self._process_s()}
