"""Draws the runs of a report as one SVG picture: latencies over time and their distributions. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

from kvist.bench.completions import Row
from kvist.bench.report import Run

T = TypeVar("T")

MAX_POINTS = 2000  # of one chart; of more, every n-th is drawn
_WIDTH, _HEIGHT, _GAP = 340, 200, 70  # of one chart, and between charts
_FIGURES = (("Time to first token", "ttft_s"), ("Inter-token latency, p99 of a request", "itl_p99_s"))
_TITLE, _LEFT, _BOTTOM = 46, 60, 56
_NOW, _BEFORE, _FAILED, _GRID, _TEXT = "#2f6f9f", "#a8a8a8", "#c0392b", "#dddddd", "#444444"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chart:
    """Axes: both begin at 0."""

    x: int  # of the left upper corner, in pixels
    y: int
    title: str
    x_name: str
    y_name: str
    x_max: float
    y_max: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the place of a point in the picture."""
        return self.x + _WIDTH * min(1.0, x / self.x_max), self.y + _HEIGHT * (1 - min(1.0, y / self.y_max))

    def frame(self) -> Iterator[str]:
        yield _text(self.x, self.y - 10, self.title, weight="bold")
        for value in ticks(self.x_max):
            x, bottom = self.at(value, 0)
            yield _line(x, self.y, x, bottom, _GRID)
            yield _text(x, bottom + 16, _number(value), anchor="middle")
        for value in ticks(self.y_max):
            left, y = self.at(0, value)
            yield _line(left, y, left + _WIDTH, y, _GRID)
            yield _text(left - 6, y + 4, _number(value), anchor="end")
        yield _text(self.x + _WIDTH, self.y + _HEIGHT + 32, self.x_name, anchor="end")
        yield _text(self.x + 4, self.y + 12, self.y_name)


def picture(runs: Sequence[Run], before: Mapping[str, Run]) -> str:
    """Return the picture; `before` has the runs of the baseline by name, drawn in grey."""
    row_height = _TITLE + _HEIGHT + _BOTTOM
    width, height = 3 * (_LEFT + _WIDTH) + 2 * (_GAP - _LEFT) + 30, row_height * len(runs)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    for number, run in enumerate(runs):
        parts += _run(run, before.get(run.name), row_height * number)
    return "".join([*parts, "</svg>\n"])


def _run(run: Run, before: Run | None, top: int) -> Iterator[str]:
    summary, y = run.summary, top + _TITLE
    yield _text(
        10,
        top + 18,
        f"{run.name}: {summary.num_succeeded} of {summary.num_requests} requests, {summary.wall_s:.1f} s, "
        f"{summary.output_tokens_per_s:.1f} output tokens/s" + ("" if before is None else "; grey: the baseline"),
        weight="bold",
    )
    pairs = [(_BEFORE, before), (_NOW, run)]
    rows = {color: [row for row in each.rows if row.failure is None] for color, each in pairs if each is not None}
    yield from _over_time(run, rows, _LEFT, y)
    for place, (title, figure) in enumerate(_FIGURES):
        values = {color: sorted(_milliseconds(each, figure)) for color, each in rows.items()}
        yield from _shares(title, values, _LEFT + (place + 1) * (_WIDTH + _GAP), y)


def _over_time(run: Run, rows: Mapping[str, Sequence[Row]], x: int, y: int) -> Iterator[str]:
    """Yield a dot for each request: when it was sent, and its time to the first token. Failed requests are red."""
    points = {
        color: [(row.sent_s, 1000 * row.ttft_s) for row in each if row.sent_s is not None and row.ttft_s is not None]
        for color, each in rows.items()
    }
    failed = [row.sent_s for row in run.rows if row.failure is not None and row.sent_s is not None]
    chart = _Chart(
        x=x,
        y=y,
        title="Time to first token of each request",
        x_name="sent after s",
        y_name="ms",
        x_max=axis_end([sent_s for each in points.values() for sent_s, _ in each] + failed),
        y_max=axis_end([ttft_ms for each in points.values() for _, ttft_ms in each]),
    )
    yield from chart.frame()
    for color, each in points.items():
        for point in thinned(each):
            place = chart.at(*point)
            yield f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="2" fill="{color}" fill-opacity="0.6"/>'
    for sent_s in thinned(failed):
        place = chart.at(sent_s, 0)
        yield _line(place[0], place[1] - 8, place[0], place[1], _FAILED)


def _shares(title: str, values: Mapping[str, Sequence[float]], x: int, y: int) -> Iterator[str]:
    """Yield a curve: the share of the requests whose figure was at most the milliseconds of the axis."""
    longest = axis_end([value for each in values.values() for value in each])
    chart = _Chart(x=x, y=y, title=title, x_name="at most ms", y_name="% of requests", x_max=longest, y_max=100.0)
    yield from chart.frame()
    for color, each in values.items():
        steps = [(value, 100.0 * (number + 1) / len(each)) for number, value in enumerate(each)]
        places = [chart.at(*step) for step in thinned(steps)]
        if places:
            path = " ".join(f"{place[0]:.1f},{place[1]:.1f}" for place in [chart.at(each[0], 0), *places])
            yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>'


def _milliseconds(rows: Sequence[Row], figure: str) -> list[float]:
    return [1000 * value for row in rows if (value := getattr(row, figure)) is not None]


def thinned(points: Sequence[T]) -> list[T]:
    """Return at most `MAX_POINTS` of the points, evenly chosen, the last one among them."""
    step = max(1, -(-len(points) // MAX_POINTS))
    return [*points[:-1:step][: MAX_POINTS - 1], *points[-1:]]


def axis_end(values: Sequence[float]) -> float:
    """Return a round number that no value exceeds, and that is above 0."""
    highest = max(values, default=0.0)
    if highest <= 0:
        return 1.0
    step = 10.0 ** math.floor(math.log10(highest))
    return next(factor * step for factor in (1.0, 2.0, 2.5, 5.0, 10.0, 20.0) if factor * step >= highest)


def ticks(end: float) -> list[float]:
    return [end * quarter / 4 for quarter in range(5)]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{_TEXT}">'
        f"{escape(text)}</text>"
    )
