"""Turns rows into figures, a table, JSON, and ratios to an earlier JSON. Pure: reads no clock, writes no file."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from kvist.bench.completions import Row
from kvist.bench.config import MixedConfig
from kvist.bench.drive import Measured
from kvist.bench.goodput import CLASSES, Limit, count_good, parse_limits

FORMAT = "kvist-bench-1"
BUSY_SHARE = 0.8  # of one core; above, the client may have limited the figures
MAX_LAG_S = 0.002  # p99: error of each time. A warning needs a lag above this
MAX_LAG_SHARE = 0.1  # and above this share of the mean time per output token
MAX_LATE_S = 0.010  # p99; above, the arrivals did not follow the requested rate


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class ClassFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of the requests of one class that succeeded. Times are in seconds."""

    num_requests: int
    num_succeeded: int
    num_good: int  # within the limits of `Goodput`
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    max_gap_s: Distribution | None
    e2e_s: Distribution | None


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    limits: list[str]
    num_good: int  # answered within all limits that apply to them
    share: float  # of all requests, failed ones included
    requests_per_s: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of the requests that succeeded. Times are in seconds; token counts are the server's own."""

    num_requests: int
    num_succeeded: int
    failures: dict[str, int]  # by kind
    wall_s: float
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None  # between events; one may carry several tokens
    max_gap_s: Distribution | None = None  # the largest ITL of each stream
    e2e_s: Distribution | None
    requests_per_s: float
    input_tokens_per_s: float  # cached ones included
    computed_tokens_per_s: float | None  # input tokens that were not cached; None: not reported by the server
    output_tokens_per_s: float
    hit_rate: float | None
    hit_rate_by_tier: dict[str, float] | None = None  # its parts; None: not reported by the server
    hit_rate_ceiling: float | None = None  # multiturn only: the hit rate of a cache without eviction
    tokens_per_event: float | None
    num_connections: int
    num_retries: int
    client_cpu_share: float  # of one core
    client_cpu_s_per_token: float | None
    client_lag_p99_s: float
    late_p99_s: float
    classes: dict[str, ClassFigures] = {}  # mixed only
    goodput: Goodput | None = None  # mixed only
    second_token_ms: dict[str, Distribution] = {}  # its parts, with --handoff-parts
    routes: dict[str, int] = {}  # requests by the reason of their route, with --handoff-parts


class Run(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    kind: str
    settings: dict[str, bool | str | int | float | None]
    summary: Summary
    warnings: list[str]
    rows: list[Row]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    format: str = FORMAT
    commit: str | None  # of the client; the server's is not known over HTTP
    version: str
    hardware: dict[str, str | int]  # of the client's machine
    settings: dict[str, bool | str | int | float | None]
    runs: list[Run]


def distribution(values: Sequence[float]) -> Distribution | None:
    if not values:
        return None
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99)).tolist()
    return Distribution(count=len(values), mean=statistics.fmean(values), p50=p50, p90=p90, p99=p99, max=max(values))


def _p99(values: Sequence[float]) -> float:
    return float(np.quantile(values, 0.99)) if values else 0.0


def _class_figures(measured: Measured, name: str, limits: list[Limit]) -> ClassFigures:
    pairs = zip(measured.rows, measured.gaps_s, strict=True)
    chosen = [(row, gaps_s) for row, gaps_s in pairs if row.request_class == name]
    rows = [row for row, _ in chosen if row.failure is None]
    return ClassFigures(
        num_requests=len(chosen),
        num_succeeded=len(rows),
        num_good=count_good(rows, limits),
        ttft_s=_of_rows(rows, "ttft_s"),
        tpot_s=_of_rows(rows, "tpot_s"),
        itl_s=distribution([gap_s for _, gaps_s in chosen for gap_s in gaps_s]),
        max_gap_s=_of_rows(rows, "max_gap_s"),
        e2e_s=_of_rows(rows, "e2e_s"),
    )


def _of_rows(rows: Sequence[Row], name: str) -> Distribution | None:
    values = [getattr(row, name) for row in rows]
    return distribution([value for value in values if value is not None])


def _second_token_ms(rows: Sequence[Row]) -> dict[str, Distribution]:
    reports = [row.second_token_ms for row in rows if row.second_token_ms is not None]
    names = dict.fromkeys(name for report in reports for name in report)
    values = {name: [value for report in reports if (value := report.get(name)) is not None] for name in names}
    return {name: found for name in names if (found := distribution(values[name])) is not None}


def _goodput(rows: Sequence[Row], texts: Sequence[str], wall_s: float) -> Goodput:
    num_good = count_good(rows, parse_limits(texts))
    share = num_good / len(rows) if rows else 0.0
    return Goodput(limits=[*texts], num_good=num_good, share=share, requests_per_s=num_good / wall_s)


def summarise(measured: Measured) -> Summary:
    succeeded = [row for row in measured.rows if row.failure is None]
    num_input = sum(row.num_prompt_tokens or 0 for row in succeeded)
    num_output = sum(row.num_output_tokens or 0 for row in succeeded)
    reported = bool(succeeded) and all(row.num_cached_tokens is not None for row in succeeded)
    num_cached = sum(row.num_cached_tokens or 0 for row in succeeded)
    by_tier = Counter[str]()
    for row in succeeded:
        by_tier.update(row.num_cached_by_tier or {})
    has_ceiling = bool(succeeded) and all(row.num_ceiling_tokens is not None for row in succeeded)
    num_ceiling = sum(row.num_ceiling_tokens or 0 for row in succeeded)
    num_events = sum(row.num_events for row in succeeded)
    wall_s = max(measured.wall_s, 1e-9)
    client = measured.client
    load = measured.scenario.load
    limits = load.goodput if isinstance(load, MixedConfig) else None
    present = {row.request_class for row in measured.rows}
    return Summary(
        num_requests=len(measured.rows),
        num_succeeded=len(succeeded),
        failures=dict(sorted(Counter(row.failure for row in measured.rows if row.failure is not None).items())),
        wall_s=measured.wall_s,
        ttft_s=_of_rows(succeeded, "ttft_s"),
        tpot_s=_of_rows(succeeded, "tpot_s"),
        itl_s=distribution([gap_s for gaps_s in measured.gaps_s for gap_s in gaps_s]),
        max_gap_s=_of_rows(succeeded, "max_gap_s"),
        e2e_s=_of_rows(succeeded, "e2e_s"),
        requests_per_s=len(succeeded) / wall_s,
        input_tokens_per_s=num_input / wall_s,
        computed_tokens_per_s=(num_input - num_cached) / wall_s if reported else None,
        output_tokens_per_s=num_output / wall_s,
        hit_rate=num_cached / num_input if reported and num_input else None,
        hit_rate_by_tier={tier: count / num_input for tier, count in by_tier.items()}
        if by_tier and num_input
        else None,
        hit_rate_ceiling=num_ceiling / num_input if has_ceiling and num_input else None,
        tokens_per_event=num_output / num_events if num_events else None,
        num_connections=client.num_connections,
        num_retries=client.num_retries,
        client_cpu_share=client.cpu_s / wall_s,
        client_cpu_s_per_token=client.cpu_s / num_output if num_output else None,
        client_lag_p99_s=_p99(client.lags_s),
        late_p99_s=_p99([row.late_s for row in measured.rows]),
        classes={
            name: _class_figures(measured, name, parse_limits(limits or ())) for name in CLASSES if name in present
        },
        goodput=None if limits is None else _goodput(measured.rows, limits, wall_s),
        second_token_ms=_second_token_ms(succeeded),
        routes=dict(Counter(row.route for row in succeeded if row.route is not None)),
    )


def warnings_of(summary: Summary, kind: str) -> list[str]:
    """Return the reasons why the figures may be misleading."""
    found = []
    if summary.failures:
        kinds = ", ".join(f"{count} {name}" for name, count in summary.failures.items())
        found.append(
            f"{summary.num_requests - summary.num_succeeded} requests failed ({kinds}); the figures cover the others"
        )
    if summary.client_cpu_share > BUSY_SHARE:
        found.append(
            f"the client was the limit: it used {summary.client_cpu_share:.0%} of a core; the server may be faster"
        )
    token_s = summary.tpot_s.mean if summary.tpot_s is not None else 0.0
    if summary.client_lag_p99_s > max(MAX_LAG_S, MAX_LAG_SHARE * token_s):
        found.append(
            f"the client woke up {1e3 * summary.client_lag_p99_s:.1f} ms late (p99); times may be too long by this much"
        )
    if summary.late_p99_s > MAX_LATE_S:
        found.append(
            f"requests were sent {1e3 * summary.late_p99_s:.1f} ms after their planned time (p99): the client was the "
            "limit"
        )
    if kind != "multiturn" and summary.hit_rate:
        found.append(
            f"{summary.hit_rate:.0%} of the prompt tokens were cached, though all prompts differ: the server has "
            "seen them in an earlier run; restart it, flush its cache, or change --seed"
        )
    ceiling = summary.hit_rate_ceiling
    if summary.hit_rate is not None and ceiling is not None and summary.hit_rate > ceiling:
        found.append(
            "more tokens were cached than this run had sent: the server has seen the prompts in an earlier run "
            "(restart it, flush its cache, or change --seed), or its pages are smaller than --page-size"
        )
    return found


# ---------------------------------------------------------------- the table

_TIMES = (
    ("TTFT", "ttft_s"),
    ("TPOT", "tpot_s"),
    ("ITL", "itl_s"),
    ("largest gap", "max_gap_s"),
    ("e2e", "e2e_s"),
)
_LABEL = 18  # width of the first column
_COLUMNS = ("mean", "p50", "p90", "p99", "max")
_RATES = (
    ("input (cached included)", "input_tokens_per_s"),
    ("input computed", "computed_tokens_per_s"),
    ("output", "output_tokens_per_s"),
)


_Figures = Summary | ClassFigures


def table(run: Run, baseline: Run | None = None) -> str:
    """Return the table. With `baseline`, each figure is followed by its ratio: ×0.90 of a time is a tenth less."""
    summary, before = run.summary, None if baseline is None else baseline.summary
    width = 9 if before is None else 16
    lines = [
        f"{run.name}: {summary.num_succeeded} of {summary.num_requests} requests answered in {summary.wall_s:.2f} s",
        f"  {'ms':<{_LABEL}}" + "".join(f"{column:>{width}}" for column in _COLUMNS),
        *_time_lines("", summary, before, width),
    ]
    for name, figures in summary.classes.items():
        old = None if before is None else before.classes.get(name)
        lines += _time_lines(f"{name} ", figures, old, width)
    for part, times_ms in summary.second_token_ms.items():
        old_ms = None if before is None else before.second_token_ms.get(part)
        lines.append(_time_line(f"2nd {part.removesuffix('_ms')}", times_ms, old_ms, width, to_ms=1.0))
    for label, name in _RATES:
        value = getattr(summary, name)
        shown = "not reported by the server" if value is None else _cell(value, getattr(before, name, None), ",.0f")
        lines.append(f"  {label:<24}{shown:>14}" + ("" if value is None else " tok/s"))
    hits = "not reported by the server" if summary.hit_rate is None else f"{summary.hit_rate:.1%}"
    if summary.hit_rate is not None and before is not None and before.hit_rate is not None:
        hits += f" (baseline {before.hit_rate:.1%})"
    lines.append(f"  {'hit rate':<24}{hits:>14}")
    if summary.hit_rate_by_tier is not None:
        parts = ", ".join(f"{tier} {share:.1%}" for tier, share in summary.hit_rate_by_tier.items())
        lines.append(f"  {'of that':<24}{parts:>14}")
    if summary.hit_rate_ceiling is not None:
        lines.append(f"  {'hit rate, at most':<24}{f'{summary.hit_rate_ceiling:.1%}':>14} (a cache without eviction)")
    lines += _goodput_lines(summary, before)
    if summary.routes:
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(summary.routes.items()))
        lines.append(f"  routes: {counts}")
    lines.append(f"  {_client_line(summary)}")
    lines += [f"  WARNING: {warning}" for warning in run.warnings]
    first = {row.failure: row.message for row in reversed(run.rows) if row.failure is not None}
    lines += [f"  the first {kind}: {message}" for kind, message in sorted(first.items())]
    return "\n".join(lines)


def _time_lines(prefix: str, figures: _Figures, before: _Figures | None, width: int) -> list[str]:
    return [
        _time_line(prefix + label, getattr(figures, name), getattr(before, name, None), width) for label, name in _TIMES
    ]


def _time_line(
    label: str, times: Distribution | None, old: Distribution | None, width: int, *, to_ms: float = 1e3
) -> str:
    if times is None:
        return f"  {label:<{_LABEL}}{'-':>{width}}"
    cells = [
        _cell(to_ms * getattr(times, column), None if old is None else to_ms * getattr(old, column), ".2f")
        for column in _COLUMNS
    ]
    return f"  {label:<{_LABEL}}" + "".join(f"{cell:>{width}}" for cell in cells)


def _goodput_lines(summary: Summary, before: Summary | None) -> list[str]:
    goodput = summary.goodput
    if goodput is None:
        return []
    old = None if before is None or before.goodput is None else before.goodput.requests_per_s
    each = "".join(
        f"; {name} {figures.num_good} of {figures.num_requests}" for name, figures in summary.classes.items()
    )
    rate = _cell(goodput.requests_per_s, old, ".2f")
    return [f"  goodput: {rate} requests/s, {goodput.share:.1%} within {' '.join(goodput.limits) or 'no limit'}{each}"]


def _cell(value: float, before: float | None, form: str) -> str:
    shown = format(value, form)
    if before is None:
        return shown
    return f"{shown} " + (f"×{value / before:.2f}" if before > 0 else "×?")


def _client_line(summary: Summary) -> str:
    cost = "" if summary.client_cpu_s_per_token is None else f", {1e6 * summary.client_cpu_s_per_token:.1f} µs a token"
    events = "" if summary.tokens_per_event is None else f", {summary.tokens_per_event:.2f} tokens an event"
    return (
        f"client: {summary.client_cpu_share:.0%} of a core{cost}{events}, late by {1e3 * summary.client_lag_p99_s:.1f} "
        f"ms (p99), {summary.num_connections} connections opened, {summary.num_retries} requests sent again"
    )


# ---------------------------------------------------------------- baselines


def encode(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=1)


def decode(content: bytes) -> Report:
    """Decode the result of `encode`. Raises `msgspec.DecodeError` for anything else."""
    report = msgspec.json.decode(content, type=Report)
    if report.format != FORMAT:
        raise msgspec.ValidationError(f"its format is {report.format!r}, not {FORMAT!r}")
    return report


def differences(run: Run, baseline: Run) -> list[str]:
    """Return the settings in which the two runs differ; each makes their ratio harder to interpret."""
    keys = sorted({*run.settings, *baseline.settings})
    return [
        f"{key} {baseline.settings.get(key)} → {run.settings.get(key)}"
        for key in keys
        if baseline.settings.get(key) != run.settings.get(key)
    ]
