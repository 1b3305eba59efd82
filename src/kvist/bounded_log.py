"""Limits the rate of log lines that peers and clients can cause: bad messages, refused connections, disconnects.

A flood must neither fill the disk nor hide other lines. The next logged line is preceded by the number of omitted
lines, and the counters in /metrics include all events.
"""

from __future__ import annotations

import logging

from kvist.clock import Clock, MonotonicClock


class BoundedLog:
    """Logger of at most `max_lines` warnings in each `period_s`. Mutable; used by one thread."""

    def __init__(
        self, logger: logging.Logger, *, max_lines: int = 5, period_s: float = 10.0, clock: Clock | None = None
    ) -> None:
        self._logger = logger
        self._max_lines = max_lines
        self._period_s = period_s
        self._clock = clock or MonotonicClock()
        self._period_began_s = float("-inf")
        self._num_shown = 0
        self._num_left_out = 0

    def warning(self, message: str, *arguments: object, exc_info: bool = False) -> None:
        now_s = self._clock.now_s()
        if now_s - self._period_began_s >= self._period_s:
            self._period_began_s, self._num_shown = now_s, 0
        if self._num_shown >= self._max_lines:
            self._num_left_out += 1
            return
        self._num_shown += 1
        if self._num_left_out:
            self._logger.warning("%d log lines like the next one were omitted", self._num_left_out)
            self._num_left_out = 0
        self._logger.warning(message, *arguments, exc_info=exc_info)
