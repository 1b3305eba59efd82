"""Applies the page events of all workers, one message in each turn of the event loop, so that no stream waits for long.

Between two messages the index gets a turn for its own work. A worker with `MAX_WAITING` messages in the queue loses
further ones: its feed then finds a gap, and lists the pages again.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable

from kvist.page_index.digest_table import SLOTS_PER_STORED_KEY
from kvist.page_index.page_feed import PageFeed
from kvist.page_index.prefix_index import PrefixIndex
from kvist.router.registry import Worker
from kvist.wire import MAX_DIGESTS, PageEvents

MAX_WAITING = 64  # messages of one worker
SLOTS_PER_TURN = SLOTS_PER_STORED_KEY * MAX_DIGESTS  # in one or two milliseconds


class PageQueue:
    """Mutable; owned by the fleet, used inside its loop."""

    def __init__(self, index: PrefixIndex, apply: Callable[[Worker, PageEvents], None]) -> None:
        self._index = index
        self._apply = apply
        self._waiting: deque[tuple[Worker, PageFeed, PageEvents]] = deque()
        self._num_waiting: Counter[Worker] = Counter()
        self._handle: asyncio.Handle | None = None  # of the next turn
        self._was_work = False  # the last turn was the index's

    def put(self, worker: Worker, events: PageEvents) -> bool:
        """Queue a message. Return False if it is dropped: the worker has too many waiting, or is not in use."""
        if worker.pages is None or self._num_waiting[worker] >= MAX_WAITING:
            return False
        self._num_waiting[worker] += 1
        self._waiting.append((worker, worker.pages, events))
        self.wake()
        return True

    def wake(self) -> None:
        """Take a turn soon if there is work. Called after any change of the index."""
        if self._handle is None and (self._waiting or self._index.has_work):
            self._handle = asyncio.get_running_loop().call_soon(self._turn)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._waiting.clear()

    def _turn(self) -> None:
        self._handle = None
        try:
            if self._index.has_work and not (self._was_work and self._waiting):
                self._was_work = True
                self._index.work(SLOTS_PER_TURN)
            elif self._waiting:
                self._was_work = False
                worker, feed, events = self._waiting.popleft()
                self._num_waiting[worker] -= 1
                if not self._num_waiting[worker]:
                    del self._num_waiting[worker]
                if worker.pages is feed:  # otherwise the events are of a process that is gone
                    self._apply(worker, events)
        finally:
            self.wake()
