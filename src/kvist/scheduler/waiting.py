"""The queue of requests without pages: callers take turns within a rank (fairness.py), each caller's own in order.

Rank 0 may claim pages: everything but an eager PREFILL (one whose Grant has not come), which is rank 1 and is looked
at only when rank 0 is empty. A request that had its turn already, and gave its pages up, takes no new turn: it returns
to the head of its rank, the oldest first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from kvist.fairness import FairQueue
from kvist.scheduler.active import ActiveRequest, RequestState

_number = attrgetter("number")


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
    def __init__(self) -> None:
        self._ranks = (_Rank(), _Rank())
        self._rank_of: dict[ActiveRequest, _Rank] = {}
        self._tickets = 0
        self.num_tokens = 0  # of all that wait to be computed here

    def __len__(self) -> int:
        return len(self._rank_of)

    def __iter__(self) -> Iterator[ActiveRequest]:
        return iter(self._rank_of)

    def push(self, request: ActiveRequest) -> None:
        """Also moves a request that waits already to the rank it has now."""
        former = self._rank_of.get(request)
        if former is not None:
            former.remove(request, takes_turn=False)
        else:
            self.num_tokens += _num_to_compute(request)
        self._tickets += 1
        request.ticket = self._tickets
        rank = self._rank_of[request] = self._ranks[request.ungranted]
        rank.add(request)

    def head(self) -> ActiveRequest | None:
        for rank in self._ranks:
            if (request := rank.head()) is not None:
                assert request.state is RequestState.WAITING
                return request
        return None

    def take(self, request: ActiveRequest) -> None:
        """It has its turn."""
        self._remove(request, takes_turn=True)

    def remove(self, request: ActiveRequest) -> None:
        """It leaves without a turn."""
        self._remove(request, takes_turn=False)

    def _remove(self, request: ActiveRequest, *, takes_turn: bool) -> None:
        self._rank_of.pop(request).remove(request, takes_turn=takes_turn)
        self.num_tokens -= _num_to_compute(request)


def _num_to_compute(request: ActiveRequest) -> int:
    """The pages of a request that waits for granted ones are computed by another engine."""
    return 0 if request.awaits_grant_of_pages else len(request.token_ids)
