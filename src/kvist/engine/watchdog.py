"""Detects an engine loop that hangs: sends a heartbeat to the parent twice a second, and ends the process at a limit.

The loop begins an iteration at least once a second, unless a step takes longer. On a GPU, a long iteration means that
the device hangs: after a second of a step the loop only waits for the end of the step, in the driver and without limit.
On a CPU, a step may take long, and the loop's thread then uses the CPU; a loop that neither iterates nor computes is
blocked. A heartbeat therefore has two numbers: the duration of the current iteration, and the time without progress. If
the process is suspended (SIGSTOP), this thread is suspended too, and the parent notices the missing heartbeats
(supervisor/).

After `REPORT_S` without progress the stacks of all threads are logged, once for each hang, and each heartbeat says
where the loop hangs: a worker that is unready for this reason names the function. If a library hangs while it holds the
interpreter lock, this thread cannot run; then a timer of `faulthandler`, which needs no lock, prints the stacks.

Time is counted in checks and not read from a clock, so that a process that was suspended for an hour has missed no hour
of progress.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

CHECK_INTERVAL_S = 0.5
REPORT_S = 2.0  # before a gateway may count the engine as lost
_OWN_CODE = str(Path(__file__).parents[1])
# CPU time of the loop's thread between two checks; more means that the thread computes, even if cores are scarce.
LEAST_CPU_S = 0.01

logger = logging.getLogger(__name__)


def _end_process() -> None:
    faulthandler.dump_traceback()  # the stacks of all threads, to standard error
    os._exit(1)  # not a clean exit, which would also wait for the device


def place_of(thread_id: int | None) -> str:
    """Return where a thread is now, as "FUNCTION (FILE:LINE)": its innermost frame in Kvist's code, if there is one."""
    frame: FrameType | None = sys._current_frames().get(thread_id or 0)
    innermost = frame
    while frame is not None and not frame.f_code.co_filename.startswith(_OWN_CODE):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return ""
    code = frame.f_code
    return f"{code.co_qualname} ({Path(code.co_filename).name}:{frame.f_lineno})"


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
        self._beat: Callable[[float, float, str], None] = lambda _turn_s, _stalled_s, _place: None
        self._loop_thread_id = threading.main_thread().ident
        self._is_reported = False  # the present hang
        self._last_num_iterations = num_iterations()
        self._last_cpu_s = 0.0 if loop_cpu_s is None else loop_cpu_s()
        self._num_checks_in_iteration = 0
        self._num_checks_stalled = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kvist-watchdog", daemon=True)

    def start(self, beat: Callable[[float, float, str], None] | None = None) -> None:
        """Start. `beat` is called after each check with the duration of the iteration, the time without progress, and
        where the loop hangs, if it makes no progress."""
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
        place = place_of(self._loop_thread_id) if stalled_s else ""
        self._beat(self._num_checks_in_iteration * CHECK_INTERVAL_S, stalled_s, place)
        self._report(stalled_s, place)
        if stalled_s >= self._limit_s:
            logger.critical(
                "the engine has made no progress for %.0f s (--stall-restart-s): the engine hangs and is ended",
                self._limit_s,
            )
            self._end()

    def _report(self, stalled_s: float, place: str) -> None:
        if stalled_s < REPORT_S:
            if self._is_reported:
                logger.warning("the engine makes progress again")
            self._is_reported = False
        elif not self._is_reported:
            self._is_reported = True
            logger.error("the engine has made no progress for %.1f s, in %s; the stacks follow", stalled_s, place)
            faulthandler.dump_traceback()

    def _is_computing(self) -> bool:
        if self._loop_cpu_s is None:
            return False
        cpu_s = self._loop_cpu_s()
        used_s, self._last_cpu_s = cpu_s - self._last_cpu_s, cpu_s
        return used_s >= LEAST_CPU_S

    def _watch(self) -> None:
        try:
            while not self._stopped.wait(CHECK_INTERVAL_S):
                faulthandler.dump_traceback_later(REPORT_S + CHECK_INTERVAL_S)  # unless the next check comes before
                self.check()
        finally:
            faulthandler.cancel_dump_traceback_later()
