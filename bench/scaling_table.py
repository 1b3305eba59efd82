"""Prints the results of bench_scaling.py: one line a cell, the second token's parts, the links, and the efficiency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = dict[str, Any]


def print_tables(results: Mapping[str, Result], chosen: Sequence[str]) -> None:
    """Print all that was measured; then the cells that were not, and why."""
    done = {name: cell for name, cell in results.items() if cell["status"] == "done"}
    served = {name: cell for name, cell in done.items() if "points" in cell}
    if served:
        print("\nTimes in ms; of chats where a load has chats. Largest gap: of each stream.")
        _print([_HEAD, *(row for name, cell in served.items() for row in _rows(name, cell))])
        _print_second_tokens(served)
    for name, cell in done.items():
        if "links" in cell:
            _print_links(name, cell["links"])
    for line in efficiency(served):
        print(line)
    for name, cell in results.items():
        if cell["status"] != "done":
            print(f"{name}: {cell['status']}: {cell['why']}")
    left = [name for name in chosen if name not in results]
    if left:
        print(f"\nnot measured, for lack of time (--resume FILE measures them): {', '.join(left)}")


def _print(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True)]
        print("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())


_HEAD = (
    *("cell", "req/s", "ok", "TTFT", "p90", "p99", "long", "TPOT", "ITL50", "ITL99", "gap50", "gap99"),
    *("good/s", "good", "out/GPU", "all/GPU", "hits", "router", "us/tok", "client"),
)


def _rows(name: str, cell: Result) -> list[list[str]]:
    points = cell["points"]
    names = [name] if len(points) == 1 else [f"{name} {number}" for number in range(1, len(points) + 1)]
    return [_row(each, point, cell["gpus"]) for each, point in zip(names, points, strict=True)]


def _row(name: str, point: Result, gpus: int) -> list[str]:
    summary = point["summary"]
    chat = summary["classes"].get("chat", summary)
    long = summary["classes"].get("long")
    goodput, wall_s = summary["goodput"], max(summary["wall_s"], 1e-9)
    out_per_s, num_out = summary["output_tokens_per_s"], summary["output_tokens_per_s"] * wall_s
    return [
        name,
        "" if point["rate"] is None else f"{point['rate']:.1f}",
        f"{summary['num_succeeded']}/{summary['num_requests']}",
        *(_ms(chat["ttft_s"], key) for key in ("mean", "p90", "p99")),
        "" if long is None else _ms(long["ttft_s"], "mean"),
        _ms(chat["tpot_s"], "mean", 2),
        *(_ms(chat["itl_s"], key, 1) for key in ("p50", "p99")),
        *(_ms(chat["max_gap_s"], key, 1) for key in ("p50", "p99")),
        "" if goodput is None else f"{goodput['requests_per_s']:.2f}",
        "" if goodput is None else f"{goodput['share']:.0%}",
        f"{out_per_s / gpus:,.0f}",
        f"{(out_per_s + summary['input_tokens_per_s']) / gpus:,.0f}",
        "" if summary["hit_rate"] is None else f"{summary['hit_rate']:.0%}",
        f"{point['router_cpu_s'] / wall_s:.0%}",
        f"{1e6 * point['router_cpu_s'] / num_out:.0f}" if num_out else "",
        f"{summary['client_cpu_share']:.0%}",
    ]


def _ms(times: Result | None, key: str, digits: int = 0) -> str:
    return "-" if times is None else f"{1e3 * times[key]:.{digits}f}"


def _print_second_tokens(served: Mapping[str, Result]) -> None:
    rows: list[list[str]] = []
    parts: list[str] = []
    for name, cell in served.items():
        summary = cell["points"][-1]["summary"]
        second = summary["second_token_ms"]
        routes = ", ".join(f"{reason} {count}" for reason, count in sorted(summary["routes"].items()))
        parts = parts or list(second)
        if second or routes:
            cells = [
                f"{second[part]['mean']:.1f}/{second[part]['p99']:.1f}" if part in second else "-" for part in parts
            ]
            rows.append([name, *cells, routes])
    if parts:
        print("\nBetween the first and the second token, mean/p99 in ms, of requests that were handed over:")
        full = [[row[0], *(row[1:-1] or ["-"] * len(parts)), row[-1]] for row in rows]
        _print([["cell", *(part.removesuffix("_ms") for part in parts), "routes"], *full])


def _print_links(name: str, links: Result) -> None:
    count = links["num_places"]
    if "rows" in links:
        print(f"\n{name}: microseconds of one call, rows of 3584 in bfloat16")
        head = ["tp", "rows", "ours", "NCCL alone", "ratio", "sums"]
        rows = [
            [
                *(str(row["tp"]), str(row["rows"]), f"{row['ours_us']:.1f}", f"{row['nccl_us']:.1f}"),
                *(f"{row['ours_us'] / row['nccl_us']:.2f}", "right" if row["equal"] else "WRONG"),
            ]
            for row in links["rows"]
        ]
        _print([head, *rows])
        return
    print(f"\n{name}: GB/s from (row) to (column) by {links['transport']}, {links['num_bytes'] / 1e6:.1f} MB each")
    for title, key in (("one pair at a time", "alone_gb_per_s"), ("all pairs at once", "at_once_gb_per_s")):
        head = [title, *map(str, range(count))]
        rates = links[key]
        rows = [[str(a), *(f"{rates[f'{a}-{b}']:.1f}" if a != b else "" for b in range(count))] for a in range(count)]
        _print([head, *rows])
    each = ", ".join(f"{value:.1f}" for value in links["out_of_each_gb_per_s"])
    print(f"all pairs at once: {links['total_gb_per_s']:.1f} GB/s in total; out of each: {each}")


# ---------------------------------------------------------------- efficiency


def goodput_of(point: Result) -> float:
    """Return the goodput of a mixed load in requests a second: the share of good requests, of the rate that was asked
    for. The number that arrive in some seconds varies by chance, their share hardly."""
    return float(point["summary"]["goodput"]["share"] * point["rate"])


def best_goodput(served: Mapping[str, Result], fleet: str) -> float | None:
    """Return the highest goodput of a fleet at any rate of the mixed load, in requests a second."""
    found = [
        goodput_of(point)
        for name, cell in served.items()
        if name.startswith(f"{fleet}/") and cell["load"]["kind"] in ("mixed", "search", "climb")
        for point in cell["points"]
    ]
    return max(found, default=None)


def efficiency(served: Mapping[str, Result]) -> list[str]:
    """Return a line for each fleet of Qwen2-7B's shape: what one GPU of it does, against a single GPU."""
    fleets = list(
        dict.fromkeys(name.partition("/")[0] for name, cell in served.items() if cell["fleet"]["model"] == "7b")
    )
    one = "unified-x1/offline"
    lines = []
    for fleet in fleets:
        gpus = next(cell["gpus"] for name, cell in served.items() if name.startswith(f"{fleet}/"))
        if gpus < 2:
            continue
        parts = []
        if one in served and f"{fleet}/offline" in served:
            rates = [served[name]["points"][0]["summary"]["output_tokens_per_s"] for name in (f"{fleet}/offline", one)]
            parts.append(f"offline {rates[0] / rates[1] / gpus:.1%}")
        single, whole = best_goodput(served, "unified-x1"), best_goodput(served, fleet)
        if single and whole:
            parts.append(f"best goodput {whole / single / gpus:.1%} ({whole:.2f} requests/s)")
        if parts:
            lines.append(f"{fleet}: each GPU does, of what one GPU does alone: {', '.join(parts)}")
    return ["", *lines] if lines else []
