"""Receives new requests: queues or refuses them, or lets them wait for a grammar (COMPILING), for pages (FETCHING).

entry.py has the rules for refusing and displacing requests. batching.py and allocation.py take requests from the queue.
"""

from __future__ import annotations

from kvist.errors import InvalidConstraint
from kvist.kv.cache import PageCache
from kvist.plan.grammars import GrammarCompiled
from kvist.request import Outcome, RequestId
from kvist.scheduler.active import ActiveRequest, RequestState
from kvist.scheduler.context import SchedulerContext
from kvist.scheduler.endings import Endings
from kvist.scheduler.entry import Refusal, find_refusal, make_request, newest_waiting
from kvist.scheduler.handoff.sides import Handoffs
from kvist.scheduler.leases import Leases
from kvist.scheduler.queue_wait import wait_before_s
from kvist.scheduler.states import Requests
from kvist.scheduler.timers import TimerKind
from kvist.wire import Abort, Submit


class Admission:
    """Mutable; its one owner is the scheduler."""

    def __init__(
        self,
        context: SchedulerContext,
        requests: Requests,
        cache: PageCache,
        endings: Endings,
        handoffs: Handoffs,
        leases: Leases,
    ) -> None:
        self._context = context
        self._requests = requests
        self._cache = cache
        self._endings = endings
        self._handoffs = handoffs
        self._leases = leases
        self._num_arrived = 0

    def on_submit(self, event: Submit) -> None:
        """Queue the request, or refuse it with `Ended`. A second Submit of a live request is ignored: the one `Ended`
        of the request answers both."""
        context = self._context
        if event.request.request_id in self._requests.live:
            return
        refusal = find_refusal(
            event,
            self._cache,
            context_len=context.context_len,
            role=context.role,
            modes=context.modes,
            eos_token_ids=context.config.eos_token_ids,
        )
        request = refusal or self._leases.find_refusal(event) or self._make_request(event)
        if not isinstance(request, ActiveRequest):
            self._refuse(event, *request)
            return
        wait_s, limit_s = wait_before_s(context, self._requests, request), self._max_wait_s
        if wait_s is not None and wait_s > limit_s and not event.request.output_token_ids:  # a begun stream may wait
            problem = f"requests that would take about {wait_s:.1f} s are queued before this one at this worker"
            limit = f"the limit is {limit_s:g} s (--max-queue-wait-s)"
            self._refuse(event, "overloaded", f"{problem}, and {limit}: retry later", wait_s=wait_s)
            return
        no_room = self._make_queue_room(request)
        if no_room is not None:
            self._refuse(event, "overloaded", no_room)
            return
        self._num_arrived += 1
        context.timers.set(TimerKind.QUEUE, request.request_id, context.now_s + context.config.queue_timeout_s)
        self._requests.fetching.open(request)
        has_constraint = request.sampling.constraint is not None
        self._requests.arrive(request, RequestState.COMPILING if has_constraint else self._state_for_pages(request))
        self._handoffs.on_arrived(request)

    def _make_request(self, event: Submit) -> ActiveRequest | Refusal:
        context = self._context
        return make_request(event, context.config, number=self._num_arrived + 1, now_s=context.now_s)

    def _state_for_pages(self, request: ActiveRequest) -> RequestState:
        return RequestState.FETCHING if self._requests.fetching.is_awaited(request) else RequestState.WAITING

    def on_grammar_compiled(self, event: GrammarCompiled) -> None:
        """Queue the request, or fail it. A report is ignored if the request has ended, or has waited long enough."""
        request = self._requests.compiling.get(event.request_id)
        if request is None:
            return
        if event.error_code is not None:
            self._handoffs.end(request, Outcome.FAILED, event.error_code, event.message)
        else:
            self._requests.move(request, self._state_for_pages(request))

    def on_grammar_timeout(self, request_id: str) -> None:
        request = self._requests.live[RequestId(request_id)]
        error = InvalidConstraint.too_slow(self._context.config.grammar_compile_timeout_s)
        self._handoffs.end(request, Outcome.FAILED, error.code, error.message)

    def on_abort(self, event: Abort) -> None:
        request = self._requests.live.get(event.request_id)
        if request is not None:
            self._handoffs.end(request, Outcome.ABORTED)

    def on_queue_timeout(self, request_id: str) -> None:
        request = self._requests.live[RequestId(request_id)]
        limit = f"{self._context.config.queue_timeout_s:g} s (--queue-timeout-s)"
        self._handoffs.end(request, Outcome.FAILED, "timeout", f"the request was not started within {limit}")

    def queue_fetched(self) -> None:
        """Move the requests whose prefetch has settled to the queue."""
        for request in self._requests.fetching.settled():
            self._requests.move(request, RequestState.WAITING)

    def on_prefetch_timeout(self, request_id: str) -> None:
        request = self._requests.live[RequestId(request_id)]
        self._requests.fetching.give_up(request)
        self._requests.move(request, RequestState.WAITING)

    @property
    def _max_wait_s(self) -> float:
        config = self._context.config
        return config.queue_timeout_s if config.max_queue_wait_s is None else config.max_queue_wait_s

    def _refuse(self, event: Submit, code: str, message: str, *, wait_s: float | None = None) -> None:
        self._endings.refuse(event.request.request_id, code, message, wait_s=wait_s)
        self._handoffs.on_refused(event, code, message)

    def _make_queue_room(self, request: ActiveRequest) -> str | None:
        """Make room in the queue, perhaps by displacing another request; return the error message if this fails.

        The queue may exceed its limit by the number of requests that could be running: the next steps admit them."""
        requests, config = self._requests, self._context.config
        num_admitted_next = config.max_running_requests - requests.num_counted_as_running
        if requests.num_waiting < config.max_queued_requests + num_admitted_next:
            return None
        loser = requests.unadmitted.displaced_by(request)
        other = None if loser is None else newest_waiting(*loser, reversed(requests.live.values()))
        if other is None:
            most = config.max_queued_requests
            return f"the queue of this worker is full: {requests.num_waiting} requests wait, and the limit is {most}"
        message = (
            "removed from the full queue for a request of a lower `priority`: retry later"
            if other.priority > request.priority
            else "removed from the full queue for a caller with fewer requests: retry later, or send fewer at once"
        )
        self._context.count("requests_displaced")
        self._handoffs.end(other, Outcome.FAILED, "overloaded", message)
        return None
