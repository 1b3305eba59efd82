"""The running requests: each has its pages and a slot at the runner, and is computed in steps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from operator import attrgetter

from kvist.request import Mode
from kvist.scheduler.active import ActiveRequest
from kvist.scheduler.slots import RequestSlots

_urgency = attrgetter("urgency")


class Running:
    """The requests in state RUNNING, by priority, then oldest first. Mutable; its one owner is `Requests`."""

    def __init__(self, slots: RequestSlots) -> None:
        self._slots = slots
        self._requests: list[ActiveRequest] = []
        self.num_prefills = 0  # requests of mode PREFILL

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[ActiveRequest]:
        return iter(self._requests)

    def __reversed__(self) -> Iterator[ActiveRequest]:
        return reversed(self._requests)

    @property
    def least_urgent(self) -> ActiveRequest:
        """The last one, of at least one."""
        return self._requests[-1]

    @property
    def num_growing(self) -> int:
        """The number of requests that will need further pages for output tokens: all but those of mode PREFILL."""
        return len(self._requests) - self.num_prefills

    def enter(self, request: ActiveRequest) -> None:
        self._requests.insert(self._place(request), request)
        self.num_prefills += request.mode is Mode.PREFILL
        self._slots.take(request)

    def leave(self, request: ActiveRequest) -> None:
        place = self._place(request)
        assert self._requests[place] is request
        del self._requests[place]
        self.num_prefills -= request.mode is Mode.PREFILL
        self._slots.give_back(request)

    def _place(self, request: ActiveRequest) -> int:
        requests = self._requests
        if not requests or requests[-1].urgency < request.urgency:
            return len(requests)
        return bisect_left(requests, request.urgency, key=_urgency)
