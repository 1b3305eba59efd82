"""Rates of counters and quantiles of histograms over the last seconds, and the columns of a chart. PURE.

Everything is bounded: a window and a chart keep a fixed number of points, and forget the oldest first.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class CounterWindow:
    """The growth of counters in each of the last intervals. Mutable; has one owner."""

    def __init__(self, max_intervals: int) -> None:
        self._last: Mapping[str, float] | None = None
        self._last_s = 0.0
        self._intervals: deque[tuple[float, Mapping[str, float]]] = deque(maxlen=max_intervals)  # (seconds, growth)

    def update(self, now_s: float, totals: Mapping[str, float]) -> None:
        """Add the interval since the last call. A counter that is smaller than before began again at 0."""
        if self._last is not None:
            before = self._last
            growth = {name: _growth(before.get(name), value) for name, value in totals.items()}
            self._intervals.append((max(0.0, now_s - self._last_s), growth))
        self._last, self._last_s = dict(totals), now_s

    def growth(self, name: str, over_s: float) -> float:
        """Return by how much the counter grew in the last `over_s` seconds."""
        return sum(growth.get(name, 0.0) for _, growth in self._within(over_s))

    def rate(self, name: str, over_s: float) -> float:
        """Return the growth per second in the last `over_s` seconds; 0 before the first interval."""
        intervals = list(self._within(over_s))
        seconds = sum(interval_s for interval_s, _ in intervals)
        return sum(growth.get(name, 0.0) for _, growth in intervals) / seconds if seconds > 0.0 else 0.0

    def _within(self, over_s: float) -> Iterable[tuple[float, Mapping[str, float]]]:
        """Yield the newest intervals: one at least, and further ones that lie within `over_s` seconds."""
        sum_s = 0.0
        for interval_s, growth in reversed(self._intervals):
            sum_s += interval_s
            if sum_s > over_s * 1.01 and sum_s > interval_s:  # 1%: intervals of a timer are not exact
                return
            yield interval_s, growth


def _growth(before: float | None, now: float) -> float:
    if before is None:
        return 0.0  # unknown until the counter is read again
    return now - before if now >= before else now


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
