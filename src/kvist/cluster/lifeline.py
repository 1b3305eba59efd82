"""Ends this process when the one that started it is gone: its end of our standard input closes with it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

LAST_WORDS_S = 15.0  # from SIGTERM until we end whatever is still going on


def stop_at_end_of_stdin() -> None:
    """From now on, end of file on standard input is SIGTERM to ourselves, and after `LAST_WORDS_S` the end."""
    descriptor = os.dup(sys.stdin.fileno())  # children we start get no part of it
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    threading.Thread(target=_watch, args=(descriptor, _terminate), name="watch-stdin", daemon=True).start()


def _watch(descriptor: int, at_end: Callable[[], None]) -> None:
    while os.read(descriptor, 1 << 12):
        pass
    at_end()


def _terminate() -> None:
    last_words = threading.Timer(LAST_WORDS_S, os._exit, args=(1,))
    last_words.daemon = True
    last_words.start()
    os.kill(os.getpid(), signal.SIGTERM)
