"""Writes lines to a descriptor whose reader may be slow or gone, without blocking.

A line is written at once if the descriptor has room. Otherwise it waits in memory, up to `MAX_PENDING_BYTES`, and a
thread writes it when the reader continues. Further lines are dropped, and a line in the output reports their number.
Lines of at most `log.MAX_LINE_BYTES` are written whole.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import stat
import threading
from collections import deque
from collections.abc import Callable

MAX_PENDING_BYTES = 1 << 18
FLUSH_S = 0.5  # at exit, time for the reader to read pending lines

_PIPE_BUF = select.PIPE_BUF


@functools.cache
def output_to(descriptor: int) -> LineOutput:
    """Return this process's `LineOutput` of standard output (1) or standard error (2)."""
    return LineOutput(descriptor)


class LineOutput:
    """Output of lines to one descriptor. Thread-safe. One per descriptor of a process, to keep lines in order."""

    def __init__(self, descriptor: int) -> None:
        self.num_dropped = 0
        self._write_some = _writer(descriptor)
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._pending: deque[bytes] = deque()
        self._num_pending_bytes = 0
        self._num_dropped_unreported = 0
        self._drainer: threading.Thread | None = None

    def write(self, line: str, *, end: str = "\n") -> None:
        """Write `line` followed by `end`."""
        data = (line + end).encode("utf-8", "replace")
        with self._lock:
            if not self._pending:
                data = self._write_now(data)
            if not data:
                return
            if self._num_pending_bytes + len(data) > MAX_PENDING_BYTES:
                self.num_dropped += 1
                self._num_dropped_unreported += 1
                return
            self._pending.append(data)
            self._num_pending_bytes += len(data)
            if self._drainer is None:
                self._drainer = threading.Thread(target=self._drain, name="kvist-output", daemon=True)
                self._drainer.start()

    def flush(self, timeout_s: float = FLUSH_S) -> None:
        """Wait up to `timeout_s` for pending lines to be written."""
        drainer = self._drainer
        if drainer is not None:
            drainer.join(timeout_s)

    def _write_now(self, data: bytes) -> bytes:
        """Write without blocking. Return the bytes that did not fit; nothing if the reader is gone."""
        try:
            while data and (num_written := self._write_some(data[:_PIPE_BUF])):
                data = data[num_written:]
        except BlockingIOError:
            return data
        except OSError:
            return b""
        return data

    def _drain(self) -> None:
        """Write pending lines until there are none."""
        while True:
            with contextlib.suppress(OSError, ValueError):
                select.select((), (self._descriptor,), ())
            with self._lock:
                while self._pending and not (rest := self._write_now(self._pending[0])):
                    self._num_pending_bytes -= len(self._pending.popleft())
                if self._pending:
                    self._num_pending_bytes -= len(self._pending[0]) - len(rest)
                    self._pending[0] = rest
                    continue
                if self._num_dropped_unreported:
                    num_dropped, self._num_dropped_unreported = self._num_dropped_unreported, 0
                    note = f"kvist: {num_dropped} lines of output were dropped: their reader was too slow\n"
                    self._pending.append(note.encode())
                    self._num_pending_bytes += len(note)
                    continue
                self._drainer = None
                return


def _writer(descriptor: int) -> Callable[[bytes], int]:
    """Return a function that writes some bytes without blocking; without room it returns 0 or raises
    `BlockingIOError`."""
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return lambda data: os.write(descriptor, data)
    if stat.S_ISSOCK(kind):
        connection = socket.socket(fileno=os.dup(descriptor))
        return lambda data: connection.send(data, socket.MSG_DONTWAIT)
    with contextlib.suppress(OSError):
        # A new open file description is non-blocking without changing the one shared with other processes.
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        return lambda data: os.write(own, data)

    def write_where_there_is_room(data: bytes) -> int:
        if not select.select((), (descriptor,), (), 0)[1]:
            return 0
        return os.write(descriptor, data)

    return write_where_there_is_room
