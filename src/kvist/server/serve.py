"""Serves the application in this process with uvicorn (uvloop, httptools) until `should_exit` is set."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import socket
import ssl
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from kvist.clock import Clock, MonotonicClock
from kvist.errors import ConfigError
from kvist.http.protocol import BoundedProtocol, Bounds, bounded_protocol
from kvist.http.traffic import Traffic
from kvist.server.config import ServerConfig, TlsOptions
from kvist.server.middleware import Background

NO_TLS = TlsOptions()

logger = logging.getLogger(__name__)

_KEEP_ALIVE_S = 30
_WATCH_S = 0.1
_SWITCH_S = 0.0005  # interpreter switch interval between threads and the event loop; Python's default is 5 ms
_OTHER_FILES = 256  # upper bound of open files in this process other than HTTP connections
CLOSE_TIMEOUT_S = 2


class HttpServer(uvicorn.Server):
    """uvicorn's server, which can also listen on further sockets, and leave all its sockets to another process."""

    def __init__(self, settings: uvicorn.Config, traffic: Traffic, background: Sequence[Background]) -> None:
        super().__init__(settings)
        self._traffic = traffic
        self._background = background
        self._tasks: list[asyncio.Task[None]] = []  # of `background`

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, and record the lag of the event loop meanwhile: the lag delays every stream."""
        watch = asyncio.create_task(watch_loop_lag(self._traffic.observe_loop_lag, MonotonicClock()), name="loop lag")
        self._tasks = [asyncio.create_task(_logging_bugs(run), name="background") for run in self._background]
        try:
            await super().serve(sockets)
        finally:
            watch.cancel()
            self._end_background()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._end_background()  # first: streams that it feeds must not delay the end
        await super().shutdown(sockets)

    def _end_background(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def listen(self, listener: socket.socket) -> None:
        """Accept connections on another socket, too. The server must have started."""

        def connection() -> asyncio.Protocol:
            make = cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class)
            return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

        loop, config = asyncio.get_running_loop(), self.config
        self.servers.append(await loop.create_server(connection, sock=listener, ssl=config.ssl, backlog=config.backlog))

    def retire(self) -> None:
        """Accept no more connections. Open ones serve their current request or the next one, and end."""
        self._end_background()
        for server in self.servers:
            server.close()
        for connection in self.server_state.connections:
            cast(BoundedProtocol, connection).retire()

    def num_connections(self) -> int:
        return len(self.server_state.connections)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the caller: uvicorn would close the port at the first signal and raise it again later."""
        yield


def http_server(
    app: ASGIApp,
    traffic: Traffic,
    config: ServerConfig,
    tls: TlsOptions = NO_TLS,
    *,
    background: Sequence[Background] = (),
) -> HttpServer:
    """Return a server that is not started: `await serve()` runs it, `should_exit = True` stops it.

    `traffic` counts requests that are refused before the app sees them. `background` runs while the server accepts
    connections. Raises `ConfigError` for an unusable
    certificate. The caller handles signals and ends open requests before it stops the server; requests that are still
    open then are cancelled after `CLOSE_TIMEOUT_S`.
    """
    _tune_interpreter()
    bounds = Bounds(max_connections=_connection_limit(config.max_connections), header_timeout_s=config.header_timeout_s)
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        loop="none",  # the caller provides the loop: see event_loop.py
        http=cast(type[asyncio.Protocol], bounded_protocol(bounds, traffic)),
        ws="none",
        lifespan="off",
        log_config=None,  # log.py has configured logging
        access_log=False,
        server_header=False,
        proxy_headers=False,  # any local process could claim another client's address
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        backlog=2048,
        ssl_certfile=tls.ssl_certfile,
        ssl_keyfile=tls.ssl_keyfile,
        ssl_keyfile_password="",  # otherwise OpenSSL prompts on the terminal
    )
    try:
        settings.load()
    except (OSError, ssl.SSLError) as error:
        files = f"--ssl-certfile {tls.ssl_certfile} --ssl-keyfile {tls.ssl_keyfile}"
        raise ConfigError(f"cannot serve HTTPS with {files}: {error}", param="ssl_certfile") from error
    return HttpServer(settings, traffic, background)


async def _logging_bugs(run: Background) -> None:
    try:
        await run()
    except Exception:  # our bug: the server continues without this
        logger.exception("bug in a task of the server")


async def watch_loop_lag(note_lag_s: Callable[[float], None], clock: Clock) -> None:
    """Report how late the event loop wakes up, every `_WATCH_S`, until cancelled."""
    while True:
        due_s = clock.now_s() + _WATCH_S
        await asyncio.sleep(_WATCH_S)
        note_lag_s(max(0.0, clock.now_s() - due_s))


def _tune_interpreter() -> None:
    """Keep streams from waiting for worker threads (work.py), and for the garbage collector to scan the tokenizer."""
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()


def _connection_limit(max_connections: int) -> int:
    """Raise the limit of open files where needed, and return how many connections fit below it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == wanted:
        return max_connections
    fewer = max(1, allowed - _OTHER_FILES)
    logger.warning("the limit of open files is %d (ulimit -n): --max-connections is reduced to %d", allowed, fewer)
    return fewer
