"""The requests that wait for pages from the store, before they enter the queue.

A request waits until its prefetch has settled (nothing is left to wait for), but not longer than the prefetch policy
allows, and never longer than half of `queue_timeout_s`. A store that hangs costs time, but does not fail the request. A
request also waits when the engine is idle: if it were admitted at once, there would be no time to fetch. Pages that
have come are loaded into the device pool meanwhile (early_loads.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from kvist.kv.cache import PageCache
from kvist.kv.lease import PageLease
from kvist.kv.tiers.prefetch import Prefetch
from kvist.plan.tiers import PagesLoaded
from kvist.scheduler.active import ActiveRequest, RequestState
from kvist.scheduler.context import SchedulerContext
from kvist.scheduler.early_loads import EarlyLoads
from kvist.scheduler.timers import TimerKind


class Fetching:
    """The requests in state FETCHING; also opens and closes the prefetch of each request. Mutable; its one owner is
    `Requests`."""

    def __init__(self, context: SchedulerContext, cache: PageCache) -> None:
        self._context = context
        self._cache = cache
        self._requests: dict[Prefetch, ActiveRequest] = {}
        self._early = EarlyLoads(cache)
        self._waited: dict[Prefetch, ActiveRequest] = {}  # the same requests, and those that wait for their admission

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[ActiveRequest]:
        return iter(self._requests.values())

    def open(self, request: ActiveRequest) -> None:
        """Start the prefetch of pages missing in the device pool and the host tier."""
        prefetch = request.prefetch = self._cache.prefetch(
            request.token_ids,
            cache_salt=request.request.cache_salt,
            max_tokens=request.max_cached_tokens,
            for_handoff=request.from_store,
        )
        if prefetch is not None:
            self._context.count("prefetches")

    def is_awaited(self, request: ActiveRequest) -> bool:
        """Return whether the request has to wait for its prefetch now."""
        prefetch = request.prefetch
        return prefetch is not None and not prefetch.is_done and self._deadline_s(request) > self._context.now_s

    def close(self, request: ActiveRequest) -> None:
        """Close the prefetch, if any, of a request that was admitted or has ended."""
        prefetch, storage = request.prefetch, self._cache.storage
        if prefetch is not None and storage is not None:
            self._early.close(prefetch)
            self._waited.pop(prefetch, None)
            storage.close(prefetch)
            request.prefetch = None

    # ---------------------------------------------------------------- pages loaded before the admission

    def may_load_early(self, *, has_place: bool) -> bool:
        """Return whether there may be pages to load; see `EarlyLoads.may_start`."""
        storage = self._cache.storage
        if storage is None:
            return False
        for prefetch in storage.take_progressed():
            self._early.make_due(prefetch)
        return self._early.may_start(has_place=has_place)

    def load_early(self, *, num_reserved: int, max_requests: int) -> None:
        """Load pages that have come; see `EarlyLoads.start`."""
        self._early.start(self._waited, num_reserved=num_reserved, max_requests=max_requests)

    def loaded_early(self, event: PagesLoaded) -> None:
        self._early.loaded(event)

    def hand_over(self, request: ActiveRequest, lease: PageLease) -> None:
        """Note in the lease of a request that is admitted which pages were loaded early for it."""
        if request.prefetch is not None:
            self._early.hand_over(request.prefetch, lease)

    def give_up_early_loads(self) -> bool:
        """Unpin all pages that were loaded early; return whether there were any."""
        return self._early.give_up_all()

    def queued(self) -> list[ActiveRequest]:
        """Return the requests in the queue that have waited for the store, and were not admitted since."""
        return [request for request in self._waited.values() if request.state is RequestState.WAITING]

    @property
    def num_early_jobs(self) -> int:
        """The number of early loads under way."""
        return self._early.num_under_way

    # ---------------------------------------------------------------- the waits

    def settled(self) -> list[ActiveRequest]:
        """Return the requests whose prefetch has settled since the last call."""
        storage = self._cache.storage
        if storage is None:
            return []
        storage.start_queued()
        return [self._requests[prefetch] for prefetch in storage.take_settled() if prefetch in self._requests]

    def give_up(self, request: ActiveRequest) -> None:
        """Start no further fetches for the request, whose time limit has expired."""
        prefetch, storage = request.prefetch, self._cache.storage
        if prefetch is not None and storage is not None:
            self._context.count("prefetch_timeouts")
            storage.give_up(prefetch)

    def enter(self, request: ActiveRequest) -> None:
        prefetch = request.prefetch
        assert prefetch is not None, f"{request.request_id} has no prefetch to wait for"
        self._requests[prefetch] = self._waited[prefetch] = request
        self._early.make_due(prefetch)  # the host tier may have the pages before those that are fetched
        context = self._context
        context.timers.set(TimerKind.PREFETCH, request.request_id, self._deadline_s(request))

    def leave(self, request: ActiveRequest) -> None:
        prefetch, context = request.prefetch, self._context
        assert prefetch is not None
        del self._requests[prefetch]
        context.timers.cancel(TimerKind.PREFETCH, request.request_id)
        context.count("prefetch_wait_seconds", context.now_s - request.arrived_s)

    def _deadline_s(self, request: ActiveRequest) -> float:
        """Return the time until which the request may wait: the prefetch began when it arrived."""
        assert request.prefetch is not None
        return request.arrived_s + min(request.prefetch.wait_s, self._context.config.queue_timeout_s / 2)
