"""Repeats reading and showing until Ctrl-C; once, if the output goes to a file or a pipe."""

from __future__ import annotations

import os
import sys
import time

from rich.console import Console
from rich.live import Live

from kvist.clock import unix_time_s
from kvist.operate.config import OperatedServer
from kvist.top.config import TopOptions
from kvist.top.source import Source
from kvist.top.view import view

_WIDTH_OF_A_FILE = 160  # characters


def run_top(server: OperatedServer, options: TopOptions, console: Console | None = None) -> int:
    """Show the figures of the server until Ctrl-C, or once; return 0. Raises `KvistError` if they are shown once and
    cannot be read, and for an error that will stay, such as one of the API key."""
    console = console or _console()
    source = Source(server)
    try:
        if options.once or not console.is_terminal:
            console.print(view(source.read(), url=server.url, width=console.width, now_unix_s=unix_time_s()))
            return 0
        _follow(source, server.url, options.interval_s, console)
    except KeyboardInterrupt:
        pass
    finally:
        source.close()
    return 0


def _console() -> Console:
    """Return the terminal; a file or a pipe is as wide as `COLUMNS` says, or wide enough for all columns."""
    terminal = Console(file=sys.stdout, highlight=False)
    wide = not terminal.is_terminal and "COLUMNS" not in os.environ
    return Console(file=sys.stdout, highlight=False, width=_WIDTH_OF_A_FILE) if wide else terminal


def _follow(source: Source, url: str, interval_s: float, console: Console) -> None:
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            reading = source.read_again(unix_time_s())
            live.update(view(reading, url=url, width=console.width, now_unix_s=unix_time_s()), refresh=True)
            time.sleep(interval_s)
