"""Ends an engine whose loop stands still, so that its parent starts another (child.py).

A step on a GPU is waited for in the driver, which has no limit and cannot be interrupted: with a device that hangs the
loop would wait for ever, and its requests with it. So a thread looks now and then whether the loop has begun another
turn, which costs the loop an addition a turn. It counts looks and reads no clock: a process that was stopped for an
hour (SIGSTOP) missed one look, not an hour.

Not for a CPU, where a step waits for nothing and may take long.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections.abc import Callable

STEP_LIMIT_S = 180.0  # more than what tensor-parallel ranks wait for each other, who then end in better order
LOOK_INTERVAL_S = 5.0

log = logging.getLogger(__name__)


def _end_process() -> None:
    faulthandler.dump_traceback()  # where every thread is, on standard error
    os._exit(1)  # no clean end: it would wait for the device, too


class StandstillWatch:
    """Watches from `start` to `stop`; `look` is called by its thread alone."""

    def __init__(self, num_turns: Callable[[], int], end: Callable[[], None] = _end_process) -> None:
        """`num_turns` that the loop has begun; a loop with nothing to do begins one every second or so."""
        self._num_turns = num_turns
        self._end = end
        self._former = num_turns()
        self._num_looks = 0  # since a turn began
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kvist-standstill", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def look(self) -> None:
        turns = self._num_turns()
        self._num_looks = self._num_looks + 1 if turns == self._former else 0
        self._former = turns
        if self._num_looks * LOOK_INTERVAL_S >= STEP_LIMIT_S:
            log.critical("no step has ended for %.0f s: the GPU hangs. This engine ends", STEP_LIMIT_S)
            self._end()

    def _watch(self) -> None:
        while not self._stopped.wait(LOOK_INTERVAL_S):
            self.look()
