"""Log lines: one format for every process, to standard error.

`kvist.` loggers carry what operators read; libraries are shown from WARNING up. Secrets are never given to a logger.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

from kvist.config import option

LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    log_level: str = option("info", "the least severe log lines to show", choices=LEVELS)


def setup_logging(level: str) -> None:
    """Call once, first thing in a process. A second call only changes the level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("kvist").setLevel(level.upper())
