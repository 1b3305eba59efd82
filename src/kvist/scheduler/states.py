"""Every request of one engine, in the container of its state.

Only `Requests.move` moves a request from one container to another. A count of requests is the length of a container, so
it cannot be wrong. A request leaves `live` when it ends, and leaves the container of ENDED when its pages are released.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from kvist.kv.cache import PageCache
from kvist.request import RequestId
from kvist.scheduler.active import TRANSITIONS, ActiveRequest, RequestState
from kvist.scheduler.compiling import Compiling
from kvist.scheduler.context import SchedulerContext
from kvist.scheduler.fetching import Fetching
from kvist.scheduler.running import Running
from kvist.scheduler.shares import Shares
from kvist.scheduler.slots import RequestSlots
from kvist.scheduler.stage_times import note_state
from kvist.scheduler.unadmitted import Unadmitted
from kvist.scheduler.waiting import WaitingQueue

_STARTED = (RequestState.RUNNING, RequestState.GRANTED)
_WITH_PLACE = (RequestState.RUNNING, RequestState.GRANTED, RequestState.LOADING)


class Container(Protocol):
    """The requests in one state. Only `Requests` calls `enter` and `leave`; `request.state` is the new state in
    both."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[ActiveRequest]: ...

    def enter(self, request: ActiveRequest) -> None: ...

    def leave(self, request: ActiveRequest) -> None: ...


class InOrder:
    """Requests in the order in which they entered their state. Mutable; its one owner is `Requests`."""

    def __init__(self) -> None:
        self._requests: dict[ActiveRequest, None] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[ActiveRequest]:
        return iter(self._requests)

    def __contains__(self, request: ActiveRequest) -> bool:
        return request in self._requests

    def enter(self, request: ActiveRequest) -> None:
        self._requests[request] = None

    def leave(self, request: ActiveRequest) -> None:
        del self._requests[request]


class Requests:
    """The requests of one engine by state. Mutable; its one owner is the scheduler, and its parts move requests."""

    def __init__(self, context: SchedulerContext, cache: PageCache) -> None:
        self._context = context
        self.live: dict[RequestId, ActiveRequest] = {}  # all requests that have not ended, oldest first
        self.unadmitted = Unadmitted()  # live requests that were never admitted
        self.compiling = Compiling(context)
        self.fetching = Fetching(context, cache)
        self.shares = Shares()
        self.waiting = WaitingQueue(self.shares)
        self.awaiting_pages = InOrder()
        self.suspended = InOrder()
        self.granted = InOrder()
        self.loading = InOrder()
        self.slots = RequestSlots(context.config.max_running_requests)
        self.running = Running(self.slots)
        self.awaiting_transfer = InOrder()
        self.ended = InOrder()  # with pages that a step, a load or a peer still uses
        self.by_state: Mapping[RequestState, Container] = {
            RequestState.COMPILING: self.compiling,
            RequestState.FETCHING: self.fetching,
            RequestState.WAITING: self.waiting,
            RequestState.AWAITING_PAGES: self.awaiting_pages,
            RequestState.SUSPENDED: self.suspended,
            RequestState.GRANTED: self.granted,
            RequestState.LOADING: self.loading,
            RequestState.RUNNING: self.running,
            RequestState.AWAITING_TRANSFER: self.awaiting_transfer,
            RequestState.ENDED: self.ended,
        }

    @property
    def num_waiting(self) -> int:
        """The number of live requests without pages."""
        before = len(self.compiling) + len(self.fetching)
        return before + len(self.waiting) + len(self.awaiting_pages) + len(self.suspended)

    @property
    def num_counted_as_running(self) -> int:
        """The number of requests that count against `max_running_requests`: those that run, and those that have pages
        and will run next."""
        return len(self.running) + len(self.granted) + len(self.loading)

    def arrive(self, request: ActiveRequest, state: RequestState) -> None:
        """Put a new request into its first container."""
        assert state in (RequestState.WAITING, RequestState.FETCHING, RequestState.COMPILING)
        self.live[request.request_id] = request
        self.unadmitted.add(request)
        request.state = state
        note_state(request, None, self._context.now_s)
        self.by_state[state].enter(request)

    def move(self, request: ActiveRequest, to: RequestState) -> None:
        """Move the request to the container of another state."""
        before = request.state
        assert to in TRANSITIONS[before], f"{request.request_id}: no transition from {before.name} to {to.name}"
        request.state = to
        note_state(request, before, self._context.now_s)
        self.by_state[before].leave(request)
        if before in _WITH_PLACE:
            self.shares.give_back(request.caller[0])
        if to in _WITH_PLACE:
            self.shares.take(request.caller[0])
        if to is RequestState.ENDED:
            del self.live[request.request_id]
        if not request.was_admitted:
            if to in _STARTED:
                request.admitted_s = self._context.now_s
            if to in _STARTED or to is RequestState.ENDED:
                self.unadmitted.remove(request)
        self.by_state[to].enter(request)

    def forget(self, request: ActiveRequest) -> None:
        """Drop an ended request whose pages are released."""
        assert not request.has_pages
        self.ended.leave(request)
