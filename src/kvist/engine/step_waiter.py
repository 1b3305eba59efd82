"""Wakes the engine's loop when a step that was launched on a device has ended.

    loop: launch ──► watch(step) ──► thread: step.wait() ──► wakeup() ──► loop: `recv` returns, the step is read

So the loop sleeps in `recv` while the device computes, and handles each message and report at once. The thread waits in
the driver, without Python's lock. Steps end in the order of their launches: one thread waits for one after the other.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Protocol

CLOSE_TIMEOUT_S = 1.0  # a step in flight ends sooner, unless the device hangs

logger = logging.getLogger(__name__)


class WaitedStep(Protocol):
    def wait(self) -> None:
        """Wait until the step has ended. Called by the waiter's thread."""


class StepWaiter:
    """Its thread starts with the first step: an engine that computes in the loop's thread has none to wait for."""

    def __init__(self, wakeup: Callable[[], None]) -> None:
        """`wakeup` ends the loop's sleep; it is called by the waiter's thread."""
        self._wakeup = wakeup
        self._steps: queue.SimpleQueue[WaitedStep | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="kvist-step-waiter", daemon=True)

    def watch(self, step: WaitedStep) -> None:
        """Wake the loop when the step has ended, or has failed. Call in the order of the launches."""
        if self._thread.ident is None:
            self._thread.start()
        self._steps.put(step)

    def close(self) -> None:
        """Stop after the steps in flight, and wait for that for `CLOSE_TIMEOUT_S` at most."""
        self._steps.put(None)
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)

    def _work(self) -> None:
        while (step := self._steps.get()) is not None:
            try:
                step.wait()
            except Exception:  # the loop gets the error too, when it reads the step
                logger.debug("waiting for a step failed", exc_info=True)
            self._wakeup()
            del step  # its buffers are free once the loop has read it
