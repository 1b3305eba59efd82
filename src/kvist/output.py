"""Lines to a descriptor whose reader may be slow, or not there: writing never blocks.

A line goes out at once where there is room. Else it waits here, up to `MAX_PENDING_BYTES`, and a thread writes it when
the reader goes on; more lines are dropped and counted, and the reader is told how many. Lines of at most
`log.MAX_LINE_BYTES` are written whole.
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
FLUSH_S = 0.5  # at the end, for a reader to take what is pending

_PIPE_BUF = select.PIPE_BUF


@functools.cache
def output_to(descriptor: int) -> LineOutput:
    """The one of this process for standard output (1) or standard error (2)."""
    return LineOutput(descriptor)


class LineOutput:
    """Safe to use from any thread. One for each descriptor of a process: what is pending is in order."""

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
        """`line` without its `end`."""
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
        """Wait for what is pending, at most so long."""
        drainer = self._drainer
        if drainer is not None:
            drainer.join(timeout_s)

    def _write_now(self, data: bytes) -> bytes:
        """What there was no room for. Nothing when the reader is gone: its lines are for nobody."""
        try:
            while data and (num_written := self._write_some(data[:_PIPE_BUF])):
                data = data[num_written:]
        except BlockingIOError:
            return data
        except OSError:
            return b""
        return data

    def _drain(self) -> None:
        """Until nothing is pending."""
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
    """Writes some bytes without waiting; 0 or `BlockingIOError` when there is no room."""
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return lambda data: os.write(descriptor, data)
    if stat.S_ISSOCK(kind):
        connection = socket.socket(fileno=os.dup(descriptor))
        return lambda data: connection.send(data, socket.MSG_DONTWAIT)
    with contextlib.suppress(OSError):
        # Opened anew it does not block, and the processes that share the old description keep theirs as it is.
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        return lambda data: os.write(own, data)

    def write_where_there_is_room(data: bytes) -> int:
        if not select.select((), (descriptor,), (), 0)[1]:
            return 0
        return os.write(descriptor, data)

    return write_where_there_is_room
