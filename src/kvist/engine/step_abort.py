"""When a step that is computed in the loop's thread lets the loop work, and when it is aborted.

On a CPU a step may take seconds. The runner calls the loop between two layers; at most 200 times a second, the loop
handles what has arrived (`EngineLoop.between_layers`). The step continues while one of its requests is open.
"""

from __future__ import annotations

from collections.abc import Callable

from kvist.clock import Clock
from kvist.plan.batch import Batch
from kvist.plan.slots import OpenSlots
from kvist.request import RequestId

CHECK_INTERVAL_S = 0.005


class StepAborted(Exception):
    """Raised when all requests of the current batch have ended. The pages that the batch wrote must not be used."""

    def __init__(self) -> None:
        super().__init__("every request of the step has ended")


class StepAbort:
    """Mutable; owned by the engine loop. `is_open` returns whether a request has not ended."""

    def __init__(self, is_open: Callable[[RequestId], bool], clock: Clock) -> None:
        self._is_open = is_open
        self._clock = clock
        self._slots = OpenSlots()
        self._batch = Batch(step_id=0, items=())
        self._next_check_s = 0.0
        self.num_aborted = 0

    def begin(self, batch: Batch) -> None:
        self._slots.update(batch)
        self._batch = batch
        self._next_check_s = self._clock.now_s() + CHECK_INTERVAL_S

    def is_due(self) -> bool:
        """Return whether the loop may work now. Takes under 1 µs."""
        now_s = self._clock.now_s()
        if now_s < self._next_check_s:
            return False
        self._next_check_s = now_s + CHECK_INTERVAL_S
        return True

    def check(self) -> None:
        """Raise `StepAborted` if every request of the batch has ended."""
        if not any(map(self._is_open, self._slots.running(self._batch))):
            self.num_aborted += 1
            raise StepAborted
