"""Stops `kvist serve` and `kvist router`, on signals or on a request of the parent process, also repeated ones.

    signal ─► unready, new requests refused ─► open ones finish ─► the rest are cut ─► port closed ─► engine ended
              └─ at least --drain-grace-s ───┘                  └ at --shutdown-timeout-s, or at the next signal

The port answers (`/ready` with 503) until no request is open. A request that is cut gets an error: an error event if it
streams, else a 503. A worker's engine drains at the same time as HTTP, because routers also send requests to it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import FrameType

from kvist.cluster.stop_requests import signal_self
from kvist.errors import KvistError, Unavailable
from kvist.server.config import ServerConfig
from kvist.server.lifecycle import Lifecycle

SAME_REQUEST_S = 2.0
CUT_GRACE_S = 2.0  # for clients to receive the error of a request that was cut

logger = logging.getLogger(__name__)


class StopSignals:
    """Stop requests from signals and from the parent process. Before `watch`, a signal ends the start by
    `KeyboardInterrupt`; after `watch`, the first signal requests a stop, and another one hurries it. A signal within
    `SAME_REQUEST_S` after the parent's request counts as the same request: both may come from one service manager.
    The first signal after `drain` counts as the same request, however late: Kubernetes runs a container's preStop
    command, and sends the signal after it. After `unwatch` the process ends by itself: requests of the next
    `SAME_REQUEST_S` have no effect, and a later signal interrupts what keeps the process."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.hurried = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended_s: float | None = None  # when the loop's main task had ended
        self._requested_s: float | None = None
        self._num_signals = 0
        self._drained = False

    def watch(self) -> None:
        """Turn signals into stop requests from now on. Call inside the running event loop."""
        self._loop = asyncio.get_running_loop()

    def unwatch(self) -> None:
        self._ended_s = time.monotonic()
        self._loop = None

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        if self._loop is None:
            if self._ended_s is not None and time.monotonic() < self._ended_s + SAME_REQUEST_S:
                return
            raise KeyboardInterrupt
        self._num_signals += 1
        requested_s = None if self._drained else self._requested_s
        again = self._num_signals > 1 or (requested_s is not None and self._loop.time() > requested_s + SAME_REQUEST_S)
        self._loop.call_soon_threadsafe(self._request if not again else self.hurried.set)

    def stop(self) -> None:
        """Request a stop for the parent process. Safe on any thread."""
        if self._loop is None:
            signal_self()
        else:
            self._loop.call_soon_threadsafe(self._request)

    def drain(self) -> None:
        """Request a stop for a client of `POST /drain`. Safe on any thread."""
        self._drained = True
        self.stop()

    def hurry(self) -> None:
        """Hurry the stop for the parent process. Safe on any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.hurried.set)

    def _request(self) -> None:
        if self._requested_s is None:
            self._requested_s = asyncio.get_running_loop().time()
        self.requested.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Drains the open requests of this server and of its engine."""

    lifecycle: Lifecycle
    config: ServerConfig
    hurried: asyncio.Event
    fail_all: Callable[[KvistError], None]  # ends every open request with this error
    engine: Awaitable[object] | None = None  # done when no request is open there

    async def run(self) -> None:
        """Return when no request is open, or the time limit is over."""
        config, lifecycle = self.config, self.lifecycle
        lifecycle.stop()
        limit_s = max(config.shutdown_timeout_s, config.drain_grace_s)
        logger.info(
            "stopping: new requests are refused; open requests (%d) may finish within %g s (a second signal cuts them)",
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
        """End the requests that are still open with an error. Takes `CUT_GRACE_S` at most."""
        num_left = self.lifecycle.num_open
        if not num_left:
            return
        logger.warning("open requests that are now cut with an error: %d (--shutdown-timeout-s)", num_left)
        self.fail_all(Unavailable("the server stopped before the answer was complete: send the request again"))
        idle = asyncio.ensure_future(self.lifecycle.wait_idle())
        await asyncio.wait((idle,), timeout=CUT_GRACE_S)
        idle.cancel()
