"""Aborts a step between two layers when all its requests have been aborted: on a CPU a step may take seconds.

While the loop computes, messages wait in the socket. The runner calls `check` between layers; at most 40 times a
second, `check` receives the waiting messages and buffers them for the loop's next iteration. The step continues while
one of its requests is open.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from kvist import wire
from kvist.channel.engine import Inbound
from kvist.clock import Clock
from kvist.plan.batch import Batch
from kvist.plan.slots import OpenSlots
from kvist.request import RequestId

CHECK_INTERVAL_S = 0.025
MAX_BUFFERED_MESSAGES = 1024  # further messages wait in the socket


class Receiver(Protocol):
    def recv(self, timeout_s: float) -> list[tuple[bytes, Inbound]]: ...


class StepAborted(Exception):
    """Raised when all requests of the current batch were aborted. The pages that the batch wrote must not be used."""

    def __init__(self, request_ids: Collection[RequestId]) -> None:
        super().__init__("every request of the step was aborted")
        self.request_ids = request_ids


class StepAbort:
    """Mutable; owned by the engine loop. `owner` returns the gateway of a request."""

    def __init__(self, channel: Receiver, owner: Callable[[RequestId], bytes | None], clock: Clock) -> None:
        self._channel = channel
        self._owner = owner
        self._clock = clock
        self._buffered: list[tuple[bytes, Inbound]] = []
        self._slots = OpenSlots()
        self._batch = Batch(step_id=0, items=())
        self._aborted: set[RequestId] = set()  # since the batch began
        self._next_check_s = 0.0
        self.num_aborted = 0

    def begin(self, batch: Batch) -> None:
        self._slots.update(batch)
        self._batch = batch
        self._aborted.clear()
        self._next_check_s = self._clock.now_s() + CHECK_INTERVAL_S

    def check(self) -> None:
        """Raise `StepAborted` if every request of the batch was aborted. A call without a receive takes under 1 µs."""
        now_s = self._clock.now_s()
        if now_s < self._next_check_s or len(self._buffered) >= MAX_BUFFERED_MESSAGES:
            return
        self._next_check_s = now_s + CHECK_INTERVAL_S
        for identity, message in self._channel.recv(0.0):
            self._buffered.append((identity, message))
            if isinstance(message, wire.Abort) and self._owner(message.request_id) == identity:
                self._aborted.add(message.request_id)
        if self._aborted and self._aborted.issuperset(request_ids := self._slots.running(self._batch)):
            self.num_aborted += 1
            raise StepAborted(request_ids)

    def take_buffered(self) -> list[tuple[bytes, Inbound]]:
        buffered, self._buffered = self._buffered, []
        return buffered
