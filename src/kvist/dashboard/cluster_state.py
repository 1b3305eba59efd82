"""The state of workers, page pools and routing, in the form of snapshot.py. PURE."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice

from kvist.dashboard import snapshot
from kvist.dashboard.windows import CounterWindow
from kvist.request import Role
from kvist.router.policy import WorkerView
from kvist.router.stream import ClusterSnapshot, Decision, WorkerSnapshot
from kvist.wire import LoadReport, StorageStatus

_MOST_STORES = 64  # of a pool that are shown
_SENT, _RECEIVED = ("handoffs_sent", "store_handoffs_sent"), ("handoffs_received", "store_handoffs_received")
_STEPS = ("prompt_step_seconds", "decode_step_seconds")
_HITS = ("prompt_tokens", "cached_prompt_tokens", "ceiling_prompt_tokens")
_OTHERS = ("handoffs_failed", "handoff_pages", "handoff_bytes", "handoff_seconds", "computed_prompt_tokens")
COUNTERS = (*_SENT, *_RECEIVED, *_STEPS, *_HITS, *_OTHERS, "generation_tokens", "preemptions")  # that are recorded

Totals = Mapping[str, float]
Windows = Mapping[str, CounterWindow]  # by worker id


def worker_of(worker: WorkerSnapshot, window: CounterWindow, *, rate_s: float, hits_s: float) -> snapshot.Worker:
    """Return the state of a worker: rates of the last `rate_s` seconds, hits of the last `hits_s`."""
    spec, load = worker.spec, worker.load
    totals = [] if load is None else [load.totals]
    return snapshot.Worker(
        worker_id=worker.worker_id,
        url=worker.url,
        role=worker.role_name,
        state=worker.state,
        problem=worker.problem,
        device="" if spec is None or not spec.transports else spec.transports[0].device,
        tp_size=None if spec is None else spec.tp_size,
        num_running=None if load is None else load.num_running,
        num_waiting=None if load is None else load.num_waiting,
        num_in_flight=worker.num_in_flight,
        num_pending_tokens=worker.num_pending_tokens,
        max_running_requests=None if spec is None else spec.max_running_requests,
        queue_wait_s=None if load is None else load.queue_wait_s,
        page_bytes=None if spec is None else spec.page_bytes,
        pages=None if load is None else _device_pages(load),
        host_pages=None if load is None else _host_pages(load),
        num_leased_pages=0 if load is None else load.leases.num_pages,
        storage=None if load is None else _storage(load.storage),
        hit_rate=hit_rate_of([window], totals, hits_s),
        computed_tokens_per_s=window.rate("computed_prompt_tokens", rate_s),
        output_tokens_per_s=window.rate("generation_tokens", rate_s),
        busy_share=min(1.0, sum(window.rate(name, rate_s) for name in _STEPS)),
        decode_step_s=worker.rates.decode_step_s,
        handoffs=handoffs_of([worker], {worker.worker_id: window}, rate_s),
        preemptions_per_s=window.rate("preemptions", rate_s),
    )


def hit_rate_of(windows: Collection[CounterWindow], totals: Sequence[Totals], over_s: float) -> snapshot.HitRate:
    prompt, cached, ceiling = (sum(window.growth(name, over_s) for window in windows) for name in _HITS)
    prompt_total, cached_total, ceiling_total = (sum(each.get(name, 0.0) for each in totals) for name in _HITS)
    return snapshot.HitRate(
        cached=_share(cached, prompt),
        ceiling=_share(ceiling, prompt),
        cached_total=_share(cached_total, prompt_total),
        ceiling_total=_share(ceiling_total, prompt_total),
    )


def handoffs_of(workers: Sequence[WorkerSnapshot], windows: Windows, rate_s: float) -> snapshot.Handoffs:
    """Return the handoffs of these workers. Both sides of a handoff count its pages, bytes and time: of several
    workers, those of the side that receives count here."""
    counted = [worker for worker in workers if len(workers) == 1 or worker.role is not Role.PREFILL]
    ids, counted_ids = ([worker.worker_id for worker in some] for some in (workers, counted))
    num_direct = sum(_rate(windows, counted_ids, name, rate_s) for name in ("handoffs_sent", "handoffs_received"))
    seconds = _rate(windows, counted_ids, "handoff_seconds", rate_s)
    loads = [worker.load.totals for worker in workers if worker.load is not None]
    return snapshot.Handoffs(
        sent_per_s=sum(_rate(windows, ids, name, rate_s) for name in _SENT),
        received_per_s=sum(_rate(windows, ids, name, rate_s) for name in _RECEIVED),
        failed_per_s=_rate(windows, ids, "handoffs_failed", rate_s),
        pages_per_s=_rate(windows, counted_ids, "handoff_pages", rate_s),
        bytes_per_s=_rate(windows, counted_ids, "handoff_bytes", rate_s),
        mean_s=_share(seconds, num_direct),
        num_sent=int(sum(totals.get(name, 0.0) for totals in loads for name in _SENT)),
        num_received=int(sum(totals.get(name, 0.0) for totals in loads for name in _RECEIVED)),
    )


def page_pools(cluster: ClusterSnapshot) -> list[snapshot.Pool]:
    found = []
    for location, pool in sorted(cluster.pools().items()):
        status = pool.status
        stores = {} if status is None else dict(islice(status.stores.items(), _MOST_STORES))
        found.append(
            snapshot.Pool(
                location=location,
                master=pool.master,
                age_s=pool.age_s,
                problem=pool.problem,
                num_stores=0 if status is None else status.num_stores,
                num_pages=0 if status is None else status.num_keys,
                capacity_bytes=0 if status is None else status.capacity_bytes,
                used_bytes=0 if status is None else status.used_bytes,
                ssd_capacity_bytes=0 if status is None else status.ssd_capacity_bytes,
                ssd_used_bytes=0 if status is None else status.ssd_used_bytes,
                stores={name: (share.used_bytes, share.capacity_bytes) for name, share in stores.items()},
            )
        )
    return found


def routing_of(cluster: ClusterSnapshot, now_s: float, unix_s: float) -> snapshot.Routing:
    return snapshot.Routing(
        reasons={reason.value: count for reason, count in cluster.num_routes.items() if count},
        num_failovers=cluster.failovers.by_cause.total(),
        num_index_pages=cluster.num_index_entries,
        num_index_bytes=cluster.num_index_bytes,
        decisions=[_decision(each, unix_s - (now_s - each.decided_s)) for each in reversed(cluster.decisions)],
    )


def _decision(decision: Decision, time_unix_s: float) -> snapshot.RouteDecision:
    chosen = (decision.prefill, decision.decode)
    return snapshot.RouteDecision(
        request_id=decision.request_id,
        time_unix_s=time_unix_s,
        reason=decision.reason.value,
        cost_ms=decision.cost_ms,
        way=None if decision.way is None else decision.way.value,
        prefill=decision.prefill,
        decode=decision.decode,
        num_prompt_tokens=decision.num_prompt_tokens,
        num_failovers=decision.num_failovers,
        candidates=[_candidate(view, chosen=view.worker_id in chosen) for view in decision.considered],
    )


def _candidate(view: WorkerView, *, chosen: bool) -> snapshot.Candidate:
    return snapshot.Candidate(
        worker_id=view.worker_id,
        role=view.role.value,
        chosen=chosen,
        num_device_tokens=view.held.num_device * view.page_size,
        num_host_tokens=view.held.num_host * view.page_size,
        num_stored_tokens=view.held.num_stored * view.page_size,
        num_coming_tokens=view.num_coming_tokens,
        num_requests=view.num_requests,
        num_pending_tokens=view.num_pending_tokens,
        served_session=view.served_session,
    )


def _device_pages(load: LoadReport) -> snapshot.Pages:
    used = load.num_owned_pages + load.num_in_flight_pages
    total = used + load.num_cached_pages + load.num_free_pages
    return snapshot.Pages(total=total, used=used, cached=load.num_cached_pages, free=load.num_free_pages)


def _host_pages(load: LoadReport) -> snapshot.Pages | None:
    pages = load.num_host_pages
    if not pages:
        return None
    used, cached, free = (pages.get(state, 0) for state in ("in_flight", "cached", "free"))
    return snapshot.Pages(total=used + cached + free, used=used, cached=cached, free=free)


def _storage(status: StorageStatus | None) -> snapshot.Storage | None:
    if status is None or status.backend is None:
        return None
    return snapshot.Storage(
        backend=status.backend,
        state=status.state,
        breaker=status.breaker,
        stored_bytes=status.stored_bytes,
        location=status.location,
    )


def _rate(windows: Windows, worker_ids: Sequence[str], name: str, over_s: float) -> float:
    return sum(windows[worker_id].rate(name, over_s) for worker_id in worker_ids)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0.0 else None
