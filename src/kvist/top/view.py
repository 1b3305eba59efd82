"""Lays the figures out for a terminal of any width. Pure: the time is an argument, and every text of a server is made
printable, since it could hold commands for the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvist.dashboard.snapshot import Handoffs, HitRate, Pages, Pool, Quantiles, Snapshot, Worker
from kvist.top.source import Reading

_BAD, _GOOD, _DIM = "bold red", "green", "dim"
_MAX_CHARS = 200  # of a text of the server


def view(reading: Reading, *, url: str, width: int, now_unix_s: float) -> RenderableType:
    """Return the figures of a reading, at most `width` characters wide."""
    parts: list[RenderableType] = []
    if reading.problem:
        since = time.strftime("%H:%M:%S", time.localtime(reading.since_unix_s or now_unix_s))
        seconds = max(0.0, now_unix_s - (reading.since_unix_s or now_unix_s))
        parts.append(Text(f"unreachable since {since} ({seconds:.0f} s): {plain(reading.problem)}", style=_BAD))
    snapshot = reading.snapshot
    if snapshot is None:
        return Group(Text(plain(url)), *parts)
    parts += [_server(snapshot, url), _traffic(snapshot), _latencies(snapshot), _workers(snapshot.workers, width)]
    parts += [_pool(pool) for pool in snapshot.pools]
    if reading.slowest:
        parts.append(_slowest(reading, width))
    return Group(*parts)


def plain(text: str) -> str:
    """Return the text without control characters, shortened."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_MAX_CHARS])


def _server(snapshot: Snapshot, url: str) -> Text:
    server = snapshot.server
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{plain(url)}  ", style="bold")
    state = "draining" if server.draining else "ready" if server.ready else "not ready"
    line.append(state, style=_GOOD if state == "ready" else _BAD)
    clock = time.strftime("%H:%M:%S", time.localtime(snapshot.time_unix_s))
    about = "  ".join(map(plain, (f"{server.role} {server.version}", server.model, server.policy)))
    line.append(f"  {about}  {clock}")
    return line


def _traffic(snapshot: Snapshot) -> Text:
    traffic, tokens = snapshot.traffic, snapshot.traffic.prompt_tokens_per_s
    failed = f"{traffic.failed_per_s:.1f}/s failed"
    line = Text(
        f"requests {traffic.num_in_flight} in flight, {traffic.finished_per_s:.1f}/s, {failed}  "
        f"output {_number(traffic.output_tokens_per_s)} tok/s  {_handoffs(snapshot.handoffs)}\n"
        f"prompt {_number(tokens.computed)} computed, {_number(tokens.device)} device, {_number(tokens.host)} host, "
        f"{_number(tokens.storage)} storage tok/s  {_hits(snapshot.hit_rate)}"
    )
    if traffic.failed_per_s > 0:
        line.highlight_words([failed], style=_BAD)
    return line


def _hits(rate: HitRate) -> str:
    return f"hits {_share(rate.cached)} of at most {_share(rate.ceiling)}"


def _handoffs(handoffs: Handoffs) -> str:
    mean = "" if handoffs.mean_s is None else f", {_time(handoffs.mean_s)} each"
    return f"handoffs {handoffs.received_per_s:.1f}/s{mean}, {handoffs.failed_per_s:.1f}/s failed"


def _latencies(snapshot: Snapshot) -> Text:
    traffic = snapshot.traffic
    rows = (("TTFT", traffic.ttft_s), ("ITL", traffic.itl_s), ("request", traffic.e2e_s))
    return Text("  ".join(f"{name} {_quantiles(values)}" for name, values in rows) + "  (p50/p90/p99)")


def _quantiles(values: Quantiles) -> str:
    return "/".join(_time(value) for value in (values.p50, values.p90, values.p99))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    title: str
    cell: Callable[[Worker], str | Text]
    min_width: int  # of the terminal, from which the column is shown
    right: bool = True


_COLUMNS = (
    _Column(title="worker", cell=lambda worker: plain(worker.worker_id), min_width=0, right=False),
    _Column(title="role", cell=lambda worker: plain(worker.role), min_width=0, right=False),
    _Column(title="state", cell=lambda worker: _state(worker), min_width=0, right=False),
    _Column(title="run", cell=lambda worker: _whole(worker.num_running), min_width=0),
    _Column(title="wait", cell=lambda worker: _whole(worker.num_waiting), min_width=0),
    _Column(title="device pages", cell=lambda worker: _pages(worker.pages), min_width=60),
    _Column(title="host pages", cell=lambda worker: _pages(worker.host_pages), min_width=120),
    _Column(title="stored", cell=lambda worker: _stored(worker), min_width=150),
    _Column(title="hits", cell=lambda worker: _share(worker.hit_rate.cached), min_width=75),
    _Column(title="prompt/s", cell=lambda worker: _number(worker.computed_tokens_per_s), min_width=110),
    _Column(title="output/s", cell=lambda worker: _number(worker.output_tokens_per_s), min_width=75),
    _Column(title="busy", cell=lambda worker: _share(worker.busy_share), min_width=110),
)


def _workers(workers: Sequence[Worker], width: int) -> Table:
    shown = [column for column in _COLUMNS if width >= column.min_width]
    table = Table(box=None, padding=(0, 1), header_style=_DIM)
    for column in shown:
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True, overflow="ellipsis")
    for worker in sorted(workers, key=lambda worker: (worker.role, worker.worker_id)):
        table.add_row(*(column.cell(worker) for column in shown))
    if not workers:
        table.add_row("no worker")
    return table


def _state(worker: Worker) -> Text:
    text = plain(worker.state if worker.state == "ready" or not worker.problem else f"{worker.state}: {worker.problem}")
    return Text(text, style=_GOOD if worker.state == "ready" else _BAD)


def _pages(pages: Pages | None) -> str:
    if pages is None or not pages.total:
        return "-"
    return f"{_share(pages.used / pages.total)}+{_share(pages.cached / pages.total)} of {_number(pages.total)}"


def _stored(worker: Worker) -> str:
    if worker.storage is None:
        return "-"
    broken = "" if worker.storage.breaker == "closed" else f" {plain(worker.storage.breaker)}"
    return f"{_number(worker.storage.stored_bytes)}B{broken}"


def _pool(pool: Pool) -> Text:
    used, capacity = _number(pool.used_bytes), _number(pool.capacity_bytes)
    text = (
        f"pool {plain(pool.master)}: {pool.num_stores} stores, {used}B of {capacity}B, "
        f"SSD {_number(pool.ssd_used_bytes)}B of {_number(pool.ssd_capacity_bytes)}B, {_number(pool.num_pages)} pages"
    )
    return Text(f"{text}  {plain(pool.problem)}" if pool.problem else text, style=_BAD if pool.problem else "")


_LEAST_ID, _FIGURES, _FEW_FIGURES = 8, 60, 40  # characters: of the id of a request, and of the columns beside it


def _slowest(reading: Reading, width: int) -> Table:
    table = Table(box=None, padding=(0, 1), header_style=_DIM)
    wide = width >= 80
    titles = ["slowest requests", "time", "TTFT", *(["tokens in", "out"] if wide else []), "longest stage"]
    for title in titles:
        left = title in (titles[0], titles[-1])
        # The figures beside the id stay whole: the id is the longest, and is shortened.
        most = max(_LEAST_ID, width - (_FIGURES if wide else _FEW_FIGURES)) if title == titles[0] else None
        table.add_column(title, justify="left" if left else "right", no_wrap=True, overflow="ellipsis", max_width=most)
    for request in reading.slowest or ():
        longest = max(request.stages, key=lambda stage: stage.duration_s, default=None)
        sizes = [_whole(request.prompt_tokens), _whole(request.completion_tokens)] if wide else []
        table.add_row(
            plain(request.id) if request.status == "finished" else f"{plain(request.id)} {plain(request.status)}",
            _time(request.duration_s),
            _time(request.ttft_s),
            *sizes,
            "" if longest is None else f"{plain(longest.name)} {_time(longest.duration_s)}",
        )
    return table


# ---------------------------------------------------------------- numbers


def _number(value: float) -> str:
    """Return a number with three digits or so: 950, 1.2k, 34M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.1f}{unit}" if scaled < 10 else f"{scaled:.0f}{unit}"
    return f"{value:.0f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _whole(value: int | None) -> str:
    return "-" if value is None else str(value)
