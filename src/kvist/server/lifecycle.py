"""Whether this server takes requests: from its start until it is told to stop; and how many generations are open."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from kvist.errors import Unavailable

_RETRY_AFTER_S = 1.0


class Lifecycle:
    """Mutable; changed inside the event loop only. The gateway counts, the process that serves says when to stop."""

    def __init__(self) -> None:
        self.stopping = False
        self.num_open = 0  # requests for tokens, from when they are understood to the end of their response
        self._idle = asyncio.Event()
        self._idle.set()

    def stop(self) -> None:
        """From now on this server is not ready and refuses what is new; what is open goes on."""
        self.stopping = True

    def check(self) -> None:
        """Raises `Unavailable` when the server is stopping."""
        if self.stopping:
            raise Unavailable(
                "this server is stopping and takes no new request: retry in a moment, or ask another server",
                retry_after_s=_RETRY_AFTER_S,
            )

    @contextlib.contextmanager
    def open_request(self) -> Iterator[None]:
        """Counts the body as an open request. Raises `Unavailable` when the server is stopping."""
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
        """Until no request is open."""
        await self._idle.wait()
