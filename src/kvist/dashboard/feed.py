"""Reads the state of the gateway once a second, and gives it to all viewers.

`Feed.run` belongs to the HTTP server: it records while the server accepts connections, whether or not somebody watches,
so that a page that opens has a history. An event is encoded once for all viewers. A viewer gets the newest event when
the one before has been sent, so a slow viewer misses events and holds up nothing; one that reads nothing for `UNREAD_S`
is cut off. When `run` ends, so do all streams: they must not delay a server that stops or is replaced.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import msgspec

from kvist.dashboard.recorder import MAX_POINTS, Reading, Recorder
from kvist.dashboard.snapshot import Snapshot
from kvist.errors import Overloaded

INTERVAL_S = 1.0
MAX_VIEWERS = 32
UNREAD_S = 20.0


class Feed:
    """Mutable; owned by one event loop."""

    def __init__(self, recorder: Recorder, read: Callable[[], Reading]) -> None:
        self._recorder = recorder
        self._read = read
        self._reading: Reading | None = None  # the last one that was recorded
        self._event = b""  # of `_reading`, for viewers that have the earlier ones
        self._ticked = asyncio.Event()  # replaced at each tick
        self.has_ended = False
        self.num_viewers = 0

    async def run(self) -> None:
        """Record once a second until cancelled. The streams end with it."""
        try:
            while True:
                self.tick()
                await asyncio.sleep(INTERVAL_S)
        finally:
            self.has_ended = True
            self._ticked.set()

    def tick(self) -> None:
        """Record the state, and hand it to the viewers."""
        reading = self._reading = self._read()
        self._recorder.record(reading)
        if self.num_viewers:
            self._event = _event(self._recorder.snapshot(reading, 1))
        ticked, self._ticked = self._ticked, asyncio.Event()
        ticked.set()

    def snapshot(self, num_points: int) -> Snapshot:
        """Return the last recorded state; if it is older than two intervals because `run` does not run, a new one."""
        reading = self._read()
        if self._reading is None or reading.now_s - self._reading.now_s > 2 * INTERVAL_S:
            self.tick()
        assert self._reading is not None
        return self._recorder.snapshot(self._reading, num_points)

    @contextmanager
    def viewer(self) -> Iterator[None]:
        """Count a viewer. Raises `Overloaded` when there are too many."""
        if self.num_viewers >= MAX_VIEWERS:
            raise Overloaded(
                f"{MAX_VIEWERS} viewers follow this server, which is the limit: close another dashboard and try again"
            )
        self.num_viewers += 1
        try:
            yield
        finally:
            self.num_viewers -= 1

    async def events(self) -> AsyncIterator[bytes]:
        """Yield a server-sent event with the whole history, and then one a second with the newest point."""
        ticked = self._ticked
        yield _event(self.snapshot(MAX_POINTS))
        while not self.has_ended:
            await ticked.wait()
            if self.has_ended:
                return
            ticked = self._ticked
            yield self._event


def _event(snapshot: Snapshot) -> bytes:
    return b"event: snapshot\ndata: " + msgspec.json.encode(snapshot) + b"\n\n"
