"""The metrics of the pool's nodes, as plain functions from numbers to Prometheus' families."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


def master_families(*, is_up: bool = False, num_restarts: int = 0) -> Iterator[Metric]:
    """Yield the metrics of `kvist master`; Mooncake's own follow them."""
    yield GaugeMetricFamily("kvist:master_up", "1 if the master of the pool answers", float(is_up))
    yield CounterMetricFamily("kvist:master_restarts", "restarts of the master after it died", num_restarts)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFigures:
    """The state of a store, in numbers."""

    state: str
    states: Sequence[str] = ()
    is_listed: bool = False
    memory_bytes: int = 0
    memory_used_bytes: int = 0
    ssd_limit_bytes: int = 0  # 0: the store has no SSD
    ssd_bytes: int = 0
    num_ssd_pages: int = 0
    num_removed_pages: int = 0


def store_families(figures: StoreFigures) -> Iterator[Metric]:
    """Yield the metrics of `kvist store`."""
    state = GaugeMetricFamily("kvist:store_state", "1 for the state that the store is in", labels=["state"])
    for one in figures.states:
        state.add_metric([one], float(one == figures.state))
    yield state
    yield GaugeMetricFamily("kvist:store_listed", "1 if the master lists this store", float(figures.is_listed))
    yield GaugeMetricFamily("kvist:store_memory_bytes", "memory lent to the pool", figures.memory_bytes)
    yield GaugeMetricFamily(
        "kvist:store_memory_used_bytes", "of that memory, bytes that hold pages", figures.memory_used_bytes
    )
    if figures.ssd_limit_bytes:
        yield GaugeMetricFamily("kvist:store_ssd_limit_bytes", "--ssd-size of the store", figures.ssd_limit_bytes)
        yield GaugeMetricFamily("kvist:store_ssd_bytes", "bytes of pages on the SSD", figures.ssd_bytes)
        yield GaugeMetricFamily("kvist:store_ssd_pages", "pages on the SSD", figures.num_ssd_pages)
        yield CounterMetricFamily(
            "kvist:store_ssd_removed_pages", "pages removed to stay within --ssd-size", figures.num_removed_pages
        )
