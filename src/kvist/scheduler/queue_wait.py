"""Estimates how long requests wait in the queue: the queued tokens ahead, over the measured rate.

Before a rate is known, the time of a request from admission to end gives the rate at which places become free (Little's
law), if all are taken. While places are free, that time says nothing: a burst at an idle worker does not wait for
places.
"""

from __future__ import annotations

from kvist.scheduler.active import ActiveRequest
from kvist.scheduler.context import SchedulerContext
from kvist.scheduler.states import Requests


def queue_wait_s(context: SchedulerContext, requests: Requests) -> float | None:
    """Return how long the queue lasts; None if nothing has been measured yet."""
    return _wait_s(context, requests, len(requests.unadmitted))


def wait_before_s(context: SchedulerContext, requests: Requests, newcomer: ActiveRequest) -> float | None:
    """Return how long a new request would wait for its turn; None if nothing has been measured yet.

    The requests that the next step can admit do not count: it has places and tokens for them."""
    num_queued, num_tokens = len(requests.unadmitted), requests.unadmitted.num_tokens
    num_free = _num_free(context, requests)
    if num_free > 0 and context.drain_rate.tokens_per_s is None:
        return None
    per_step = max(1, context.config.max_prefill_tokens * num_queued // max(1, num_tokens))
    num_ahead = requests.unadmitted.num_ahead(newcomer) - max(0, min(num_free, per_step))
    return 0.0 if num_ahead <= 0 else _wait_s(context, requests, num_ahead)


def _wait_s(context: SchedulerContext, requests: Requests, num_ahead: int) -> float | None:
    num_queued, rate = len(requests.unadmitted), context.drain_rate.tokens_per_s
    if not num_queued:
        return 0.0
    if rate is not None:
        return requests.unadmitted.num_tokens * num_ahead / num_queued / rate
    if _num_free(context, requests) > 0:
        return None
    service_s, num_served = context.service_time.mean_s, len(requests.live) - requests.num_waiting
    return None if service_s is None else service_s * num_ahead / max(1, num_served)


def _num_free(context: SchedulerContext, requests: Requests) -> int:
    """Return the number of free places."""
    return context.config.max_running_requests - requests.num_counted_as_running
