"""Watches whether the engine's loop makes progress: tells the parent twice a second, and ends a process that hangs.

The loop begins a turn at least once a second, unless a step takes longer. On a GPU a long turn is a device that hangs:
the loop waits for it in the driver, without limit. On a CPU a step may rightly take long, and then the loop's thread
uses the CPU; a loop that neither turns nor computes is blocked. So there are two numbers: how long the turn has lasted,
and how long there has been no sign of progress. With a process that is stopped (SIGSTOP) this thread is stopped, too,
and the parent notices its silence (child.py).

It counts looks and reads no clock: a process that was stopped for an hour missed one look, not an hour.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections.abc import Callable

CHECK_INTERVAL_S = 0.5
LEAST_CPU_S = 0.01  # of the loop's thread between two looks: then it computes, also where cores are scarce

logger = logging.getLogger(__name__)


def _end_process() -> None:
    faulthandler.dump_traceback()  # where every thread is, on standard error
    os._exit(1)  # no clean end: it would wait for the device, too


class ProgressWatch:
    """Watches from `start` to `stop`; `look` is called by its thread alone."""

    def __init__(
        self,
        num_iterations: Callable[[], int],
        *,
        limit_s: float,
        loop_cpu_s: Callable[[], float] | None = None,
        end: Callable[[], None] = _end_process,
    ) -> None:
        """Watch a loop. `num_iterations` counts the iterations begun; after `limit_s` with no progress
        the process is ended. `loop_cpu_s` is the CPU time of the loop's thread; None with a GPU, because waiting for a
        GPU also uses the CPU."""
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
        self._thread = threading.Thread(target=self._watch, name="kvist-progress", daemon=True)

    def start(self, beat: Callable[[float, float], None] | None = None) -> None:
        """`beat` hears after each look how long the turn, and the standstill, have lasted."""
        if beat is not None:
            self._beat = beat
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * CHECK_INTERVAL_S)  # it may wait for a parent that reads nothing

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
                "the engine has made no progress for %.0f s (--stall-restart-s): it hangs and is ended", self._limit_s
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
