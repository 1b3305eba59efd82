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

from kvist.parent import continue_when_parent_dies

LAST_WORDS_S = 15.0  # beyond what open requests may take, from SIGTERM until the process ends whatever goes on
STOP_SIGNALS = tuple(
    # The terminal closed (SIGHUP) is a stop, too, unless `nohup` has it ignored. SIGINT is one even when ignored: the
    # background processes of a script inherit it so, and `kill -INT` would do nothing.
    number
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
)


@contextlib.contextmanager
def signals_to(handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """The body's signals of these numbers are the handler's."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def stop_at_end_of_stdin(drain_s: float) -> None:
    """From now on, end of file on standard input is SIGTERM to ourselves; the process ends after `drain_s` and
    `LAST_WORDS_S` more at the latest. A process that is stopped (SIGSTOP) goes on when its parent dies."""
    continue_when_parent_dies()
    descriptor = os.dup(sys.stdin.fileno())  # children we start get no part of it
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    threading.Thread(target=_watch, args=(descriptor, drain_s), name="watch-stdin", daemon=True).start()


def _watch(descriptor: int, drain_s: float) -> None:
    while os.read(descriptor, 1 << 12):
        pass
    last_words = threading.Timer(drain_s + LAST_WORDS_S, os._exit, args=(1,))
    last_words.daemon = True
    last_words.start()
    os.kill(os.getpid(), signal.SIGTERM)
