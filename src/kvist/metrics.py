"""Prometheus metrics of one gateway. Names are those of vLLM and SGLang for equal meanings, with the prefix `kvist:`.

Owns its registry (no globals). On the hot path all values are plain Python numbers, written by the event loop alone,
without locks or label look-ups; Prometheus objects are created at each scrape, which also calls `of_workers` for the
metrics of the workers (server/worker_metrics.py).

docs/metrics.md lists all metrics; scripts/metrics_page.py writes its tables.
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

_PAUSE_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(0.75, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)
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

    @property
    def bounds(self) -> tuple[float, ...]:
        """The upper bounds of all buckets but the last, which has none."""
        return self._bounds

    def counts(self) -> tuple[int, ...]:
        """Return the number of values in each bucket, one more than `bounds`."""
        return tuple(self._counts)

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
    num_cached_by_tier: Counter[str] = field(default_factory=Counter)  # the same, by device, host, storage
    num_generation_tokens: int = 0
    num_finished: Counter[str] = field(default_factory=Counter)  # by finish reason
    num_failed: Counter[str] = field(default_factory=Counter)  # by error code
    num_disconnected: int = 0
    num_http_requests: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # by method, path and status
    num_refused_connections: int = 0
    loop_lag_s: Histogram = field(default_factory=Histogram)
    time_to_first_token_s: Histogram = field(default_factory=Histogram)
    inter_token_latency_s: Histogram = field(default_factory=lambda: Histogram(_PAUSE_BUCKETS_S))
    second_token_s: Histogram = field(default_factory=Histogram)
    time_per_output_token_s: Histogram = field(default_factory=Histogram)
    e2e_latency_s: Histogram = field(default_factory=Histogram)
    grammar_compile_s: Histogram = field(default_factory=Histogram)

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
        yield _counter(
            "cached_tier_tokens",
            "prompt tokens of answered requests that were found in a page cache, by tier: device, host, storage",
            "tier",
            self.num_cached_by_tier,
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
            "connections closed because --max-connections were open",
            self.num_refused_connections,
        )
        yield GaugeMetricFamily(
            "kvist:gateway_long_requests_waiting",
            "long requests that wait for one of --tokenizer-threads",
            self.num_long_requests_waiting(),
        )
        yield GaugeMetricFamily(
            "kvist:gateway_body_bytes",
            "bytes of large request bodies in memory, until they are tokenised, of --max-total-body-bytes",
            self.num_body_bytes(),
        )
        yield self.loop_lag_s.family(
            "gateway_loop_lag_seconds", "delay of the gateway's event loop, measured ten times a second"
        )
        yield self.time_to_first_token_s.family(
            "time_to_first_token_seconds", "time from reading the request to its first token"
        )
        yield self.inter_token_latency_s.family("inter_token_latency_seconds", "time between two chunks of one stream")
        yield self.second_token_s.family(
            "second_token_seconds", "time between the first and the second token of requests that were handed over"
        )
        yield self.time_per_output_token_s.family(
            "time_per_output_token_seconds", "mean time per output token of a request, after its first token"
        )
        yield self.e2e_latency_s.family(
            "e2e_request_latency_seconds", "time from reading the request to its last token"
        )
        yield self.grammar_compile_s.family(
            "grammar_compilation_time_seconds",
            "time that a request waited at this gateway for its schema or grammar to be compiled",
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
