"""Tracks whether the server accepts requests or drains, and how many generations are open."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from kvist.errors import Unavailable

_RETRY_AFTER_S = 1.0


class Lifecycle:
    """Mutable; changed inside the event loop only. Endpoints count requests; the serving process calls `stop`."""

    def __init__(self, on_drain: Callable[[], None] | None = None) -> None:
        """`on_drain` lets the process stop after its open requests; None: the server only refuses new ones."""
        self._on_drain = on_drain
        self.stopping = False
        self.num_open = 0  # generating requests, from the decoded body to the end of the response
        self._idle = asyncio.Event()
        self._idle.set()

    def stop(self) -> None:
        """From now on, refuse new requests and report that the server is not ready. Open requests continue."""
        self.stopping = True

    def drain(self) -> None:
        """Refuse new requests, and stop after the open ones."""
        self.stop()
        if self._on_drain is not None:
            self._on_drain()

    def check(self) -> None:
        """Raise `Unavailable` when the server is stopping."""
        if self.stopping:
            raise Unavailable(
                "this server is draining: it is stopping and accepts no new requests. Retry in a moment, or use "
                "another server",
                retry_after_s=_RETRY_AFTER_S,
            )

    @contextlib.contextmanager
    def open_request(self) -> Iterator[None]:
        """Count an open request during the body of the `with`. Raises `Unavailable` when the server is stopping."""
        self.check()
        self.num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_open -= 1
            if self.num_open == 0:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no request is open."""
        await self._idle.wait()
