"""Checks the order in which a scheduler admits and preempts requests: by priority, then by age.

`before` is called before each step of a simulated engine, `after` behind it."""

from __future__ import annotations

from kvist.request import Mode
from kvist.scheduler.active import ActiveRequest, RequestState
from kvist.scheduler.states import Requests

_WITH_PAGES = (RequestState.RUNNING, RequestState.GRANTED, RequestState.LOADING)


class OrderCheck:
    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._waiting: list[ActiveRequest] = []
        self._running: list[ActiveRequest] = []
        self._kept: set[ActiveRequest] = set()  # no other request may claim their places
        self.num_preempted = 0  # requests that lost their pages while they grew

    def before(self) -> None:
        self._waiting = list(self._requests.waiting)
        self._running = [each for each in self._requests.running if each.mode is not Mode.PREFILL]
        self._kept = {each for each in self._running if len(each.token_ids) < each.kept_until}

    def after(self) -> None:
        self._check_admissions()
        self._check_victims()

    def _check_admissions(self) -> None:
        """No request is admitted before one of its class that waited already and has a lower priority value."""
        for admitted in self._waiting:
            if admitted.state not in _WITH_PAGES:
                continue
            for other in self._waiting:
                waits = other.state is RequestState.WAITING and other.ungranted is admitted.ungranted
                assert not waits or other.priority >= admitted.priority, (
                    f"{admitted.request_id} ({admitted.priority}) was admitted before "
                    f"{other.request_id} ({other.priority})"
                )

    def _check_victims(self) -> None:
        """A preempted request is less urgent than every request of its key that ran and goes on, and of no lower
        priority value than those of other keys; except those that keep their places."""
        victims = [each for each in self._running if each.state is RequestState.WAITING]
        self.num_preempted += len(victims)
        staying = [each for each in self._running if each.state is RequestState.RUNNING]
        for victim in victims:
            for other in staying:
                assert (
                    other in self._kept
                    or other.urgency < victim.urgency
                    or (other.priority == victim.priority and other.caller[0] != victim.caller[0])
                ), f"{victim.request_id} was preempted before {other.request_id}"
