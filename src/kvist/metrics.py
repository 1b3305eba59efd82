"""Prometheus metrics of one gateway. Names are those of vLLM and SGLang for equal meanings, with the prefix `kvist:`.

Owns its registry (no globals). On the hot path all values are plain Python numbers, written by the event loop alone,
without locks or label look-ups; Prometheus objects are created at each scrape, which also calls `of_workers` for the
metrics of the workers (server/worker_metrics.py).

Counters that engines send in `LoadReport.totals` appear as `kvist:worker_<name>_total`; ENGINE_TOTALS has the help text
of known names. Unknown names are exported too. docs/metrics.md lists all metrics.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

ENGINE_TOTALS: Mapping[str, str] = {
    "steps": "engine steps finished",
    "failed_steps": "engine steps that failed in the model or on the device, or in which the model computed NaN",
    "abandoned_steps": "engine steps abandoned half-way on a CPU because all clients of the step had disconnected",
    "prompt_tokens": "prompt tokens of admitted requests",
    "cached_prompt_tokens": "prompt tokens of admitted requests that were found in the page cache",
    "ceiling_prompt_tokens": "prompt tokens that would have been cached if no page had ever been evicted",
    "ceiling_remembered_pages": "evicted pages whose digests were remembered, to count ceiling_prompt_tokens",
    "ceiling_forgotten_pages": "remembered digests that were forgotten; above 0 ceiling_prompt_tokens is too low",
    "computed_prompt_tokens": "prompt tokens computed by the model, recomputed ones included",
    "generation_tokens": "output tokens produced",
    "preemptions": "running requests preempted because no free page was left",
    "requests_finished": "requests that ended with all their tokens",
    "requests_failed": "requests that ended with an error",
    "requests_aborted": "requests aborted by their gateway",
    "requests_refused": "requests refused because the queue was full or the request was invalid",
    "requests_displaced": "waiting requests removed from a full queue in favour of a caller with fewer requests in it",
    "handoffs_sent": "handoffs sent by this prefill worker and acknowledged by the decode worker",
    "handoffs_received": "handoffs granted and verified by this decode worker",
    "handoffs_failed": "handoffs that failed, were refused or timed out",
    "handoffs_cancelled": "handoffs cancelled because the request was aborted: its client or gateway had disconnected",
    "foreign_grants": "grants refused because the gateway had named another decode worker",
    "handoff_pages": "pages written by handoffs",
    "handoff_bytes": "bytes written by handoffs",
    "plan_cpu_seconds": "processor time spent planning steps",
    "launch_cpu_seconds": "processor time spent launching steps (on a CPU: computing them)",
    "read_cpu_seconds": "processor time spent reading the results of steps; on a GPU mostly waiting for the device",
    "loop_cpu_seconds": "processor time of the engine loop: planning, launching and reading steps, and messages",
    "process_cpu_seconds": "processor time of the engine process, all threads",
    "handoff_seconds": "total time of handoffs, from the Grant to the Ack (sent) or to verified pages (received)",
    "device_hit_pages": "pages of admitted requests found in the device pool (L1)",
    "device_miss_pages": "pages of admitted requests not found in the device pool (L1)",
    "device_evicted_pages": "cached pages dropped from the device pool",
    "host_hit_pages": "pages not found in the device pool but found in the host tier (L2)",
    "host_miss_pages": "pages found neither in the device pool nor in the host tier (L2)",
    "host_evicted_pages": "pages dropped from the host tier",
    "host_loaded_pages": "pages copied from the host tier back to the device pool",
    "host_backed_up_pages": "pages copied to the host tier",
    "host_skipped_pages": "pages not copied to the host tier: too many copies in progress, or the tier was full",
    "host_failed_pages": "pages of failed copies to or from the host tier",
    "storage_hit_pages": "pages missing in the host tier when a request arrived, and found in the storage tier (L3)",
    "storage_miss_pages": "pages missing in the host tier when a request arrived, and in the storage tier (L3) too",
    "storage_fetched_pages": "pages copied from the storage tier to the host tier",
    "storage_stored_pages": "pages written to the storage tier, or found there already",
    "storage_skipped_pages": "pages not stored because the host tier evicted them before the store had room",
    "storage_failed_pages": "pages of failed copies to or from the storage tier",
    "storage_finds": "calls that looked up pages in the store",
    "storage_find_seconds": "total time of calls that looked up pages in the store",
    "storage_reads": "copies from the storage tier to the host tier",
    "storage_read_bytes": "bytes copied from the storage tier to the host tier",
    "storage_read_seconds": "total time of copies from the storage tier to the host tier",
    "storage_writes": "copies from the host tier to the storage tier",
    "storage_write_bytes": "bytes copied from the host tier to the storage tier, pages found there already included",
    "storage_write_seconds": "total time of copies from the host tier to the storage tier",
    "storage_slow_calls": "store calls that exceeded their time limit",
    "storage_raised_calls": "store calls that raised an unexpected exception: a bug in the store",
    "storage_unasked_jobs": "lookups, reads and writes skipped because the store hangs (its circuit breaker is open)",
    "storage_broken_pages": "stored pages with a wrong header, size, owner or seal; each counts as a miss",
    "storage_refused_pages": "pages for which the store had no room",
    "storage_evicted_pages": "pages that this worker evicted from the store to keep the size limit",
    "prefetches": "requests that fetched pages from the storage tier, or waited for a fetch of another request",
    "prefetch_timeouts": "requests that stopped waiting for the storage tier before all their pages were fetched",
    "prefetch_wait_seconds": "total time that requests waited for the storage tier, from arrival to the queue",
    "host_loads": "copies from the host tier",
    "host_load_bytes": "bytes copied from the host tier",
    "host_load_seconds": "total time of copies from the host tier",
    "host_backups": "copies to the host tier",
    "host_backup_bytes": "bytes copied to the host tier",
    "host_backup_seconds": "total time of copies to the host tier",
    "undecodable_messages": "messages dropped because they could not be decoded",
    "refused_connections": "connections to the engine's socket refused because of another cluster key, or none",
    "unexpected_messages": "messages dropped because their sender may not send them, or their values are impossible",
}

_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Histogram with fixed upper bounds; `observe` takes well under a microsecond."""

    def __init__(self, bounds: tuple[float, ...] = _LATENCY_BUCKETS_S) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, text: str) -> Metric:
        cumulative, buckets = 0, []
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            cumulative += count
            buckets.append((bound, float(cumulative)))
        family = HistogramMetricFamily(f"kvist:{name}", text)
        family.add_metric([], buckets, self._sum)
        return family


@dataclass(slots=True, kw_only=True, eq=False)
class GatewayMetrics(Collector):
    """Metrics of one gateway. The server's event loop writes the fields; each scrape calls the callables."""

    of_workers: Callable[[], Iterable[Metric]] = tuple
    num_long_requests_waiting: Callable[[], int] = int
    num_body_bytes: Callable[[], int] = int
    num_requests: int = 0  # engine requests in flight now
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_finished: Counter[str] = field(default_factory=Counter)  # by finish reason
    num_failed: Counter[str] = field(default_factory=Counter)  # by error code
    num_disconnected: int = 0
    num_http_requests: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # by method, path and status
    num_refused_connections: int = 0
    loop_lag_s: Histogram = field(default_factory=Histogram)
    time_to_first_token_s: Histogram = field(default_factory=Histogram)
    inter_token_latency_s: Histogram = field(default_factory=Histogram)
    time_per_output_token_s: Histogram = field(default_factory=Histogram)
    e2e_latency_s: Histogram = field(default_factory=Histogram)

    def exposition(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        ProcessCollector(registry=registry)  # processor time, memory and open files of this process
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "kvist:gateway_requests_in_flight", "engine requests in flight at this gateway", self.num_requests
        )
        yield CounterMetricFamily("kvist:prompt_tokens", "prompt tokens of answered requests", self.num_prompt_tokens)
        yield CounterMetricFamily(
            "kvist:cached_prompt_tokens",
            "prompt tokens of answered requests that were found in a page cache",
            self.num_cached_prompt_tokens,
        )
        yield CounterMetricFamily("kvist:generation_tokens", "output tokens received", self.num_generation_tokens)
        yield _counter(
            "request_success", "requests that were answered completely", "finished_reason", self.num_finished
        )
        yield _counter("request_failure", "requests that ended in an error", "code", self.num_failed)
        yield CounterMetricFamily(
            "kvist:client_disconnects",
            "clients that disconnected before the end of their answer",
            self.num_disconnected,
        )
        yield _http_requests(self.num_http_requests)
        yield CounterMetricFamily(
            "kvist:http_connections_refused",
            "connections refused because too many were open",
            self.num_refused_connections,
        )
        yield GaugeMetricFamily(
            "kvist:gateway_long_requests_waiting",
            "long requests that wait for a tokenizer thread",
            self.num_long_requests_waiting(),
        )
        yield GaugeMetricFamily(
            "kvist:gateway_body_bytes",
            "bytes of large request bodies in memory, until they are tokenised",
            self.num_body_bytes(),
        )
        yield self.loop_lag_s.family(
            "gateway_loop_lag_seconds", "delay of the gateway's event loop, measured ten times a second"
        )
        yield self.time_to_first_token_s.family(
            "time_to_first_token_seconds", "time from reading the request to its first token"
        )
        yield self.inter_token_latency_s.family("inter_token_latency_seconds", "time between two chunks of one stream")
        yield self.time_per_output_token_s.family(
            "time_per_output_token_seconds", "mean time per output token of a request, after its first token"
        )
        yield self.e2e_latency_s.family(
            "e2e_request_latency_seconds", "time from reading the request to its last token"
        )
        yield from self.of_workers()


def _http_requests(counts: Mapping[tuple[str, str, str], int]) -> Metric:
    labels = ["method", "path", "status"]
    family = CounterMetricFamily("kvist:http_requests", "HTTP requests answered or refused", labels=labels)
    for values, count in sorted(counts.items()):
        family.add_metric(values, count)
    return family


def _counter(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"kvist:{name}", text, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family
