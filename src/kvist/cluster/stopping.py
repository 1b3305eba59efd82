"""How `kvist serve` and `kvist router` stop, whoever asks for it and however often.

    signal ─► unready, new requests refused ─► open ones finish ─► those left are cut ─► port closed ─► engine ended
              └─ at least --drain-grace-s ───┘                  └ at --shutdown-timeout-s, or at the next signal

The port answers (`/ready` with 503) until no request is open. A request that is cut is told so: by an error event when
it streams, else by a 503. A worker's engine drains beside its HTTP: routers send it requests of their own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import FrameType

from kvist.errors import KvistError, Unavailable
from kvist.server.config import ServerConfig
from kvist.server.lifecycle import Lifecycle

PARTING_S = 2.0  # for clients to take the error that tells them of their end
HTTP_CLOSE_S = 2  # then for connections to close

log = logging.getLogger(__name__)


class StopSignals:
    """Signals to this process. Before `watch` each of them ends the start by `KeyboardInterrupt`; from then on the
    first asks for a stop, and the others for haste."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_signals = 0

    def watch(self) -> None:
        """Inside the running loop."""
        self._loop = asyncio.get_running_loop()

    def unwatch(self) -> None:
        self._loop = None

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        if self._loop is None:
            raise KeyboardInterrupt
        self._num_signals += 1
        event = self.asked if self._num_signals == 1 else self.hurried
        self._loop.call_soon_threadsafe(event.set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """What is drained: the requests of this server, and of its engine."""

    lifecycle: Lifecycle
    config: ServerConfig
    hurried: asyncio.Event
    cut: Callable[[KvistError], None]  # ends every open request with this error
    engine: Awaitable[object] | None = None  # done when no request is open there

    async def run(self) -> None:
        """Returns when nothing is open, or its time is over."""
        config, lifecycle = self.config, self.lifecycle
        lifecycle.stop()
        limit_s = max(config.shutdown_timeout_s, config.drain_grace_s)
        log.info(
            "stopping: new requests are refused; %d open ones may go on for %g s (a second signal ends them now)",
            lifecycle.num_open,
            limit_s,
        )
        everything = asyncio.gather(
            asyncio.sleep(config.drain_grace_s),
            lifecycle.wait_idle(),
            *(() if self.engine is None else (self.engine,)),
            return_exceptions=True,
        )
        hurried = asyncio.ensure_future(self.hurried.wait())
        await asyncio.wait((everything, hurried), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        everything.cancel()
        hurried.cancel()
        await asyncio.gather(everything, hurried, return_exceptions=True)
        await self.end_open_requests()

    async def end_open_requests(self) -> None:
        """Those that are left get an error. Bounded."""
        num_left = self.lifecycle.num_open
        if not num_left:
            return
        log.warning("%d requests were still open and are cut (--shutdown-timeout-s)", num_left)
        self.cut(Unavailable("the server stopped before the answer was complete: send the request again"))
        idle = asyncio.ensure_future(self.lifecycle.wait_idle())
        await asyncio.wait((idle,), timeout=PARTING_S)
        idle.cancel()
