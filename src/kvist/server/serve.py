"""Runs the application in this process: uvicorn on uvloop and httptools, until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import resource
import ssl
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from kvist.errors import ConfigError
from kvist.server.config import ServerConfig
from kvist.server.protocol import Bounds, bounded_protocol
from kvist.server.traffic import Traffic

log = logging.getLogger(__name__)

_KEEP_ALIVE_S = 30
_OTHER_FILES = 256  # open in this process beside HTTP connections, at most


def http_server(app: ASGIApp, traffic: Traffic, config: ServerConfig) -> uvicorn.Server:
    """A server that is not started: `await serve()` runs it, `should_exit = True` stops it. `traffic` hears of what is
    refused before the app sees it. Raises `ConfigError` for a certificate that cannot be used.

    Stopping is bounded: open requests have `shutdown_timeout_s`, then they are cancelled, which aborts them at the
    engines. It installs signal handlers only when run in the main thread.
    """
    bounds = Bounds(max_connections=_affordable(config.max_connections), header_timeout_s=config.header_timeout_s)
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
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(config.shutdown_timeout_s)),
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
    return uvicorn.Server(settings)


def _affordable(max_connections: int) -> int:
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
    log.warning("this process may open %d files (ulimit -n): --max-connections is %d", allowed, fewer)
    return fewer
