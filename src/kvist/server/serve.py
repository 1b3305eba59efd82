"""Runs the application in this process: uvicorn on uvloop and httptools, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from kvist.clock import Clock, MonotonicClock
from kvist.errors import ConfigError
from kvist.server.config import ServerConfig
from kvist.server.protocol import Bounds, bounded_protocol
from kvist.server.traffic import Traffic

logger = logging.getLogger(__name__)

_KEEP_ALIVE_S = 30
_WATCH_S = 0.1
_SWITCH_S = 0.0005  # after which a thread lets the event loop have the interpreter; Python's own is 5 ms
_OTHER_FILES = 256  # open in this process beside HTTP connections, at most
CLOSE_TIMEOUT_S = 2


class _Server(uvicorn.Server):
    def __init__(self, settings: uvicorn.Config, traffic: Traffic) -> None:
        super().__init__(settings)
        self._traffic = traffic

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Notes meanwhile how late the event loop wakes up: every stream waits for as long."""
        watch = asyncio.create_task(watch_loop_lag(self._traffic.observe_loop_lag, MonotonicClock()), name="loop lag")
        try:
            await super().serve(sockets)
        finally:
            watch.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would take the first signal for the end of the port, and raise it again afterwards."""
        yield


def http_server(app: ASGIApp, traffic: Traffic, config: ServerConfig) -> uvicorn.Server:
    """A server that is not started: `await serve()` runs it, `should_exit = True` stops it. `traffic` hears of what is
    refused before the app sees it. Raises `ConfigError` for a certificate that cannot be used.

    The caller ends open requests first; those left have `CLOSE_TIMEOUT_S`, then they are cancelled. Signals are the
    caller's, too.
    """
    _tune_interpreter()
    bounds = Bounds(max_connections=_connection_limit(config.max_connections), header_timeout_s=config.header_timeout_s)
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        loop="none",  # the caller's: see event_loop.py
        http=cast(type[asyncio.Protocol], bounded_protocol(bounds, traffic)),
        ws="none",
        lifespan="off",
        log_config=None,  # log.py has set logging up
        access_log=False,
        server_header=False,
        proxy_headers=False,  # anybody on this machine could call himself another client
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        backlog=2048,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        ssl_keyfile_password="",  # else OpenSSL asks the terminal
    )
    try:
        settings.load()
    except (OSError, ssl.SSLError) as error:
        files = f"--ssl-certfile {config.ssl_certfile} --ssl-keyfile {config.ssl_keyfile}"
        raise ConfigError(f"cannot serve HTTPS with {files}: {error}", param="ssl_certfile") from error
    return _Server(settings, traffic)


async def watch_loop_lag(note_lag_s: Callable[[float], None], clock: Clock) -> None:
    """Until it is cancelled."""
    while True:
        due_s = clock.now_s() + _WATCH_S
        await asyncio.sleep(_WATCH_S)
        note_lag_s(max(0.0, clock.now_s() - due_s))


def _tune_interpreter() -> None:
    """So that streams do not wait for what other threads of this process do (work.py), nor for the garbage collector to
    look at the tokenizer once more."""
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()


def _connection_limit(max_connections: int) -> int:
    """As many connections as this process may have files for: its limit is raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == wanted:
        return max_connections
    fewer = max(1, allowed - _OTHER_FILES)
    logger.warning("this process may open %d files (ulimit -n): --max-connections is lowered to %d", allowed, fewer)
    return fewer
