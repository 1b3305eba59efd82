"""Shows a plan to people: as a table, and as a page with a timeline. The same before a run and after it."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from statistics import median

from kvist.planning.graph import Graph, Operation, Tool, describe, state_name
from kvist.planning.plan import Plan

_FACTOR = 2.0  # a request that took this many times its prediction, or its inverse, is marked
_LEAST_MS = 20.0  # shorter times are noise
_COLORS = {
    "prefill": "#2f6f9f",
    "decode": "#b5651d",
    "prefill, decode": "#6b4e9b",
    "warm": "#3b8f5a",
    "tool": "#888888",
}
_ROW_PX, _CHART_PX, _LABEL_PX = 22, 720, 330


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line: an operation, or a prefix that is computed ahead. Times in milliseconds since the start."""

    what: str
    place: str  # "file.py:12"
    state: str
    work: str
    worker: str = ""
    num_cached_tokens: int | None = None
    num_computed_tokens: int | None = None
    start_ms: float | None = None
    predicted_ms: float | None = None
    took_ms: float | None = None  # None: before the run
    reason: str = ""

    @property
    def error_ratio(self) -> float | None:
        """The time as a multiple of its prediction; None before the run, and without a prediction."""
        return self.took_ms / self.predicted_ms if self.took_ms is not None and self.predicted_ms else None

    @property
    def is_off(self) -> bool:
        """Whether the time was twice the prediction, or half of it."""
        if self.took_ms is None or not self.predicted_ms:
            return False
        longer, shorter = max(self.took_ms, self.predicted_ms), min(self.took_ms, self.predicted_ms)
        return longer > _LEAST_MS and longer > _FACTOR * shorter


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """`print` shows the table; `html()` is a page with a timeline, `svg()` the timeline alone."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    happened: bool  # after a run

    @property
    def num_computed_tokens(self) -> int:
        return sum(row.num_computed_tokens or 0 for row in self.rows)

    @property
    def error_ratio(self) -> float | None:
        """The median of the times as multiples of their predictions; None before a run, and without a plan."""
        ratios = [ratio for row in self.rows if (ratio := row.error_ratio) is not None]
        return median(ratios) if ratios else None

    @property
    def num_off(self) -> int:
        """The number of rows whose time was twice the prediction, or half of it."""
        return sum(row.is_off for row in self.rows)

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        head = ["operation", "line", "state", "work", "worker", "cached", "computed", "start ms", "predicted ms"]
        head += ["took ms", ""] if self.happened else [""]
        lines = [head, *(self._cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        right = {5, 6, 7, 8, 9} if self.happened else {5, 6, 7, 8}
        shown = [
            "  ".join(
                cell.rjust(width) if column in right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        shown.insert(1, "-" * max(map(len, shown)))
        return "\n".join([*shown, *(f"note: {note}" for note in self._all_notes())])

    def _all_notes(self) -> list[str]:
        if (ratio := self.error_ratio) is None:
            return list(self.notes)
        num_timed = sum(row.error_ratio is not None for row in self.rows)
        off = f"{self.num_off} of {num_timed} took twice their prediction or half of it (marked with !)"
        return [*self.notes, f"the median request took {ratio:.2f} times its predicted time; {off}"]

    def _cells(self, row: Row) -> list[str]:
        cells = [row.what, row.place, row.state, row.work, row.worker]
        cells += [_number(row.num_cached_tokens), _number(row.num_computed_tokens)]
        cells += [_number(row.start_ms), _number(row.predicted_ms)]
        if self.happened:
            cells.append(_number(row.took_ms) + ("!" if row.is_off else ""))
        return [*cells, row.reason]

    def svg(self) -> str:
        """Return the timeline: one bar a row, as long as it took, or as it is expected to take."""
        timed = [row for row in self.rows if row.start_ms is not None]
        end_ms = max((_end_ms(row) for row in timed), default=0.0) or 1.0
        height = _ROW_PX * (len(timed) + 1) + 6
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABEL_PX + _CHART_PX + 20}" height="{height}" '
            'font-family="sans-serif" font-size="12">'
        ]
        for index in range(5):
            x = _LABEL_PX + _CHART_PX * index / 4
            parts.append(f'<line x1="{x:.0f}" y1="18" x2="{x:.0f}" y2="{height}" stroke="#ddd"/>')
            parts.append(
                f'<text x="{x:.0f}" y="12" text-anchor="middle" fill="#555">{end_ms * index / 4:.0f} ms</text>'
            )
        for index, row in enumerate(timed):
            y = _ROW_PX * (index + 1)
            start, width = (
                _CHART_PX * value / end_ms for value in (row.start_ms or 0.0, _end_ms(row) - (row.start_ms or 0.0))
            )
            color = _COLORS.get(row.work, "#555555")
            parts.append(f'<text x="4" y="{y + 14}">{escape(f"{row.state} {row.what}"[:52])}</text>')
            parts.append(
                f'<rect x="{_LABEL_PX + start:.1f}" y="{y + 3}" width="{max(width, 1.5):.1f}" height="{_ROW_PX - 7}" '
                f'fill="{color}"><title>{escape(_title(row))}</title></rect>'
            )
        return "".join([*parts, "</svg>"])

    def html(self) -> str:
        """Return a page without scripts and without other files: timeline, legend, table, notes."""
        legend = " ".join(
            f'<span style="color:{color}">&#9632; {escape(work)}</span>' for work, color in _COLORS.items()
        )
        notes = "".join(f"<li>{escape(note)}</li>" for note in self._all_notes())
        title = "The run beside its plan" if self.happened else "The plan"
        return (
            f'<!doctype html><html><head><meta charset="utf-8"><title>{title}</title></head>'
            f'<body style="font-family:sans-serif"><h1>{title}</h1><p>{legend}</p>{self.svg()}'
            f"<pre>{escape(self.table())}</pre><ul>{notes}</ul></body></html>"
        )


def planned(graph: Graph, plan: Plan) -> Explanation:
    """Return the explanation of a plan before its run."""
    placements = {each.operation_id: each for each in plan.placements}
    rows = [
        Row(
            what=f"prefix of {warm.num_tokens} tokens",
            place="",
            state="",
            work="warm",
            worker=warm.worker or "",
            num_cached_tokens=0,
            num_computed_tokens=warm.num_tokens,
            start_ms=0.0,
            predicted_ms=warm.duration_ms,
            reason=warm.reason,
        )
        for warm in plan.warm
    ]
    for operation in graph.operations:
        placement = placements.get(operation.operation_id)
        if placement is None:
            rows.append(plain_row(operation))
            continue
        workers = dict.fromkeys(one for one in (placement.prefill_worker, placement.decode_worker) if one)
        rows.append(
            Row(
                what=describe(operation),
                place=str(operation.position),
                state=state_name(operation),
                work=str(placement.work),
                worker=" > ".join(workers),
                num_cached_tokens=placement.num_cached_tokens,
                num_computed_tokens=placement.num_computed_tokens,
                start_ms=placement.start_ms,
                predicted_ms=placement.duration_ms,
                reason=placement.reason,
            )
        )
    notes = [
        f"kept cached until its last use: a prefix of {pin.num_tokens} tokens, {len(pin.until)} uses"
        for pin in plan.pin
    ]
    notes += [f"at most {plan.width} requests at once", *plan.notes]
    if graph.stopped:
        notes.append(f"known ahead up to here: {graph.stopped}; the rest is planned while the program runs")
    return Explanation(rows=tuple(rows), notes=tuple(notes), happened=False)


def plain_row(operation: Operation) -> Row:
    """Return the line of an operation that needs no request of its own."""
    work = "tool" if isinstance(operation, Tool) else "client"
    return Row(what=describe(operation), place=str(operation.position), state=state_name(operation), work=work)


def _end_ms(row: Row) -> float:
    duration = row.took_ms if row.took_ms is not None else row.predicted_ms
    return (row.start_ms or 0.0) + (duration or 0.0)


def _title(row: Row) -> str:
    parts = [row.place, row.worker, row.reason]
    return f"{row.what}: {', '.join(part for part in parts if part)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
