"""Runs the application in this process: uvicorn on uvloop and httptools, until it is told to stop."""

from __future__ import annotations

import uvicorn
from starlette.types import ASGIApp

from kvist.server.config import ServerConfig

_KEEP_ALIVE_S = 30


def http_server(app: ASGIApp, config: ServerConfig) -> uvicorn.Server:
    """A server that is not started: `await serve()` runs it, `should_exit = True` stops it.

    Stopping is bounded: open requests have `shutdown_timeout_s`, then they are cancelled, which aborts them at the
    engines. It installs signal handlers only when run in the main thread.
    """
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        loop="none",  # the caller's: see event_loop.py
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,  # log.py has set logging up
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(config.shutdown_timeout_s)),
        backlog=2048,
    )
    return uvicorn.Server(settings)
