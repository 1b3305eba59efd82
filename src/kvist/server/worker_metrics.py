"""The metrics of the workers in /metrics: the last report of each worker, labelled by worker and role.

The counters in `LoadReport.totals` appear as `kvist:worker_<name>_total`, with the help text of their declaration.
Names that this version does not know are exported, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvist.engine.counters import COUNTER_BY_NAME
from kvist.router.members import MemberCounts
from kvist.router.stream import ClusterSnapshot, FailoverCounts
from kvist.wire import LoadReport

_STORAGE_GAUGES = (
    ("attached", "1 when a store is attached"),
    ("breaker_open", "1 while the store is not used because calls to it hung or failed"),
    ("quarantined_pages", "pages of the host tier that a hung call to the store may still read or write"),
    ("stored_bytes", "bytes in the store, from all workers that use it"),
)


_POOL_GAUGES = (
    ("capacity_bytes", "memory of all stores of the page pool, as its master counts it"),
    ("used_bytes", "of that memory, bytes that hold pages"),
    ("ssd_capacity_bytes", "limits of all SSDs of the page pool"),
    ("ssd_used_bytes", "bytes of pages on the SSDs of the page pool"),
    ("keys", "pages in the page pool"),
    ("keys_in_memory", "pages with a copy in memory"),
    ("keys_on_ssd", "pages with a copy on an SSD"),
    ("stores", "stores of the page pool that are alive"),
    ("hot_copies", "copies made of pages that many readers want, since the master started"),
    ("moved_copies", "copies moved away from stores that were drained, since the master started"),
    ("evicted_keys", "pages evicted from memory, since the master started"),
    ("failed_allocations", "pages refused because no store had room, since the master started"),
)


def pool_families(snapshot: ClusterSnapshot) -> Iterator[Metric]:
    """Yield the figures of each page pool whose master has answered."""
    pools = {location: pool for location, pool in snapshot.pools().items() if pool.status is not None}
    for name, text in _POOL_GAUGES:
        gauge = GaugeMetricFamily(f"kvist:storage_pool_{name}", text, labels=["pool"])
        for location, pool in sorted(pools.items()):
            count = getattr(pool.status, name if name.endswith("_bytes") else f"num_{name}")
            gauge.add_metric([location], float(count))
        yield gauge


def pages_by_state(load: LoadReport | None) -> dict[str, int]:
    if load is None:
        return {}
    return {
        "free": load.num_free_pages,
        "cached": load.num_cached_pages,
        "owned": load.num_owned_pages,
        "in_flight": load.num_in_flight_pages,
    }


def member_families(counts: MemberCounts) -> Iterator[Metric]:
    announcements = CounterMetricFamily(
        "kvist:worker_announcements", "announcements that workers sent, and those that ended", labels=["outcome"]
    )
    for outcome, count in counts.announcements.items():
        announcements.add_metric([outcome.value], count)
    refused = CounterMetricFamily(
        "kvist:worker_changes_refused",
        "requests to add, announce or remove a worker that were refused, by error code; a request without an API key "
        "counts only in kvist:http_requests_total",
        labels=["code"],
    )
    for code, count in sorted(counts.refused.items()):
        refused.add_metric([code], count)
    failures = CounterMetricFamily(
        "kvist:discovery_failures", "failed readings of a --discovery; its workers stay as they are", labels=["source"]
    )
    for source, count in sorted(counts.discovery_failures.items()):
        failures.add_metric([source], count)
    yield from (announcements, refused, failures)


def _failover_families(counts: FailoverCounts) -> Iterator[Metric]:
    failovers = CounterMetricFamily(
        "kvist:failovers",
        "requests that were sent to other workers because a worker had failed, by the code of its error",
        labels=["cause"],
    )
    for cause, count in sorted(counts.by_cause.items()):
        failovers.add_metric([cause], count)
    yield failovers
    yield CounterMetricFamily(
        "kvist:resumed_streams", "pauses by a failover after which a token came", counts.num_resumed
    )
    yield CounterMetricFamily(
        "kvist:unresumed_streams", "requests that ended because no worker went on with them", counts.num_failed
    )
    yield counts.pause_s.family("failover_pause_seconds", "time from the failure of a worker to the next token")


def _role_switches(snapshot: ClusterSnapshot) -> Metric:
    switches = CounterMetricFamily(
        "kvist:role_switches", "switches of workers to another role that this router has seen", labels=["before", "now"]
    )
    for (before, now), count in snapshot.role_switches.items():
        switches.add_metric([str(before), str(now)], count)
    return switches


def worker_families(snapshot: ClusterSnapshot) -> Iterator[Metric]:
    labels = ["worker", "role"]
    alive = GaugeMetricFamily("kvist:worker_up", "1 when requests can be sent to this worker", labels=labels)
    running = GaugeMetricFamily("kvist:num_requests_running", "requests in the running batch", labels=labels)
    waiting = GaugeMetricFamily("kvist:num_requests_waiting", "requests in the waiting queue", labels=labels)
    usage = GaugeMetricFamily("kvist:kv_cache_usage_perc", "share of pages in use by requests, 0 to 1", labels=labels)
    pages = GaugeMetricFamily("kvist:kv_pages", "pages of the device pool by state", labels=[*labels, "state"])
    leases = GaugeMetricFamily("kvist:leases", "leases of prompts", labels=labels)
    leased = GaugeMetricFamily(
        "kvist:leased_pages", "pages of the device pool that leases pin, a part of the cached ones", labels=labels
    )
    host_pages = GaugeMetricFamily("kvist:host_pages", "pages of the host tier by state", labels=[*labels, "state"])
    storage = [GaugeMetricFamily(f"kvist:storage_{name}", text, labels=labels) for name, text in _STORAGE_GAUGES]
    errors = CounterMetricFamily(
        "kvist:worker_storage_errors", "failed system calls of the store, by errno", labels=[*labels, "errno"]
    )
    rejected = CounterMetricFamily(
        "kvist:worker_rejected_messages",
        "messages of this worker that the gateway rejected as undecodable or invalid; one about a request fails that "
        "request",
        labels=labels,
    )
    handoffs = CounterMetricFamily(
        "kvist:handoffs", "requests sent to a prefill and a decode worker, by way and cause", labels=["way", "cause"]
    )
    for (way, cause), count in snapshot.handoffs.items():
        handoffs.add_metric([way.value, cause.value], count)
    named = GaugeMetricFamily("kvist:workers_named", "workers that this source names", labels=["source"])
    for source, count in sorted(Counter(each for worker in snapshot.workers for each in worker.sources).items()):
        named.add_metric([source], count)
    states = GaugeMetricFamily("kvist:workers", "workers in this state", labels=["state"])
    for state, count in sorted(Counter(worker.state for worker in snapshot.workers).items()):
        states.add_metric([state], count)
    known = GaugeMetricFamily(
        "kvist:worker_known_pages", "cached pages of this worker that routing knows, in each tier", labels=labels
    )
    cut = GaugeMetricFamily(
        "kvist:worker_cut_pages",
        "cached pages of this worker that routing leaves out: more than its spec allows, or than its share of "
        "--max-known-pages",
        labels=labels,
    )
    listings = CounterMetricFamily(
        "kvist:worker_page_listings",
        "times that the gateway listed all cached pages of this worker: it joined, a message was lost (gap), the sums "
        "of both sides differed (sums), or other workers joined (share)",
        labels=[*labels, "reason"],
    )
    totals: dict[str, CounterMetricFamily] = {}
    for worker in snapshot.workers:
        label_values, load = [worker.worker_id, worker.role_name], worker.load
        alive.add_metric(label_values, float(worker.alive))
        rejected.add_metric(label_values, worker.num_rejected_messages)
        known.add_metric(label_values, worker.known_pages.num_pages)
        cut.add_metric(label_values, worker.known_pages.num_cut)
        for reason, count in worker.known_pages.num_listings.items():
            listings.add_metric([*label_values, reason], count)
        running.add_metric(label_values, 0 if load is None else load.num_running)
        waiting.add_metric(label_values, 0 if load is None else load.num_waiting)
        by_state = pages_by_state(load)
        num_pages = sum(by_state.values())
        unused = by_state.get("free", 0) + by_state.get("cached", 0)
        usage.add_metric(label_values, 1 - unused / num_pages if num_pages else 0.0)
        for state, count in by_state.items():
            pages.add_metric([*label_values, state], count)
        if load is None:
            continue
        leases.add_metric(label_values, load.leases.num_leases)
        leased.add_metric(label_values, load.leases.num_pages)
        for state, count in load.num_host_pages.items():
            host_pages.add_metric([*label_values, state], count)
        if (tier := load.storage) is not None:
            now = tier.state == "attached", tier.breaker != "closed", tier.num_quarantined_pages, tier.stored_bytes
            for gauge, state_now in zip(storage, now, strict=True):
                gauge.add_metric(label_values, float(state_now))
            for errno, count in sorted(tier.errors.items()):
                errors.add_metric([*label_values, errno], count)
        for name, value in sorted(load.totals.items()):
            if name not in totals:
                declared = COUNTER_BY_NAME.get(name)
                text = name if declared is None else declared.text
                totals[name] = CounterMetricFamily(f"kvist:worker_{name}", text, labels=labels)
            totals[name].add_metric(label_values, value)
    routes = CounterMetricFamily(
        "kvist:routes",
        "routes chosen, by reason: unified, split (two workers), held, prefill_queue, cheaper and no_prefill (decode "
        "alone), short_answer and no_decode (prefill alone)",
        labels=["reason"],
    )
    for why, count in snapshot.num_routes.items():
        routes.add_metric([why.value], count)
    yield from pool_families(snapshot)
    yield routes
    yield from _failover_families(snapshot.failovers)
    yield _role_switches(snapshot)
    yield GaugeMetricFamily(
        "kvist:cancelled_requests_held",
        "cancelled requests that at least one worker has not ended yet",
        snapshot.cancelled.num_held,
    )  # fmt: skip
    yield GaugeMetricFamily(
        "kvist:routing_index_pages", "different cached pages that routing knows", snapshot.num_index_entries
    )
    yield GaugeMetricFamily("kvist:routing_index_bytes", "memory of the index of pages", snapshot.num_index_bytes)
    yield snapshot.cancelled.release_s.family(
        "cancel_release_seconds", "time from the client's disconnect to the end of its request at every worker"
    )
    yield from (
        handoffs,
        named,
        states,
        alive,
        running,
        waiting,
        usage,
        pages,
        leases,
        leased,
        host_pages,
        *storage,
        errors,
        rejected,
        known,
        cut,
        listings,
        *totals.values(),
    )
