"""The queue of requests without pages: callers take turns in each rank (fairness.py), each caller's requests in order.

Requests of rank 0 may claim pages. Rank 1 holds ungranted PREFILLs (their Grant has not arrived) served only when
rank 0 is empty. A preempted request, admitted once before, takes no new turn: it returns to the head of its rank, the
oldest first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from kvist.fairness import FairQueue
from kvist.scheduler.active import ActiveRequest, RequestState

_number = attrgetter("number")
_ADMITTED = frozenset({RequestState.LOADING, RequestState.RUNNING, RequestState.GRANTED})


class _Rank:
    def __init__(self) -> None:
        self._returned: list[ActiveRequest] = []  # oldest first
        self._turns: FairQueue[ActiveRequest] = FairQueue(_number)

    def __iter__(self) -> Iterator[ActiveRequest]:
        yield from self._returned
        yield from self._turns

    def add(self, request: ActiveRequest) -> None:
        if request.was_admitted:
            insort(self._returned, request, key=_number)
        else:
            self._turns.add(request.caller, request)

    def head(self) -> ActiveRequest | None:
        return self._returned[0] if self._returned else self._turns.head()

    def remove(self, request: ActiveRequest, *, takes_turn: bool) -> None:
        if request.was_admitted:
            del self._returned[bisect_left(self._returned, request.number, key=_number)]
        elif takes_turn:
            self._turns.take(request.caller, request)
        else:
            self._turns.remove(request.caller, request)


class WaitingQueue:
    """The requests in state WAITING. Mutable; its one owner is `Requests`."""

    def __init__(self) -> None:
        self._ranks = (_Rank(), _Rank())
        self._rank_of: dict[ActiveRequest, _Rank] = {}
        self._tickets = 0
        self.num_tokens = 0  # of all waiting requests that are computed here

    def __len__(self) -> int:
        return len(self._rank_of)

    def __iter__(self) -> Iterator[ActiveRequest]:
        return iter(self._rank_of)

    def enter(self, request: ActiveRequest) -> None:
        self._push(request)
        self.num_tokens += _num_to_compute(request)

    def leave(self, request: ActiveRequest) -> None:
        """Remove the request, whose state is the next one already: its caller's turn has passed if it is admitted."""
        self._rank_of.pop(request).remove(request, takes_turn=request.state in _ADMITTED)
        self.num_tokens -= _num_to_compute(request)

    def rerank(self, request: ActiveRequest) -> None:
        """Queue the request in its present rank: its Grant has arrived."""
        self._rank_of.pop(request).remove(request, takes_turn=False)
        self._push(request)

    def head(self) -> ActiveRequest | None:
        for rank in self._ranks:
            if (request := rank.head()) is not None:
                return request
        return None

    def _push(self, request: ActiveRequest) -> None:
        self._tickets += 1
        request.ticket = self._tickets
        rank = self._rank_of[request] = self._ranks[request.ungranted]
        rank.add(request)


def _num_to_compute(request: ActiveRequest) -> int:
    """Count the tokens that this engine computes: none for a DECODE before its handoff, which prefill computes."""
    return 0 if request.awaits_grant_of_pages else len(request.token_ids)
