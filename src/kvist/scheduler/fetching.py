"""The requests that wait for pages from the store, before they enter the queue.

A request waits until its prefetch has settled (nothing is left to wait for), but not longer than the prefetch policy
allows, and never longer than half of `queue_timeout_s`. A store that hangs costs time, but does not fail the request. A
request also waits when the engine is idle: if it were admitted at once, there would be no time to fetch.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvist.kv.cache import PageCache
from kvist.kv.tiers.prefetch import Prefetch
from kvist.scheduler.active import ActiveRequest
from kvist.scheduler.context import SchedulerContext
from kvist.scheduler.timers import TimerKind


class Fetching:
    """The requests in state FETCHING; also opens and closes the prefetch of each request. Mutable; its one owner is
    `Requests`."""

    def __init__(self, context: SchedulerContext, cache: PageCache) -> None:
        self._context = context
        self._cache = cache
        self._requests: dict[Prefetch, ActiveRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[ActiveRequest]:
        return iter(self._requests.values())

    def open(self, request: ActiveRequest) -> bool:
        """Start the prefetch of pages missing in the device pool and the host tier; return whether the request
        waits."""
        prefetch = request.prefetch = self._cache.prefetch(
            request.token_ids,
            cache_salt=request.request.cache_salt,
            max_tokens=request.max_cached_tokens,
            for_handoff=request.from_store,
        )
        if prefetch is None:
            return False
        self._context.count("prefetches")
        return self._wait_s(prefetch) > 0

    def close(self, request: ActiveRequest) -> None:
        """Close the prefetch, if any, of a request that was admitted or has ended."""
        prefetch, storage = request.prefetch, self._cache.storage
        if prefetch is not None and storage is not None:
            storage.close(prefetch)
            request.prefetch = None

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
        self._requests[prefetch] = request
        context = self._context
        context.timers.set(TimerKind.PREFETCH, request.request_id, context.now_s + self._wait_s(prefetch))

    def leave(self, request: ActiveRequest) -> None:
        prefetch, context = request.prefetch, self._context
        assert prefetch is not None
        del self._requests[prefetch]
        context.timers.cancel(TimerKind.PREFETCH, request.request_id)
        context.count("prefetch_wait_seconds", context.now_s - request.arrived_s)

    def _wait_s(self, prefetch: Prefetch) -> float:
        return min(prefetch.wait_s, self._context.config.queue_timeout_s / 2)
