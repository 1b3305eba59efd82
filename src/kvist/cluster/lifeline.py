"""How this process is told to end: by signals, or because the one that started it is gone, and its end of our standard
input closes with it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

LAST_WORDS_S = 15.0  # from SIGTERM until we end whatever is still going on


@contextlib.contextmanager
def signals_to(handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """The body's signals of these numbers are the handler's."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


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
