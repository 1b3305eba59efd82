"""Estimates how long requests wait in the queue (service_time.py), from the state of the scheduler.

The tokens to be computed are those that begun prompts have left, and those that the gateway expects of waiting ones
(`Submit.num_uncomputed_tokens`). While places are free, the mean time of a request counts only if it is that of several
requests: a burst at an idle worker does not wait as long as the one request before it took. Before a request has ended,
the age of the oldest one stands for that time: the first ones to end are short.
"""

from __future__ import annotations

from kvist.scheduler.active import ActiveRequest
from kvist.scheduler.context import SchedulerContext
from kvist.scheduler.states import Requests
from kvist.service_time import Queue, queue_wait_s


def whole_wait_s(context: SchedulerContext, requests: Requests) -> float | None:
    """Return how long the queue lasts; None if nothing has been measured yet."""
    return _wait_s(context, requests, len(requests.unadmitted), most_at_once=0)


def wait_before_s(context: SchedulerContext, requests: Requests, newcomer: ActiveRequest) -> float | None:
    """Return how long a new request would wait for its turn; None if nothing has been measured yet.

    The requests that the next step can admit do not count: it has places and tokens for them."""
    num_queued, num_tokens = len(requests.unadmitted), requests.unadmitted.num_tokens
    per_step = max(1, context.config.max_prefill_tokens * num_queued // max(1, num_tokens))
    num_ahead = requests.unadmitted.num_ahead(newcomer)
    return _wait_s(context, requests, num_ahead, most_at_once=per_step)


def _wait_s(context: SchedulerContext, requests: Requests, num_ahead: int, *, most_at_once: int) -> float | None:
    """Return the wait for the first `num_ahead` requests. The next step has tokens for `most_at_once` of them."""
    num_free = _num_free(context, requests)
    num_at_once = min(num_free, most_at_once)
    if num_ahead <= num_at_once:
        return 0.0
    num_served, service = len(requests.live) - requests.num_waiting, context.service_time
    queue = Queue(
        num_requests=num_ahead,
        num_tokens=context.num_begun_tokens
        + requests.unadmitted.num_tokens * (num_ahead - num_at_once) / len(requests.unadmitted),
        num_free=num_free,
        num_places=max(num_served, context.config.max_running_requests) if num_free else num_served,
    )
    service_s = service.mean_s if service.is_settled or not num_free else None
    if service.mean_s is None and not num_free:
        service_s = context.now_s - next(iter(requests.live.values())).arrived_s
    return queue_wait_s(queue, tokens_per_s=context.prompt_rate.tokens_per_s, service_s=service_s)


def _num_free(context: SchedulerContext, requests: Requests) -> int:
    """Return the number of places that requests can have at once."""
    if context.lacks_pages:
        return 0
    return max(0, context.config.max_running_requests - requests.num_counted_as_running)
