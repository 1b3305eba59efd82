"""The report of an upgrade: a row for each process, and the longest pause of a stream meanwhile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

PauseCounts = Mapping[float, float]  # number of pauses up to a length in seconds (the key), cumulative


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One process. None: unknown, or not measured for this kind of process."""

    process: str
    old_version: str | None = None
    new_version: str | None = None
    seconds: float = 0.0
    num_pages: int | None = None  # of the host tier, that the new worker had when it began to serve
    longest_pause_s: float | None = None  # an upper bound; 0: no stream got a token meanwhile
    problem: str = ""  # why the process was not replaced


def longest_pause_s(before: PauseCounts, after: PauseCounts) -> float:
    """Return a bound on the longest pause counted between two readings of one router, in seconds; 0 if there is none.
    `before` is empty for a router that started in between."""
    longest, num_shorter = 0.0, 0.0
    for bound_s in sorted(after):
        num_up_to = after[bound_s] - before.get(bound_s, 0.0)
        if num_up_to > num_shorter:
            longest, num_shorter = bound_s, num_up_to
    return longest


def table(rows: Sequence[Row]) -> str:
    """Return the report as lines of text."""
    header = ("process", "old version", "new version", "seconds", "pages kept", "longest pause")
    cells = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = ["  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cells(row: Row) -> tuple[str, ...]:
    if row.problem:
        return (row.process, row.old_version or "?", "not replaced", f"{row.seconds:.1f}", "-", "-")
    return (
        row.process,
        row.old_version or "?",
        row.new_version or "?",
        f"{row.seconds:.1f}",
        "-" if row.num_pages is None else str(row.num_pages),
        _pause(row.longest_pause_s),
    )


def _pause(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds == 0:
        return "no stream"
    return "over 300 s" if math.isinf(seconds) else f"under {seconds:g} s"
