"""The queue of requests without pages: two classes, in each class the priorities, in each priority turns of callers.

The second class is for ungranted PREFILLs (their Grant has not arrived), which are served only when the first class is
empty. In a class, requests with a lower `priority` value are served first; with the scheduling policy "fcfs" all have
the same. Among requests of equal priority, callers take turns (fairness.py). A preempted request was admitted before
and needs no second turn: it returns to the head of its priority, in front of younger ones. Both rules yield to shares:
the request of a key comes first that, with one more place, has no more places for its weight than the key that would be
first (shares.py).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from kvist.fairness import FairQueue
from kvist.scheduler.active import ActiveRequest, RequestState
from kvist.scheduler.shares import Shares

_number = attrgetter("number")
_ADMITTED = frozenset({RequestState.LOADING, RequestState.RUNNING, RequestState.GRANTED})


class _Line:
    """The waiting requests of one class and priority."""

    def __init__(self) -> None:
        self._returned: list[ActiveRequest] = []  # oldest first
        self._turns: FairQueue[ActiveRequest] = FairQueue(_number)

    def add(self, request: ActiveRequest) -> None:
        if request.was_admitted:
            insort(self._returned, request, key=_number)
        else:
            self._turns.add(request.caller, request)

    def head(self, shares: Shares) -> ActiveRequest | None:
        first = self._returned[0] if self._returned else self._turns.head()
        if first is None:
            return None
        keys = (*(each.caller[0] for each in self._returned), *self._turns.keys)
        key = min(keys, key=lambda each: shares.with_more(each, 1))  # of equal ones the first
        if shares.with_more(key, 1) > shares.with_more(first.caller[0], 0):
            return first
        returned = (each for each in self._returned if each.caller[0] == key)
        return next(returned, None) or self._turns.head(key)

    def __bool__(self) -> bool:
        return bool(self._returned) or bool(self._turns.keys)

    def remove(self, request: ActiveRequest, *, takes_turn: bool) -> None:
        if request.was_admitted:
            del self._returned[bisect_left(self._returned, request.number, key=_number)]
        elif takes_turn:
            self._turns.take(request.caller, request)
        else:
            self._turns.remove(request.caller, request)


class _Class:
    """Lines by priority. A line stays while it has requests: clients may choose any number as a priority."""

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}
        self._priorities: list[int] = []  # of all lines, ascending

    def add(self, request: ActiveRequest) -> None:
        line = self._lines.get(request.priority)
        if line is None:
            line = self._lines[request.priority] = _Line()
            insort(self._priorities, request.priority)
        line.add(request)

    def head(self, shares: Shares) -> ActiveRequest | None:
        return self._lines[self._priorities[0]].head(shares) if self._priorities else None

    def remove(self, request: ActiveRequest, *, takes_turn: bool) -> None:
        line = self._lines[request.priority]
        line.remove(request, takes_turn=takes_turn)
        if not line:
            del self._lines[request.priority]
            del self._priorities[bisect_left(self._priorities, request.priority)]


class WaitingQueue:
    """The requests in state WAITING. Mutable; its one owner is `Requests`."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._classes = (_Class(), _Class())
        self._class_of: dict[ActiveRequest, _Class] = {}
        self._num_pushes = 0
        self.num_tokens = 0  # to be computed here for the waiting requests

    def __len__(self) -> int:
        return len(self._class_of)

    def __iter__(self) -> Iterator[ActiveRequest]:
        return iter(self._class_of)

    def enter(self, request: ActiveRequest) -> None:
        self._push(request)
        self.num_tokens += num_to_compute(request)

    def leave(self, request: ActiveRequest) -> None:
        """Remove the request. If it was admitted, its caller has had its turn; `request.state` is the new state."""
        self._class_of.pop(request).remove(request, takes_turn=request.state in _ADMITTED)
        self.num_tokens -= num_to_compute(request)

    def requeue(self, request: ActiveRequest) -> None:
        """Queue the request in its present class: its Grant has arrived."""
        self._class_of.pop(request).remove(request, takes_turn=False)
        self._push(request)

    def head(self) -> ActiveRequest | None:
        granted, ungranted = self._classes
        return granted.head(self._shares) or ungranted.head(self._shares)

    def _push(self, request: ActiveRequest) -> None:
        self._num_pushes += 1
        request.ticket = self._num_pushes
        chosen = self._class_of[request] = self._classes[request.ungranted]
        chosen.add(request)


def num_to_compute(request: ActiveRequest) -> int:
    """Return the number of tokens that this engine will compute: none if prefill computes the prompt."""
    return 0 if request.awaits_handoff else len(request.token_ids)
