"""Detects an engine loop that hangs: sends a heartbeat to the parent twice a second, and ends the process at a limit.

The loop begins an iteration at least once a second, unless a step takes longer. On a GPU, a long iteration means that
the device hangs, because the loop waits for the device in the driver without limit. On a CPU, a step may take long, and
the loop's thread then uses the CPU; a loop that neither iterates nor computes is blocked. A heartbeat therefore has two
numbers: the duration of the current iteration, and the time without progress. If the process is suspended (SIGSTOP),
this thread is suspended too, and the parent notices the missing heartbeats (supervisor/).

Time is counted in checks and not read from a clock, so that a process that was suspended for an hour has missed no hour
of progress.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections.abc import Callable

CHECK_INTERVAL_S = 0.5
# CPU time of the loop's thread between two checks; more means that the thread computes, even if cores are scarce.
LEAST_CPU_S = 0.01

logger = logging.getLogger(__name__)


def _end_process() -> None:
    faulthandler.dump_traceback()  # the stacks of all threads, to standard error
    os._exit(1)  # not a clean exit, which would also wait for the device


class Watchdog:
    """Runs from `start` to `stop`. Only its own thread calls `check`."""

    def __init__(
        self,
        num_iterations: Callable[[], int],
        *,
        limit_s: float,
        loop_cpu_s: Callable[[], float] | None = None,
        end: Callable[[], None] = _end_process,
    ) -> None:
        """`num_iterations` returns the number of iterations begun. After `limit_s` without progress, `end` is called.
        `loop_cpu_s` returns the CPU time of the loop's thread; None with a GPU, because waiting for a GPU also uses the
        CPU."""
        self._num_iterations = num_iterations
        self._limit_s = limit_s
        self._loop_cpu_s = loop_cpu_s
        self._end = end
        self._beat: Callable[[float, float], None] = lambda _turn_s, _stalled_s: None
        self._last_num_iterations = num_iterations()
        self._last_cpu_s = 0.0 if loop_cpu_s is None else loop_cpu_s()
        self._num_checks_in_iteration = 0
        self._num_checks_stalled = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kvist-watchdog", daemon=True)

    def start(self, beat: Callable[[float, float], None] | None = None) -> None:
        """Start. `beat` is called after each check with the duration of the iteration and the time without progress."""
        if beat is not None:
            self._beat = beat
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * CHECK_INTERVAL_S)  # the thread may wait for a parent that does not read

    def check(self) -> None:
        num_iterations_now, is_computing = self._num_iterations(), self._is_computing()
        same_iteration = num_iterations_now == self._last_num_iterations
        self._last_num_iterations = num_iterations_now
        self._num_checks_in_iteration = self._num_checks_in_iteration + 1 if same_iteration else 0
        self._num_checks_stalled = self._num_checks_stalled + 1 if same_iteration and not is_computing else 0
        stalled_s = self._num_checks_stalled * CHECK_INTERVAL_S
        self._beat(self._num_checks_in_iteration * CHECK_INTERVAL_S, stalled_s)
        if stalled_s >= self._limit_s:
            logger.critical(
                "the engine has made no progress for %.0f s (--stall-restart-s): the engine hangs and is ended",
                self._limit_s,
            )
            self._end()

    def _is_computing(self) -> bool:
        if self._loop_cpu_s is None:
            return False
        cpu_s = self._loop_cpu_s()
        used_s, self._last_cpu_s = cpu_s - self._last_cpu_s, cpu_s
        return used_s >= LEAST_CPU_S

    def _watch(self) -> None:
        while not self._stopped.wait(CHECK_INTERVAL_S):
            self.check()
