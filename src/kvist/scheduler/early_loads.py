"""Loads pages of requests into the device pool before these requests are admitted: while their other pages are being
fetched from the store, and while they wait for a place in a batch.

    due ──pages in the host tier──► LoadPages ──loaded──► in the tree, pinned ──the next fetch ends──► due …
                                        └───────────────────┴── admitted | ended | failed | pages are short: closed

The request matches these pages in the tree when it is admitted. If all have been loaded, the request is computed in the
next batch, not in the one after it. An early load takes nothing from other requests: it starts only in pages that are
free or evictable beyond what growing and waiting requests need. When another request needs pages, all early loads are
closed; pages that are being copied are evictable when the copy has ended. A closed load is not begun again: the host
tier still has the pages, and the request loads them when it is admitted.

A request has one job at a time. Pages that arrive meanwhile go into the next job together, so jobs are small when the
store is slow, and large when it is fast. A page that is being loaded for another request is not loaded twice: the load
waits, and then finds the page in the tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvist.kv.cache import PageCache
from kvist.kv.lease import PageLease
from kvist.kv.tiers.prefetch import Prefetch, PrefetchState
from kvist.plan.tiers import PagesLoaded
from kvist.scheduler.active import ActiveRequest


@dataclass(slots=True, eq=False, kw_only=True)
class _EarlyLoad:
    """The pages of one request. Mutable; its one owner is `EarlyLoads`."""

    prefetch: Prefetch
    lease: PageLease
    token_ids: list[int]
    job_id: int | None = None  # under way
    awaits_others: bool = False  # the next page is, or was, being loaded for another request
    is_closed: bool = False  # no further job


class EarlyLoads:
    """Mutable; its one owner is `Fetching`."""

    def __init__(self, cache: PageCache) -> None:
        self._cache = cache
        self._open: dict[Prefetch, _EarlyLoad] = {}
        self._by_job: dict[int, _EarlyLoad] = {}  # jobs under way, of open and closed loads
        self._due: dict[Prefetch, None] = {}  # the host tier may have more pages
        self._given_up: set[Prefetch] = set()  # closed before the request was admitted

    def may_start(self, *, has_place: bool) -> bool:
        """Return whether `start` may find a load to start. `has_place`: loads of further requests may start."""
        return bool(self._due) and (has_place or bool(self._open))

    @property
    def num_under_way(self) -> int:
        return len(self._by_job)

    def make_due(self, prefetch: Prefetch) -> None:
        """Look for pages in the host tier at the next `start`."""
        if prefetch not in self._given_up and prefetch.state is not PrefetchState.CLOSED:
            self._due[prefetch] = None

    def start(self, requests: Mapping[Prefetch, ActiveRequest], *, num_reserved: int, max_requests: int) -> None:
        """Start the loads that are due, of at most `max_requests` requests at a time, and leave `num_reserved` pages of
        the device pool free or evictable. Loads that must wait stay due."""
        is_full = len(self._open) >= max_requests
        for prefetch in [each for each in self._open if each in self._due] if is_full else [*self._due]:
            if not self._cache.has_room(num_reserved):
                return
            request, load = requests.get(prefetch), self._open.get(prefetch)
            if load is None and len(self._open) >= max_requests:
                return
            is_idle = load is None or load.job_id is None
            if request is None or (is_idle and self._load(prefetch, request, load, num_reserved)):
                del self._due[prefetch]

    def _load(self, prefetch: Prefetch, request: ActiveRequest, load: _EarlyLoad | None, num_reserved: int) -> bool:
        """Start to load what the host tier has; return False if the load must wait."""
        cache, digests = self._cache, prefetch.digests
        first = prefetch.num_cached if load is None else load.lease.pin.num_pages
        if cache.is_loading(digests, first):
            if load is not None:
                load.awaits_others = True
            return False
        if not cache.is_in_host(digests, first):
            return True
        if load is None or load.awaits_others:
            load = self._open_lease(prefetch, request, load)
            first = load.lease.pin.num_pages
            if cache.is_loading(digests, first):
                load.awaits_others = True
                return False
        load.job_id = cache.load_early(load.lease, digests, num_reserved=num_reserved)
        if load.job_id is None:
            return not cache.is_in_host(digests, first)
        self._by_job[load.job_id] = load
        return True

    def _open_lease(self, prefetch: Prefetch, request: ActiveRequest, before: _EarlyLoad | None) -> _EarlyLoad:
        """Open a lease, or open it again because the tree has more of its pages now."""
        salt, most = request.request.cache_salt, request.max_cached_tokens
        lease = self._cache.open(request.token_ids, cache_salt=salt, max_tokens=most)
        if before is not None:
            lease.num_fetched_tokens = before.lease.num_fetched_tokens
            lease.num_loaded_tokens = before.lease.num_loaded_tokens
            self._cache.close(before.lease)
        load = self._open[prefetch] = _EarlyLoad(prefetch=prefetch, lease=lease, token_ids=request.token_ids)
        return load

    def loaded(self, event: PagesLoaded) -> None:
        load = self._by_job.pop(event.job_id)
        load.job_id = None
        self._cache.loaded(event, load.token_ids)
        if load.is_closed:
            self._cache.close(load.lease)
        elif event.ok:
            self.make_due(load.prefetch)
        else:
            self._give_up(load.prefetch)

    def hand_over(self, prefetch: Prefetch, lease: PageLease) -> None:
        """Note in the lease of the admitted request which of its cached tokens were loaded early."""
        load = self._open.get(prefetch)
        if load is not None:
            lease.take_over_counts(load.lease)

    def close(self, prefetch: Prefetch) -> None:
        """Unpin the pages: the request was admitted, or has ended."""
        self._close(prefetch)
        self._given_up.discard(prefetch)

    def give_up_all(self) -> bool:
        """Unpin the pages of all requests, because another request needs pages; return whether there were any."""
        had_any = bool(self._open)
        for prefetch in [*self._open]:
            self._give_up(prefetch)
        return had_any

    def _give_up(self, prefetch: Prefetch) -> None:
        self._close(prefetch)
        self._given_up.add(prefetch)

    def _close(self, prefetch: Prefetch) -> None:
        self._due.pop(prefetch, None)
        load = self._open.pop(prefetch, None)
        if load is not None:
            load.is_closed = True
            if load.job_id is None:
                self._cache.close(load.lease)
