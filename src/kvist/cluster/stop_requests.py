"""Receives the requests of the parent process, lines on standard input, and signals."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

from kvist.parent import continue_when_parent_dies

SHUTDOWN_DEADLINE_S = 15.0  # added to the time of open requests: from the stop request to a forced exit
STOP, HURRY = b"stop", b"hurry"  # lines on the standard input of a child
ACCEPT, RETIRE = b"accept", b"retire"  # of a router with a socket of its parent: use it, leave it to another router
STOP_SIGNALS = tuple(
    # SIGHUP (the terminal was closed) also requests a stop, unless `nohup` ignores it. SIGINT requests a stop even if
    # it was ignored: background processes of a script inherit an ignored SIGINT, and `kill -INT` would have no effect.
    number
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
)


@contextlib.contextmanager
def handle_signals(
    handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals]
) -> Iterator[None]:
    """Handle the signals `numbers` with `handler` while the body runs."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def stop_with_parent(
    *,
    stop: Callable[[], None],
    hurry: Callable[[], None],
    drain_s: float,
    other: Mapping[bytes, Callable[[], None]] | None = None,
) -> None:
    """Act on the parent's lines on standard input from now on: `STOP`, and later `HURRY` to shorten the stop; `other`
    are further lines.

    The end of standard input means that the parent is gone, and requests a stop, too. A `STOP` line and a signal may
    arrive for the same stop, because a service manager may signal parent and child at once. The process exits at most
    `drain_s` + `SHUTDOWN_DEADLINE_S` after a stop has begun. If the process is suspended (SIGSTOP) when its parent
    dies, it is continued. The functions are called on a thread."""
    continue_when_parent_dies()
    descriptor = os.dup(sys.stdin.fileno())  # not inherited by child processes
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)

    def listen() -> None:
        pending = b""
        while piece := os.read(descriptor, 1 << 12):
            *lines, pending = (pending + piece).split(b"\n")
            for line in lines:
                if line == STOP:
                    begin()
                elif line == HURRY:
                    hurry()
                elif other is not None and line in other:
                    other[line]()
        begin()

    def begin() -> None:
        timer = threading.Timer(drain_s + SHUTDOWN_DEADLINE_S, os._exit, args=(1,))
        timer.daemon = True
        timer.start()
        stop()

    threading.Thread(target=listen, name="stop-requests", daemon=True).start()


def signal_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
