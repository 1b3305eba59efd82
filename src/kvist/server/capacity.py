"""Limits, rates, queue and pages of a worker, for clients that plan their requests (/server_info)."""

from __future__ import annotations

from kvist.request import MAX_SHORT_ANSWER, Role
from kvist.router.stream import WorkerSnapshot


def capacity_of(worker: WorkerSnapshot) -> dict[str, object] | None:
    """Return limits in tokens and requests, rates, and pages by tier; None before the worker has described itself.

    Rates begin with assumed values and follow what is measured."""
    spec, rates = worker.spec, worker.rates
    if spec is None:
        return None
    return {
        "role": worker.role_name,
        "page_size": spec.page_size,
        "max_model_len": spec.max_model_len,
        "max_running_requests": spec.max_running_requests,
        "max_queued_requests": spec.max_queued_requests,
        "max_answer_tokens": MAX_SHORT_ANSWER if worker.role is Role.PREFILL else None,
        "prefill_tokens_per_s": round(rates.prompt_tokens_per_s, 1),
        "decode_step_ms": None if rates.decode_step_s is None else round(1000 * rates.decode_step_s, 3),
        "handoff_bytes_per_s": round(rates.handoff_bytes_per_s),
        "host_bytes_per_s": round(rates.host_bytes_per_s),
        "storage_bytes_per_s": round(rates.store_bytes_per_s),
        "queue_ms": round(_queue_ms(worker), 3),
        "pages": _pages(worker),
    }


def _queue_ms(worker: WorkerSnapshot) -> float:
    """Return how long a new prompt waits: by the prompts of this gateway, or by the worker's own estimate."""
    reported_s = 0.0 if worker.load is None else worker.load.queue_wait_s or 0.0
    return 1000 * max(reported_s, worker.num_pending_tokens / worker.rates.prompt_tokens_per_s)


def _pages(worker: WorkerSnapshot) -> dict[str, dict[str, int]]:
    """Return the pages of each tier; only the total before the first report. A leased page is a cached page."""
    spec, load = worker.spec, worker.load
    assert spec is not None
    device, host = {"total": spec.num_pages}, {"total": spec.num_host_pages}
    if load is not None:
        device |= {
            "free": load.num_free_pages,
            "cached": load.num_cached_pages,
            "used": load.num_owned_pages + load.num_in_flight_pages,
            "leased": load.leases.num_pages,
            "leasable": max(0, load.leases.max_pages - load.leases.num_pages),
        }
        host |= load.num_host_pages
    return {"device": device, "host": host}
