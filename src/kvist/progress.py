"""Shows the progress of one start: on a terminal one changing line, elsewhere a few log lines.

A share such as "loading weights 40%" is a bar on a terminal.
"""

from __future__ import annotations

import logging
import re
import sys

from kvist.clock import MonotonicClock
from kvist.output import output_to

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 10.0
BAR_CHARS = 20
_SHARE = re.compile(r"(.*) (\d{1,3})%")


def with_bar(text: str) -> str:
    """Return a text that ends with a share, "loading weights 40%", with a bar; other texts as they are."""
    found = _SHARE.fullmatch(text)
    if found is None:
        return text
    num_full = BAR_CHARS * min(100, int(found[2])) // 100
    return f"{found[1]} {'█' * num_full}{'░' * (BAR_CHARS - num_full)} {found[2]}%"


class StartProgress:
    """Shows the stages of one start: one changing line on a terminal, else a log line for each stage, and one every
    `REPORT_INTERVAL_S` within it."""

    def __init__(self) -> None:
        self._clock = MonotonicClock()
        self._stage = ""
        self._next_s = 0.0

    def __call__(self, text: str) -> None:
        found, now_s = _SHARE.fullmatch(text), self._clock.now_s()
        stage = found[1] if found else text
        if sys.stderr.isatty():
            # the cursor stays at the start of the line, so that the next log line overwrites it
            output_to(sys.stderr.fileno()).write(f"\x1b[2K{with_bar(text)}\r", end="")
        elif stage != self._stage or now_s >= self._next_s:
            logger.info("%s", stage if stage != self._stage else text)
            self._next_s = now_s + REPORT_INTERVAL_S
        self._stage = stage
