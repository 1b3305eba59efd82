"""Allocates pages to requests, and preempts requests when no page is left.

A request gets the pages of all its known tokens when it leaves the queue, then a further page whenever its last page is
full. When no page is left, another request is preempted, and computed again later; victims.py chooses it. A PREFILL
with a Grant and a DECODE before its Done are never preempted: they hold a bounded number of pages for a bounded time,
and a peer may access those pages. For a page, the most urgent running request is never preempted, so at least one
request always runs to its end. Before a batch is planned, the head of the queue may claim the places and the pages of
running requests.
Leased prefixes (leases.py) keep their pages, unless a request could not go on beside them.

Host tier: a request that leaves the queue with a part of its K/V in the host tier is LOADING, and in no batch, until
the copy has ended. If the copy fails, those tokens are computed. Other requests do not wait for a LOADING request,
except requests that would load the same pages (AWAITING_PAGES; shared_prefix.py has the waits for computed pages). A
LOADING request is never preempted, since the mover may access its pages. With `write_back`, pages may have to be copied
before they are evicted: while enough copies are pending, no request is preempted; requests that need pages skip the
batch.

A pending step still writes the pages of its requests: a victim in the pending step is only left out of the step being
planned, and is preempted when the step after that is planned.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from dataclasses import dataclass

from kvist.kv.cache import PageCache
from kvist.kv.lease import PageLease
from kvist.plan.tiers import PagesLoaded
from kvist.scheduler.active import ActiveRequest, RequestState
from kvist.scheduler.context import SchedulerContext
from kvist.scheduler.leases import Leases
from kvist.scheduler.pending import PendingSteps
from kvist.scheduler.shared_prefix import SharedPrefixes
from kvist.scheduler.states import Requests
from kvist.scheduler.victims import Victims
from kvist.scheduler.waiting import num_to_compute


class Allocation(enum.Enum):
    """The result of `Allocator.allocate` for the head of the queue."""

    READY = "ready"  # the request has its pages, and the first of them hold all its cached tokens
    LOADING = "loading"  # the request has its pages, and starts when its load has ended
    AWAITS_PAGES = "awaits pages"  # the request has left the queue: another request loads or computes its next pages
    NO_PAGES = "no pages"  # the request stays at the head of the queue


@dataclass(frozen=True, slots=True, kw_only=True)
class _FailedAllocation:
    """The head of the queue found too few pages."""

    ticket: int
    num_missing: int
    num_spare: int  # once its cached pages were evictable again


class Allocator:
    """Mutable; its one owner is the scheduler."""

    def __init__(
        self, context: SchedulerContext, requests: Requests, cache: PageCache, pending: PendingSteps, leases: Leases
    ) -> None:
        self._context = context
        self._requests = requests
        self._cache = cache
        self._pending = pending
        self._leases = leases
        self._loads: dict[int, ActiveRequest] = {}  # by job id; some requests have ended
        self._followers: dict[int, list[ActiveRequest]] = defaultdict(list)  # by job id: requests that wait for the job
        self._shared = SharedPrefixes(page_size=cache.page_size, usual_step_tokens=context.config.chunked_prefill_size)
        self._victims = Victims(requests)
        self._last_failed: _FailedAllocation | None = None
        self.deferred_victims: set[ActiveRequest] = set()  # victims whose pages the pending step still writes

    def begin_step(self) -> None:
        self._context.lacks_pages = False
        self.deferred_victims.clear()
        self._queue_released()

    def begin_computing(self, request: ActiveRequest) -> None:
        """Let other requests wait for the pages that this running request is about to compute."""
        self._shared.lead(request)

    def _queue_released(self) -> None:
        for request in self._shared.released():
            self._requests.move(request, RequestState.WAITING)

    # ---------------------------------------------------------------- running requests

    def grow(self, request: ActiveRequest, num_tokens: int) -> bool:
        """Grow the lease to `num_tokens`, preempting other requests if needed; return whether the request may run
        now."""
        lease = request.lease
        while not self._cache.grow(lease, num_tokens):
            if self._requests.fetching.give_up_early_loads():
                continue
            self._context.lacks_pages = True
            if self._cache.waits_for_copies(lease, num_tokens):
                return False
            victim = self._victims.ungranted() or self._victims.for_page_of(request)
            if victim is None and self._leases.give_up():
                continue
            if victim is None:
                return False  # the most urgent request waits for the pages of handoffs, which end in a bounded time
            if not self._preempt(victim) or victim is request:
                return False
        return True

    def covers_tokens(self, request: ActiveRequest) -> bool:
        """Return whether the request has the pages of its known tokens. Grows the lease if a row of several tokens did
        not fit."""
        num_tokens = len(request.token_ids)
        return len(request.page_ids) * self._cache.page_size >= num_tokens or self.grow(request, num_tokens)

    def may_run(self, request: ActiveRequest) -> bool:
        """Return whether a request that ran before may still run in the step being planned."""
        return request.state is RequestState.RUNNING and request not in self.deferred_victims

    # ---------------------------------------------------------------- the head of the queue

    def may_claim(self, request: ActiveRequest) -> bool:
        """Return whether the head of the queue lacks a place or pages, and may have those of running requests."""
        num_missing = self._num_missing(request)
        blocked = num_missing > 0 or not self._num_places
        return blocked and bool(self._victims.for_claimant(request, num_missing))

    def allocate(self, request: ActiveRequest, *, claims: bool = False) -> Allocation:
        """Give the request a lease over all its tokens. One page is kept in reserve for each growing request, so that
        few requests are preempted. With `claims`, running requests are preempted for its place and pages: only before a
        batch is planned, and only if it `may_claim` them."""
        cache, requests = self._cache, self._requests
        failed = self._last_failed
        unchanged = failed is not None and failed.ticket == request.ticket and failed.num_spare == self._num_spare
        if unchanged and not claims and (request.ungranted or self._victims.ungranted() is None):
            return Allocation.NO_PAGES  # matching a long prompt again in each step would cost more than it gains
        token_ids, max_cached = request.token_ids, request.max_cached_tokens
        lease = cache.open(token_ids, cache_salt=request.request.cache_salt, max_tokens=max_cached)
        load = cache.pending_load(lease, token_ids, max_tokens=max_cached)
        if load is not None:
            cache.close(lease)
            requests.move(request, RequestState.AWAITING_PAGES)
            self._followers[load].append(request)
            return Allocation.AWAITS_PAGES
        if not request.awaits_handoff and self._shared.try_follow(request, lease):
            cache.close(lease)
            requests.move(request, RequestState.AWAITING_PAGES)
            self._context.count("shared_prefix_waits")
            return Allocation.AWAITS_PAGES
        num_needed = -(-len(token_ids) // cache.page_size) - len(lease.page_ids)
        if claims and not self._claim(request, num_needed):
            return self._fail(request, lease, num_needed)
        while (too_few := self._num_spare < num_needed) or not cache.grow(lease, len(token_ids)):
            if requests.fetching.give_up_early_loads():
                continue
            # with enough reclaimable pages, pending copies free them: no victim is needed
            victim = self._victims.ungranted() if too_few and not request.ungranted else None
            if victim is None and self._leases.make_room(lease, num_needed):
                continue
            if victim is None or not self._preempt(victim):
                return self._fail(request, lease, num_needed)
        request.set_lease(lease)
        request.num_computed = request.num_planned = lease.num_cached_tokens
        requests.fetching.hand_over(request, lease)
        load = cache.start_load(lease, token_ids, max_tokens=max_cached)
        requests.fetching.close(request)
        if load is None:
            return Allocation.READY
        self._loads[load] = request
        request.loading = True
        requests.move(request, RequestState.LOADING)
        return Allocation.LOADING

    def _claim(self, request: ActiveRequest, num_needed: int) -> bool:
        """Preempt running requests for the place and the pages of a waiting one; return whether it has them now."""
        num_missing = num_needed - self._num_spare
        if num_missing > 0 or not self._num_places:
            for victim in self._victims.for_claimant(request, num_missing):
                if self._preempt(victim):
                    victim.lost_place = True
                    self._context.count("claims")
        return self._num_places > 0

    def _fail(self, request: ActiveRequest, lease: PageLease, num_needed: int) -> Allocation:
        num_missing = num_needed - self._num_spare
        self._cache.close(lease)
        failed = _FailedAllocation(ticket=request.ticket, num_missing=num_missing, num_spare=self._num_spare)
        self._last_failed = failed if num_missing > 0 else None
        return Allocation.NO_PAGES

    def _num_missing(self, request: ActiveRequest) -> int:
        """Return how many pages the request lacks since its last allocation failed; 0 if none has."""
        failed = self._last_failed
        if failed is None or failed.ticket != request.ticket:
            return 0
        return failed.num_missing + failed.num_spare - self._num_spare

    @property
    def _num_places(self) -> int:
        """The number of free places of running requests."""
        return self._context.config.max_running_requests - self._requests.num_counted_as_running

    @property
    def _num_spare(self) -> int:
        """The number of pages beyond the reserve that the head of the queue may have."""
        return self._cache.num_reclaimable - self._num_reserved

    @property
    def _num_reserved(self) -> int:
        """The number of pages kept in reserve: one for each growing request."""
        requests = self._requests
        return len(requests.granted) + len(requests.loading) + requests.running.num_growing

    def load_early(self) -> None:
        """Load pages of requests that wait for the store, or have waited for it and are not admitted yet, without
        taking the pages or places of other requests."""
        requests = self._requests
        num_places = self._num_places
        if not requests.fetching.may_load_early(has_place=num_places > 0):
            return
        queued = requests.fetching.queued()
        num_others = len(requests.waiting) - len(queued)
        num_tokens = requests.waiting.num_tokens - sum(num_to_compute(request) for request in queued)
        requests.fetching.load_early(
            num_reserved=self._num_reserved + num_tokens // self._cache.page_size + num_others,
            max_requests=num_places - num_others,
        )

    def finish_load(self, event: PagesLoaded) -> ActiveRequest | None:
        """End a load; return its request, which may have ended meanwhile; None for an early load. If the copy failed,
        the tokens of its pages are computed."""
        request = self._loads.pop(event.job_id, None)
        if request is None:
            self._requests.fetching.loaded_early(event)
        else:
            request.loading = False
            request.num_computed = request.num_planned = self._cache.loaded(event, request.token_ids)
        for follower in self._followers.pop(event.job_id, ()):
            if follower.state is RequestState.AWAITING_PAGES:
                self._requests.move(follower, RequestState.WAITING)
        return request

    # ---------------------------------------------------------------- victims

    def _preempt(self, victim: ActiveRequest) -> bool:
        """Free the victim's pages and return True. Return False if a pending step still writes the pages: the victim is
        then preempted when the next step is planned, if its pages are still needed."""
        if self._pending.writes(victim):
            self.deferred_victims.add(victim)
            return False
        assert not victim.has_accessed_pages
        self._context.count("preemptions")
        self._cache.close(victim.take_lease())  # its full pages stay cached in the tree until they are evicted
        victim.num_computed = victim.num_planned = 0
        self._requests.move(victim, RequestState.SUSPENDED if victim.ungranted else RequestState.WAITING)
        self._queue_released()  # nothing may run after this step, and then no step would release its followers
        return True
