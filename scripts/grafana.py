"""Writes deploy/grafana/kvist.json, a dashboard of the metrics of docs/metrics.md.

    python scripts/grafana.py

tests/deploy/test_monitoring.py fails if the file differs, or if a query names a metric or a label that does not exist.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "deploy" / "grafana" / "kvist.json"
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3
_WORKERS = 'worker=~"$worker", role=~"$role"'
_RATE = "$__rate_interval"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    unit: str  # of Grafana
    queries: tuple[tuple[str, str], ...]  # PromQL and legend
    text: str = ""


def quantiles(metric: str, title: str) -> Panel:
    expression = "histogram_quantile({}, sum by (le) (rate({}_bucket[{}])))"
    shown = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    return Panel(
        title=title,
        unit="s",
        queries=tuple((expression.format(share, metric, _RATE), name) for name, share in shown),
    )


def per_second(title: str, unit: str, *counters: tuple[str, str], by: str = "") -> Panel:
    """Return the rates of counters of workers, (metric, legend)."""
    grouped = f" by ({by})" if by else ""
    return Panel(
        title=title,
        unit=unit,
        queries=tuple((f"sum{grouped} (rate({name}{{{_WORKERS}}}[{_RATE}]))", legend) for name, legend in counters),
    )


def _mean(seconds: str, number: str) -> str:
    return f"sum(rate({seconds}{{{_WORKERS}}}[{_RATE}])) / sum(rate({number}{{{_WORKERS}}}[{_RATE}]))"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Requests": (
        Panel(
            title="Requests per second",
            unit="reqps",
            queries=(
                (f"sum by (finished_reason) (rate(kvist:request_success_total[{_RATE}]))", "{{finished_reason}}"),
                (f"sum by (code) (rate(kvist:request_failure_total[{_RATE}]))", "failed: {{code}}"),
                (f"sum(rate(kvist:client_disconnects_total[{_RATE}]))", "client left"),
            ),
        ),
        Panel(
            title="Requests in flight",
            unit="short",
            queries=(
                ("sum(kvist:gateway_requests_in_flight)", "at gateways"),
                ("sum(kvist:num_requests_running)", "running"),
                ("sum(kvist:num_requests_waiting)", "waiting"),
            ),
        ),
        Panel(
            title="Answers by HTTP status",
            unit="reqps",
            queries=((f"sum by (status) (rate(kvist:http_requests_total[{_RATE}]))", "{{status}}"),),
        ),
        quantiles("kvist:time_to_first_token_seconds", "Time to first token"),
        quantiles("kvist:inter_token_latency_seconds", "Inter-token latency"),
        quantiles("kvist:e2e_request_latency_seconds", "Time of a whole request"),
        Panel(
            title="Tokens per second",
            unit="short",
            queries=(
                (f"sum(rate(kvist:generation_tokens_total[{_RATE}]))", "output"),
                (f"sum(rate(kvist:prompt_tokens_total[{_RATE}]))", "prompt"),
                (f"sum(rate(kvist:cached_prompt_tokens_total[{_RATE}]))", "prompt, cached"),
            ),
        ),
        Panel(
            title="Routes by reason",
            unit="reqps",
            queries=((f"sum by (reason) (rate(kvist:routes_total[{_RATE}]))", "{{reason}}"),),
        ),
        quantiles("kvist:gateway_loop_lag_seconds", "Delay of the gateways' event loops"),
    ),
    "Workers": (
        Panel(title="Workers by state", unit="short", queries=(("max by (state) (kvist:workers)", "{{state}}"),)),
        Panel(
            title="Waiting requests",
            unit="short",
            queries=((f"max by (worker, role) (kvist:num_requests_waiting{{{_WORKERS}}})", "{{role}} {{worker}}"),),
        ),
        Panel(
            title="Running requests",
            unit="short",
            queries=((f"max by (worker, role) (kvist:num_requests_running{{{_WORKERS}}})", "{{role}} {{worker}}"),),
        ),
        Panel(
            title="Pages in use by requests",
            unit="percentunit",
            queries=((f"max by (worker, role) (kvist:kv_cache_usage_perc{{{_WORKERS}}})", "{{role}} {{worker}}"),),
        ),
        per_second(
            "Tokens computed per second",
            "short",
            ("kvist:worker_computed_prompt_tokens_total", "{{role}}: prompt"),
            ("kvist:worker_generation_tokens_total", "{{role}}: output"),
            by="role",
        ),
        Panel(
            title="Time of a step without prompt tokens",
            unit="s",
            queries=((_mean("kvist:worker_decode_step_seconds_total", "kvist:worker_decode_steps_total"), "mean"),),
        ),
        per_second(
            "Preempted, refused and failed",
            "reqps",
            ("kvist:worker_preemptions_total", "preempted"),
            ("kvist:worker_requests_refused_total", "refused"),
            ("kvist:worker_requests_failed_total", "failed"),
        ),
    ),
    "Cache": (
        Panel(
            title="Hit rate of prompt tokens, and its ceiling",
            unit="percentunit",
            text="The ceiling is the hit rate of a cache that never evicts a page.",
            queries=(
                (_mean("kvist:worker_cached_prompt_tokens_total", "kvist:worker_prompt_tokens_total"), "hit rate"),
                (_mean("kvist:worker_ceiling_prompt_tokens_total", "kvist:worker_prompt_tokens_total"), "ceiling"),
            ),
        ),
        per_second(
            "Pages found per second, by tier",
            "short",
            ("kvist:worker_device_hit_pages_total", "device"),
            ("kvist:worker_host_hit_pages_total", "host"),
            ("kvist:worker_storage_hit_pages_total", "storage"),
        ),
        per_second(
            "Pages evicted per second, by tier",
            "short",
            ("kvist:worker_device_evicted_pages_total", "device"),
            ("kvist:worker_host_evicted_pages_total", "host"),
            ("kvist:worker_storage_evicted_pages_total", "storage"),
        ),
        Panel(
            title="Pages of the device pools",
            unit="short",
            queries=((f"sum by (state) (kvist:kv_pages{{{_WORKERS}}})", "{{state}}"),),
        ),
        Panel(
            title="Pages of the host tiers",
            unit="short",
            queries=((f"sum by (state) (kvist:host_pages{{{_WORKERS}}})", "{{state}}"),),
        ),
        per_second(
            "Bytes between the tiers",
            "Bps",
            ("kvist:worker_host_load_bytes_total", "host to device"),
            ("kvist:worker_host_backup_bytes_total", "device to host"),
            ("kvist:worker_storage_read_bytes_total", "storage to host"),
            ("kvist:worker_storage_write_bytes_total", "host to storage"),
        ),
        Panel(
            title="Stores that are not used for a while",
            unit="short",
            queries=((f"sum by (worker) (kvist:storage_breaker_open{{{_WORKERS}}})", "{{worker}}"),),
        ),
        Panel(
            title="Mean wait of a request for the storage tier",
            unit="s",
            queries=((_mean("kvist:worker_prefetch_wait_seconds_total", "kvist:worker_prefetches_total"), "mean"),),
        ),
    ),
    "Handoffs": (
        per_second(
            "Handoffs per second",
            "short",
            ("kvist:worker_handoffs_sent_total", "sent"),
            ("kvist:worker_store_handoffs_sent_total", "through the store"),
            ("kvist:worker_handoffs_failed_total", "failed"),
            ("kvist:worker_handoff_checksum_mismatches_total", "arrived changed"),
        ),
        per_second("Bytes per second", "Bps", ("kvist:worker_handoff_bytes_total", "written")),
        quantiles("kvist:second_token_seconds", "Time from the first to the second token"),
        Panel(
            title="Parts of the time to the second token",
            unit="s",
            queries=tuple(
                (_mean(f"kvist:worker_handoff_{part}_seconds_total", f"kvist:worker_handoffs_{side}_total"), part)
                for part, side in (
                    ("grant_wait", "sent"),
                    ("last_copy", "sent"),
                    ("verify", "received"),
                    ("admission", "received"),
                    ("first_step", "received"),
                )
            ),
        ),
    ),
    "Failover": (
        Panel(
            title="Failovers by cause",
            unit="reqps",
            queries=((f"sum by (cause) (rate(kvist:failovers_total[{_RATE}]))", "{{cause}}"),),
        ),
        quantiles("kvist:failover_pause_seconds", "Pause of a stream by a failover"),
        Panel(
            title="Streams after a failover",
            unit="reqps",
            queries=(
                (f"sum(rate(kvist:resumed_streams_total[{_RATE}]))", "resumed"),
                (f"sum(rate(kvist:unresumed_streams_total[{_RATE}]))", "lost"),
            ),
        ),
    ),
    "Page pool": (
        Panel(
            title="Memory",
            unit="bytes",
            queries=(
                ("max by (pool) (kvist:storage_pool_used_bytes)", "{{pool}} used"),
                ("max by (pool) (kvist:storage_pool_capacity_bytes)", "{{pool}} capacity"),
            ),
        ),
        Panel(
            title="Keys",
            unit="short",
            queries=(
                ("max by (pool) (kvist:storage_pool_keys_in_memory)", "{{pool}} in memory"),
                ("max by (pool) (kvist:storage_pool_keys_on_ssd)", "{{pool}} on SSD"),
            ),
        ),
        Panel(title="Stores", unit="short", queries=(("max by (pool) (kvist:storage_pool_stores)", "{{pool}}"),)),
    ),
}


def dashboard() -> dict[str, Any]:
    return {
        "title": "Kvist",
        "uid": "kvist",
        "tags": ["kvist"],
        "editable": True,
        "refresh": "10s",
        "schemaVersion": 39,
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "data source"},
                _variable("role", "label_values(kvist:worker_up, role)"),
                _variable("worker", 'label_values(kvist:worker_up{role=~"$role"}, worker)'),
            ]
        },
        "panels": list(_panels()),
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, y = 0, 0
    for title, panels in ROWS.items():
        number += 1
        position = {"x": 0, "y": y, "w": _WIDTH * _COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": position, "panels": []}
        y += 1
        for place, panel in enumerate(panels):
            number += 1
            row, column = divmod(place, _COLUMNS)
            yield {
                "id": number,
                "type": "timeseries",
                "title": panel.title,
                "description": panel.text,
                "datasource": {"type": "prometheus", "uid": "${datasource}"},
                "gridPos": {"x": _WIDTH * column, "y": y + _HEIGHT * row, "w": _WIDTH, "h": _HEIGHT},
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "options": {"tooltip": {"mode": "multi"}},
                "targets": [
                    {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend}
                    for index, (query, legend) in enumerate(panel.queries)
                ],
            }
        y += _HEIGHT * -(-len(panels) // _COLUMNS)


def page() -> str:
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
