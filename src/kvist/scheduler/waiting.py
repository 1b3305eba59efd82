"""The queue of requests without pages, with two priorities. In each priority, callers take turns (fairness.py).

The low priority is for ungranted PREFILLs (their Grant has not arrived), which are served only when the high priority
is empty. A preempted request was admitted before and needs no second turn: it returns to the head of its priority, in
front of younger ones.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from kvist.fairness import FairQueue
from kvist.scheduler.active import ActiveRequest, RequestState

_number = attrgetter("number")
_ADMITTED = frozenset({RequestState.LOADING, RequestState.RUNNING, RequestState.GRANTED})


class _Priority:
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
        self._priorities = (_Priority(), _Priority())
        self._priority_of: dict[ActiveRequest, _Priority] = {}
        self._num_pushes = 0
        self.num_tokens = 0  # to be computed here for the waiting requests

    def __len__(self) -> int:
        return len(self._priority_of)

    def __iter__(self) -> Iterator[ActiveRequest]:
        return iter(self._priority_of)

    def enter(self, request: ActiveRequest) -> None:
        self._push(request)
        self.num_tokens += _num_to_compute(request)

    def leave(self, request: ActiveRequest) -> None:
        """Remove the request. If it was admitted, its caller has had its turn; `request.state` is the new state."""
        self._priority_of.pop(request).remove(request, takes_turn=request.state in _ADMITTED)
        self.num_tokens -= _num_to_compute(request)

    def requeue(self, request: ActiveRequest) -> None:
        """Queue the request with its present priority: its Grant has arrived."""
        self._priority_of.pop(request).remove(request, takes_turn=False)
        self._push(request)

    def head(self) -> ActiveRequest | None:
        for priority in self._priorities:
            if (request := priority.head()) is not None:
                return request
        return None

    def _push(self, request: ActiveRequest) -> None:
        self._num_pushes += 1
        request.ticket = self._num_pushes
        priority = self._priority_of[request] = self._priorities[request.ungranted]
        priority.add(request)


def _num_to_compute(request: ActiveRequest) -> int:
    """Return the number of tokens that this engine will compute: none if prefill computes the prompt."""
    return 0 if request.awaits_handoff else len(request.token_ids)
