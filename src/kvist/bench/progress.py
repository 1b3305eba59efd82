"""Shows the progress of a scenario on standard error: a bar on a terminal, else a log line every 10 s.

The measuring loop writes the line itself, in microseconds. A library's progress bar takes milliseconds for each update,
which would be measured as a pause of the server.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

LINE_INTERVAL_S, LOG_INTERVAL_S = 0.5, 10.0
_BAR_CHARS = 20
_CLEAR = "\r\x1b[2K"

logger = logging.getLogger(__name__)


class ProgressLine:
    """Mutable; owned by one scenario. `show` may be called at any rate, `close` once."""

    def __init__(self, name: str, count: int, *, start_s: float, stream: TextIO | None = None) -> None:
        self._name = name
        self._count = count
        self._start_s = start_s
        self._stream = stream or sys.stderr
        self._on_terminal = self._stream.isatty()
        self._interval_s = LINE_INTERVAL_S if self._on_terminal else LOG_INTERVAL_S
        self._next_s = start_s + self._interval_s

    def show(self, num_done: int, now_s: float) -> None:
        if now_s < self._next_s:
            return
        self._next_s = now_s + self._interval_s
        estimate = _estimate(num_done, self._count, now_s - self._start_s)
        text = f"{self._name}: {num_done} of {self._count} requests, {estimate}"
        if self._on_terminal:
            self._stream.write(f"{_CLEAR}{_bar(num_done / max(1, self._count))} {text}")
            self._stream.flush()
        else:
            logger.info("%s", text)

    def close(self) -> None:
        """Erase the line, so that the next output begins there."""
        if self._on_terminal:
            self._stream.write(_CLEAR)
            self._stream.flush()


def _bar(share: float) -> str:
    done = round(_BAR_CHARS * min(1.0, share))
    return f"[{'#' * done}{'.' * (_BAR_CHARS - done)}]"


def _estimate(num_done: int, count: int, elapsed_s: float) -> str:
    """Return elapsed and remaining time; the rest is assumed to be as fast as the requests so far."""
    if not num_done:
        return f"{elapsed_s:.0f} s so far"
    return f"{elapsed_s:.0f} s so far, about {elapsed_s / num_done * (count - num_done):.0f} s left"
