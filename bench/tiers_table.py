"""The tables of bench_tiers.py. A row is what `bench_tiers.measured` returns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

FIRST_MINUTE_S, FIRST_SECONDS_S = 60.0, 10.0
NO_HITS_BAR = 0.98
Row = dict[str, Any]


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |"
        for line in (header, rule, *lines)
    )


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def against(value: float, base: float | None, form: str) -> str:
    return format(value, form) + (f" (x{value / base:.2f})" if base else "")


def strategies_table(rows: Sequence[Row]) -> str:
    first = rows[0]["summary"]
    lines = []
    for row in rows:
        summary, tiers = row["summary"], row["by_tier"]
        base = None if row is rows[0] else first
        split = " / ".join(percent(tiers.get(tier)) for tier in ("L1", "L2", "L3"))
        ttft, old = summary["ttft_s"], base and base["ttft_s"]
        lines.append(
            (
                row["name"],
                percent(summary["hit_rate"]),
                percent(summary["hit_rate_ceiling"]),
                split,
                against(1e3 * ttft["mean"], old and 1e3 * old["mean"], ",.0f"),
                against(1e3 * ttft["p90"], old and 1e3 * old["p90"], ",.0f"),
                against(summary["input_tokens_per_s"], base and base["input_tokens_per_s"], ",.0f"),
                f"{summary['computed_tokens_per_s'] or 0:,.0f}",
                f"{row['counted'].get('process_cpu_seconds', 0.0):.1f}",
                f"{summary['wall_s']:.1f}",
                f"{row['ready_s']:.1f}",
            )
        )
    return table(
        (
            *("tiers", "hit rate", "at most", "from L1 / L2 / L3", "TTFT mean ms", "TTFT p90 ms"),
            *("input tok/s", "computed tok/s", "engine CPU s", "wall s", "ready s"),
        ),
        lines,
    )


def moves_lines(rows: Sequence[Row]) -> str:
    """Return GB and GB/s of the copies between tiers, one line for each row that has any."""
    found = []
    for row in rows:
        counted, parts = row["counted"], []
        for kind in sorted(name.removesuffix("_bytes") for name in counted if name.endswith("_bytes")):
            num_bytes, seconds = counted[f"{kind}_bytes"], counted.get(f"{kind}_seconds", 0.0)
            if num_bytes and not kind.startswith("handoff"):
                rate = f" at {num_bytes / seconds / 1e9:.1f} GB/s" if seconds else ""
                parts.append(f"{kind.replace('_', ' ')} {num_bytes / 1e9:.2f} GB{rate}")
        for name in ("host_skipped_pages", "host_failed_pages", "storage_failed_pages", "prefetch_timeouts"):
            if counted.get(name):
                parts.append(f"{name.replace('_', ' ')} {counted[name]:,.0f}")
        found += [f"{row['name']}: {', '.join(parts)}"] if parts else []
    return "\n".join(found)


def no_hits_table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(row["name"] for row in rows))
    speeds = {name: [row["summary"]["input_tokens_per_s"] for row in rows if row["name"] == name] for name in names}
    base, lines = speeds[names[0]], []
    compared = [name for name in names if len(speeds[name]) == len(base)]
    for name in compared:
        ratios = [speed / old for speed, old in zip(speeds[name], base, strict=True)]
        ratio = statistics.median(ratios)
        verdict = "" if name == names[0] else f"bar {NO_HITS_BAR}: {'met' if ratio >= NO_HITS_BAR else 'MISSED'}"
        backed_up = sum(row["counted"].get("host_backup_bytes", 0.0) for row in rows if row["name"] == name)
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        median = f"{statistics.median(speeds[name]):,.0f}"
        lines.append((name, median, f"{ratio:.3f}", spread, f"{backed_up / 1e9:.2f}", verdict))
    parts = [table(("tiers", "input tok/s, median", "ratio, median", "ratios", "GB backed up", "verdict"), lines)]
    for name in names:
        if name not in compared:
            counts = f"{len(speeds[name])} of {name}, {len(base)} of {names[0]}"
            median = f"{statistics.median(speeds[name]):,.0f}"
            parts.append(f"{name}: {median} input tok/s, not compared: a run failed, rows measured are {counts}")
    return "\n".join(parts)


def hit_rate_within(row: Row, seconds: float) -> float | None:
    """Return the hit rate of the requests that were sent in the first `seconds`."""
    early = [one for one in row["requests"] if one["sent_s"] is not None and one["sent_s"] <= seconds]
    num_prompt = sum(one["num_prompt_tokens"] or 0 for one in early)
    return sum(one["num_cached_tokens"] or 0 for one in early) / num_prompt if num_prompt else None


def restarts_table(rows: Sequence[Row]) -> str:
    compared = [row for row in rows if row["name"] != "before the kill"]
    window_s = min([FIRST_MINUTE_S, *(row["summary"]["wall_s"] for row in compared)])
    short_s = min(FIRST_SECONDS_S, window_s / 4)
    lines = [
        (
            row["name"],
            f"{row['ready_s']:.1f}",
            percent(hit_rate_within(row, short_s)),
            percent(hit_rate_within(row, window_s)),
            percent(row["summary"]["hit_rate"]),
            f"{1e3 * row['summary']['ttft_s']['mean']:,.0f}",
            f"{row['summary']['input_tokens_per_s']:,.0f}",
            f"{row['summary']['wall_s']:.1f}",
        )
        for row in rows
    ]
    hits = (f"hits, first {short_s:.0f} s", f"hits, first {window_s:.0f} s", "hits, all")
    return table(("start", "ready s", *hits, "TTFT mean ms", "input tok/s", "wall s"), lines)
