"""Lets a request wait for pages that a running request is computing, instead of computing them a second time.

When many requests with one long prefix arrive at once, the first one computes the prefix. The others wait without pages
(AWAITING_PAGES) until those pages are in the tree, and then match them. A request waits only if this saves enough
tokens: a wait costs up to one step. Of requests that say that they share tokens (`EngineRequest.num_shared_tokens`),
all but the first wait where this saves one page.

Every wait ends: the leader (the request that computes) has pages, never waits for its followers, and is computed in
steps until it has computed the shared pages, is preempted or ends. A request that may take part in the next step never
waits for an ungranted PREFILL, which only computes when nothing else wants to.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvist.kv.lease import PageLease
from kvist.scheduler.active import ActiveRequest, RequestState

_SMALLEST_FRACTION = 8  # a wait must save 1/8 of a usual step
_TOKENS_PER_COMPARISON = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wait:
    follower: ActiveRequest
    num_tokens: int  # of the leader: when their K/V is in the tree, the wait is over


class SharedPrefixes:
    """Mutable; its one owner is the allocator, which moves the requests."""

    def __init__(self, *, page_size: int, usual_step_tokens: int) -> None:
        self._page_size = page_size
        self._least_tokens = max(page_size, usual_step_tokens // _SMALLEST_FRACTION)
        self._leaders: list[ActiveRequest] = []  # running requests with uncomputed pages that others may wait for
        self._waits: dict[ActiveRequest, list[_Wait]] = {}  # by leader

    def lead(self, request: ActiveRequest) -> None:
        """Record that the request is about to be computed."""
        if self._has_shareable(request):
            self._leaders.append(request)

    def try_follow(self, request: ActiveRequest, lease: PageLease) -> bool:
        """Return whether the request, which found the pages of `lease` in the tree, should wait for a leader. The
        request is then in `released` later, once."""
        for leader in self._leaders:
            if leader.state is not RequestState.RUNNING or (leader.ungranted and not request.ungranted):
                continue
            if leader.lease.pin.node.digest != lease.pin.node.digest:
                continue
            num_found = lease.pin.num_pages * self._page_size
            num_shared = self._num_shared(leader, request, num_found)
            if num_shared - num_found >= self._least_saving(request):
                self._waits.setdefault(leader, []).append(_Wait(follower=request, num_tokens=num_shared))
                return True
        return False

    def released(self) -> list[ActiveRequest]:
        """Return the requests whose wait is over, in the order in which they began to wait."""
        if not self._leaders:
            return []
        over: list[ActiveRequest] = []
        for leader, waits in list(self._waits.items()):
            left = [wait for wait in waits if not _is_over(leader, wait)]
            if len(left) < len(waits):
                over += [wait.follower for wait in waits if _is_over(leader, wait)]
                self._waits[leader] = left
            if not left:
                del self._waits[leader]
        self._leaders = [each for each in self._leaders if each in self._waits or self._has_shareable(each)]
        return [follower for follower in over if follower.state is RequestState.AWAITING_PAGES]

    def _has_shareable(self, request: ActiveRequest) -> bool:
        num_left = len(request.token_ids) - request.num_computed
        return request.state is RequestState.RUNNING and num_left >= self._least_saving(request)

    def _least_saving(self, request: ActiveRequest) -> int:
        return self._page_size if request.request.num_shared_tokens else self._least_tokens

    def _num_shared(self, leader: ActiveRequest, request: ActiveRequest, start: int) -> int:
        """Return the end of the whole pages that are equal in both requests; `start`: the end of known ones."""
        ours, theirs = request.token_ids, leader.token_ids
        end = min(len(ours), len(theirs), request.max_cached_tokens)
        while start < end:
            stop = min(start + _TOKENS_PER_COMPARISON, end)
            if ours[start:stop] != theirs[start:stop]:
                start = next(at for at in range(start, stop) if ours[at] != theirs[at])
                break
            start = stop
        return start // self._page_size * self._page_size


def _is_over(leader: ActiveRequest, wait: _Wait) -> bool:
    return (
        leader.state is not RequestState.RUNNING
        or leader.num_computed >= wait.num_tokens
        or wait.follower.state is not RequestState.AWAITING_PAGES
        or (leader.ungranted and not wait.follower.ungranted)
    )
