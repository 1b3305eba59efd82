"""Records the counters of a gateway and its workers once a second, and builds snapshots from them. PURE.

A rate is the mean of the last `RATE_S` seconds: workers report once a second, so a shorter time would be uneven. A
point of a chart has the quantiles of the last `CHART_S` seconds; headline figures have those of the last `HEADLINE_S`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvist.dashboard.cluster_state import COUNTERS, handoffs_of, hit_rate_of, page_pools, routing_of, worker_of
from kvist.dashboard.snapshot import HitRate, Quantiles, Series, Server, Snapshot, Tiered, Traffic
from kvist.dashboard.windows import Chart, CounterWindow, HistogramWindow
from kvist.metrics import GatewayMetrics, Histogram
from kvist.router.stream import ClusterSnapshot

RATE_S, CHART_S, HEADLINE_S = 5, 10, 60
MAX_POINTS = 900  # of the charts: 15 minutes
TIERS = ("device", "host", "storage")
LINES = (
    *(f"{what}_{share}_s" for what in ("ttft", "itl") for share in ("p50", "p90", "p99")),
    "output_tokens_per_s",
    *(f"{tier}_tokens_per_s" for tier in (*TIERS, "computed")),  # prompt tokens
    "num_running",
    "num_waiting",
    "hit_rate",
    "hit_ceiling",
    "handoffs_per_s",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The state of a gateway at one moment."""

    now_s: float  # monotonic
    unix_s: float
    server: Server
    cluster: ClusterSnapshot
    metrics: GatewayMetrics


class Recorder:
    """Mutable; has one owner, who calls `record` once a second."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._gateway = CounterWindow(HEADLINE_S)
        self._ttft = _window(metrics.time_to_first_token_s)
        self._itl = _window(metrics.inter_token_latency_s)
        self._e2e = _window(metrics.e2e_latency_s)
        self._workers: dict[str, CounterWindow] = {}
        self._chart = Chart(LINES, MAX_POINTS)

    def record(self, reading: Reading) -> None:
        metrics, now_s = reading.metrics, reading.now_s
        self._gateway.update(now_s, _totals(metrics))
        self._ttft.update(metrics.time_to_first_token_s.counts())
        self._itl.update(metrics.inter_token_latency_s.counts())
        self._e2e.update(metrics.e2e_latency_s.counts())
        present = {}
        for worker in reading.cluster.workers:
            window = self._workers.get(worker.worker_id) or CounterWindow(HEADLINE_S)
            present[str(worker.worker_id)] = window
            if worker.load is not None:
                window.update(now_s, {name: worker.load.totals.get(name, 0.0) for name in COUNTERS})
        self._workers = present  # workers that left are forgotten
        self._chart.append(reading.unix_s, self._point(reading.cluster))

    def _point(self, cluster: ClusterSnapshot) -> dict[str, float | None]:
        shares = (0.5, 0.9, 0.99)
        latencies = [*self._ttft.quantiles(CHART_S, *shares), *self._itl.quantiles(CHART_S, *shares)]
        tokens, hit_rate = self._prompt_tokens(), self._hit_rate(cluster)
        loads = [worker.load for worker in cluster.workers if worker.load is not None]
        values = (
            *latencies,
            self._gateway.rate("output_tokens", 2),
            *(tokens.device, tokens.host, tokens.storage, tokens.computed),
            float(sum(load.num_running for load in loads)),
            float(sum(load.num_waiting for load in loads)),
            hit_rate.cached,
            hit_rate.ceiling,
            handoffs_of(cluster.workers, self._workers, RATE_S).received_per_s,
        )
        return dict(zip(LINES, values, strict=True))

    def snapshot(self, reading: Reading, num_points: int) -> Snapshot:
        """Return the state, with the newest points of the charts. `reading` is the last one that was recorded."""
        cluster, metrics, rate = reading.cluster, reading.metrics, self._gateway.rate
        return Snapshot(
            time_unix_s=reading.unix_s,
            server=reading.server,
            traffic=Traffic(
                num_in_flight=metrics.num_requests,
                num_long_waiting=metrics.num_long_requests_waiting(),
                finished_per_s=rate("finished", RATE_S),
                failed_per_s=rate("failed", RATE_S),
                disconnected_per_s=rate("disconnected", RATE_S),
                prompt_tokens_per_s=self._prompt_tokens(),
                output_tokens_per_s=rate("output_tokens", RATE_S),
                ttft_s=_headline(self._ttft),
                itl_s=_headline(self._itl),
                e2e_s=_headline(self._e2e),
            ),
            hit_rate=self._hit_rate(cluster),
            handoffs=handoffs_of(cluster.workers, self._workers, RATE_S),
            workers=[
                worker_of(worker, self._workers[worker.worker_id], rate_s=RATE_S, hits_s=HEADLINE_S)
                for worker in cluster.workers
            ],
            pools=page_pools(cluster),
            routing=routing_of(cluster, reading.now_s, reading.unix_s),
            series=Series(times_unix_s=self._chart.times(num_points), lines=self._chart.lines(num_points)),
        )

    def _prompt_tokens(self) -> Tiered:
        device, host, storage = (self._gateway.rate(tier, RATE_S) for tier in TIERS)
        computed = max(0.0, self._gateway.rate("prompt_tokens", RATE_S) - device - host - storage)
        return Tiered(device=device, host=host, storage=storage, computed=computed)

    def _hit_rate(self, cluster: ClusterSnapshot) -> HitRate:
        loads = [worker.load for worker in cluster.workers if worker.load is not None]
        return hit_rate_of(self._workers.values(), [load.totals for load in loads], HEADLINE_S)


def _window(histogram: Histogram) -> HistogramWindow:
    return HistogramWindow(histogram.bounds, HEADLINE_S)


def _headline(window: HistogramWindow) -> Quantiles:
    p50, p90, p99 = window.quantiles(HEADLINE_S, 0.5, 0.9, 0.99)
    return Quantiles(p50=p50, p90=p90, p99=p99)


def _totals(metrics: GatewayMetrics) -> dict[str, float]:
    return {
        "finished": metrics.num_finished.total(),
        "failed": metrics.num_failed.total(),
        "disconnected": metrics.num_disconnected,
        "prompt_tokens": metrics.num_prompt_tokens,
        "output_tokens": metrics.num_generation_tokens,
        **{tier: metrics.num_cached_by_tier[tier] for tier in TIERS},
    }
