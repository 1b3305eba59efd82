"""A socket that a router has from its parent process, so that its successor can accept connections without a break.

`kvist up` binds the socket and keeps it; each of its routers inherits it (`--listen-fd`), and is asked by its parent:

    accept ─► connections are accepted here ── retire ─► no longer; each open connection ends after its current request,
                                                         an idle one after a pause, and then the process ends

Connections that no router has accepted yet wait in the socket, and the next router accepts them.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Protocol

from kvist.errors import ConfigError

CHECK_INTERVAL_S = 0.05


class Listener(Protocol):
    """The HTTP server (server/serve.py)."""

    started: bool

    async def listen(self, listener: socket.socket) -> None: ...

    def retire(self) -> None: ...

    def num_connections(self) -> int: ...


class Front:
    """`run` belongs to the event loop; `accept` and `retire` may be called on any thread, also before `run`."""

    def __init__(self, descriptor: int) -> None:
        """Raises `ConfigError` if the descriptor is not an inherited socket."""
        try:
            self.socket = socket.socket(fileno=descriptor)
        except OSError as error:
            raise ConfigError(
                f"--listen-fd {descriptor} is not a socket of the parent process: use --host and --port instead",
                param="listen_fd",
            ) from error
        self._accepts, self._retires = asyncio.Event(), asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()  # of `_loop`

    def accept(self) -> None:
        self._set(self._accepts)

    def retire(self) -> None:
        self._set(self._retires)

    def _set(self, event: asyncio.Event) -> None:
        with self._lock:
            if self._loop is None:
                event.set()
            else:
                self._loop.call_soon_threadsafe(event.set)

    async def run(self, http: Listener) -> None:
        """Return when the last connection has ended after `retire`."""
        with self._lock:
            self._loop = asyncio.get_running_loop()
        await self._accepts.wait()
        while not http.started:
            await asyncio.sleep(CHECK_INTERVAL_S)
        await http.listen(self.socket)
        await self._retires.wait()
        http.retire()
        while http.num_connections():
            await asyncio.sleep(CHECK_INTERVAL_S)
