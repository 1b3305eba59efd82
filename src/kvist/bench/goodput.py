"""Goodput: the requests a second that keep to stated limits. Pure.

A limit is written as in vLLM's `--goodput`, FIGURE:MILLISECONDS, and optionally for one class of requests only:
`chat.ttft:500`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvist.errors import ConfigError

if TYPE_CHECKING:  # the settings of every verb import this module
    from kvist.bench.completions import Row

CHAT, LONG = "chat", "long"
CLASSES = (CHAT, LONG)
_FIELDS = {"ttft": "ttft_s", "tpot": "tpot_s", "itl": "itl_p99_s", "gap": "max_gap_s", "e2el": "e2e_s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    figure: str  # key of _FIELDS
    limit_s: float
    request_class: str | None = None  # None: every request

    def allows(self, row: Row) -> bool:
        """Return whether an answered request keeps to the limit. A figure that the answer has not keeps to any."""
        if self.request_class not in (None, row.request_class):
            return True
        value: float | None = getattr(row, _FIELDS[self.figure])
        return value is None or value <= self.limit_s


def parse_limits(texts: Sequence[str]) -> list[Limit]:
    """Parse limits such as "itl:25" and "chat.ttft:500". Raises `ConfigError`."""
    return [_parse(text) for text in texts]


def _parse(text: str) -> Limit:
    match = re.fullmatch(r"(?:([a-z]+)\.)?([a-z0-9]+):(\d+(?:\.\d+)?)", text)
    if match is None or match[2] not in _FIELDS or match[1] not in (None, *CLASSES) or float(match[3]) <= 0:
        raise ConfigError(
            f"--goodput: {text!r} is not a limit; use FIGURE:MILLISECONDS or CLASS.FIGURE:MILLISECONDS, as in "
            f"chat.ttft:500, with a figure of {', '.join(_FIELDS)} and a class of {', '.join(CLASSES)}",
            param="goodput",
        )
    return Limit(request_class=match[1], figure=match[2], limit_s=float(match[3]) / 1e3)


def count_good(rows: Sequence[Row], limits: Sequence[Limit]) -> int:
    """Return how many requests were answered within all limits that apply to them. A failed request was not."""
    return sum(row.failure is None and all(limit.allows(row) for limit in limits) for row in rows)
