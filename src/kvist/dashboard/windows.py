"""Rates of counters and quantiles of histograms over the last seconds, and the columns of a chart. PURE.

Everything is bounded: a window and a chart keep a fixed number of points, and forget the oldest first.
"""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class CounterWindow:
    """Readings of counters, and their growth in the last seconds. Mutable; has one owner."""

    def __init__(self, max_intervals: int) -> None:
        self._totals: Mapping[str, float] = {}  # as read last
        self._lost: defaultdict[str, float] = defaultdict(float)  # counted before a counter began again at 0
        self._readings: deque[tuple[float, Mapping[str, float]]] = deque(maxlen=max_intervals + 1)  # (time, sums)

    def update(self, now_s: float, totals: Mapping[str, float]) -> None:
        """Add a reading, which has the same counters each time. A counter that is smaller than before began
        again at 0."""
        for name, before in self._totals.items():
            if totals[name] < before:
                self._lost[name] += before
        self._totals = totals
        lost = self._lost
        self._readings.append((now_s, {name: value + lost[name] for name, value in totals.items()} if lost else totals))

    def growth(self, name: str, over_s: float) -> float:
        """Return by how much the counter grew in the last `over_s` seconds."""
        if len(self._readings) < 2:
            return 0.0
        _, before = self._before(over_s)
        return self._readings[-1][1][name] - before[name]

    def rate(self, name: str, over_s: float) -> float:
        """Return the growth per second in the last `over_s` seconds; 0 before the second reading."""
        if len(self._readings) < 2:
            return 0.0
        (before_s, before), (now_s, now) = self._before(over_s), self._readings[-1]
        return (now[name] - before[name]) / (now_s - before_s) if now_s > before_s else 0.0

    def _before(self, over_s: float) -> tuple[float, Mapping[str, float]]:
        """Return the oldest reading within `over_s` seconds, and at least the last but one."""
        since_s = self._readings[-1][0] - over_s * 1.01  # 1%: the intervals of a timer are not exact
        found = bisect.bisect_left(self._readings, since_s, key=lambda reading: reading[0])
        return self._readings[min(found, len(self._readings) - 2)]


class HistogramWindow:
    """The values that a histogram got in the last intervals. Mutable; has one owner."""

    def __init__(self, bounds: Sequence[float], max_intervals: int) -> None:
        """`bounds`: the upper bounds of all buckets but the last, which has none."""
        self._bounds = bounds
        self._readings: deque[Sequence[int]] = deque(maxlen=max_intervals + 1)

    def update(self, counts: Sequence[int]) -> None:
        """Add a reading of the histogram: the number of values in each bucket since it began."""
        self._readings.append(counts)

    def quantiles(self, num_intervals: int, *shares: float) -> list[float | None]:
        """Return the values below which these shares of the values in the last intervals lie; None without values."""
        if not self._readings:
            return [None] * len(shares)
        before = self._readings[max(0, len(self._readings) - 1 - num_intervals)]
        counts = [now - earlier for earlier, now in zip(before, self._readings[-1], strict=True)]
        return [quantile(self._bounds, counts, share) for share in shares]


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """Return the value below which `share` (0 to 1) of the values lie, as if they were spread evenly within each
    bucket. Values above the last bound count as that bound. Returns None without values."""
    total = sum(counts)
    if total <= 0:
        return None
    wanted, lower = share * total, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and wanted <= count:
            return lower + (bound - lower) * wanted / count
        wanted -= count
        lower = bound
    return lower


class Chart:
    """The last points of several lines with common times. Mutable; has one owner."""

    def __init__(self, names: Sequence[str], max_points: int) -> None:
        self._times: deque[float] = deque(maxlen=max_points)
        self._lines: dict[str, deque[float | None]] = {name: deque(maxlen=max_points) for name in names}

    def append(self, time: float, values: Mapping[str, float | None]) -> None:
        """Add a point. `values` has every name; None is a gap in the line."""
        self._times.append(time)
        for name, line in self._lines.items():
            line.append(values[name])

    def times(self, num_points: int) -> list[float]:
        return _last(self._times, num_points)

    def lines(self, num_points: int) -> dict[str, list[float | None]]:
        """Return the newest points of each line, the oldest first."""
        return {name: _last(line, num_points) for name, line in self._lines.items()}


def _last(values: deque[T], number: int) -> list[T]:
    return list(itertools.islice(values, max(0, len(values) - number), None))
