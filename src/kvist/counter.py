"""Declares counters: totals that only grow, from the start of an engine, sent in `LoadReport.totals`.

A counter is declared once, in the `counters.py` of the room that counts it. /metrics and docs/metrics.md read the
declarations; engine/counters.py collects them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    name: str  # in `LoadReport.totals`; in /metrics it is kvist:worker_<name>_total
    unit: str  # the plural of what is counted: "pages", "bytes", "seconds"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterGroup:
    """The counters of one room."""

    owner: str  # the room
    section: str  # heading in docs/metrics.md
    counters: tuple[Counter, ...]

    def names(self) -> tuple[str, ...]:
        return tuple(counter.name for counter in self.counters)

    def zeros(self) -> dict[str, float]:
        return dict.fromkeys(self.names(), 0.0)

    def filled(self, counted: Mapping[str, float]) -> dict[str, float]:
        """Return the value of every counter: 0 for those that were not counted, because their part does not exist."""
        filled = {**self.zeros(), **counted}
        assert len(filled) == len(self.counters), f"{self.owner} counts what it has not declared: {sorted(counted)}"
        return filled
