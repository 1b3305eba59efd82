"""Ends requests: sends `Ended` once for each request, and releases its pages when they are not used any more.

The lease of an ended request is closed when no pending step writes its pages, no load fills them and no handoff holds
them. With overlap a step may be pending for a request that has ended: an end by a stop token is noticed only after the
next step was planned.
"""

from __future__ import annotations

from kvist.flight.handoff_report import StoredPages
from kvist.flight.stages import StageTime
from kvist.kv.cache import PageCache
from kvist.request import Outcome, RequestId
from kvist.scheduler.active import ActiveRequest, RequestState
from kvist.scheduler.context import SchedulerContext
from kvist.scheduler.pending import PendingSteps
from kvist.scheduler.queue_wait import whole_wait_s
from kvist.scheduler.states import Requests
from kvist.scheduler.timers import TimerKind
from kvist.service_time import bounded_retry_after_s
from kvist.wire import Ended

_COUNTERS = {
    Outcome.FINISHED: "requests_finished",
    Outcome.FAILED: "requests_failed",
    Outcome.ABORTED: "requests_aborted",
}


class Endings:
    """Used by all parts of one scheduler. Outside handoff/, a request is ended by `Handoffs.end`, which also stops the
    handoff of the request."""

    def __init__(self, context: SchedulerContext, requests: Requests, cache: PageCache, pending: PendingSteps) -> None:
        self._context = context
        self._requests = requests
        self._cache = cache
        self._pending = pending

    def end(
        self,
        request: ActiveRequest,
        outcome: Outcome,
        code: str | None = None,
        message: str = "",
        *,
        stored: StoredPages | None = None,
    ) -> None:
        """End the request. Called once; the pages are released when no step, load or handoff uses them any more."""
        context = self._context
        self._requests.move(request, RequestState.ENDED)
        self._requests.fetching.close(request)
        context.timers.cancel(TimerKind.QUEUE, request.request_id)
        if request.admitted_s is not None:
            context.service_time.add(context.now_s - request.admitted_s)
        stages = request.stages.take(context.now_s) if outcome is Outcome.FAILED else ()
        self._send(request.request_id, outcome, code, message, stored, stages=stages)
        self.release(request)

    def refuse(self, request_id: RequestId, code: str, message: str, *, wait_s: float | None = None) -> None:
        """End a request that was never queued. `wait_s` is its wait in the queue, if that is why it is refused."""
        self._context.count("requests_refused")
        self._send(request_id, Outcome.FAILED, code, message, wait_s=wait_s)

    def release(self, request: ActiveRequest) -> None:
        """Release the pages of an ended request, unless a step, a load or a handoff still uses them."""
        if request not in self._requests.ended or request.has_accessed_pages or self._pending.writes(request):
            return
        if request.has_pages:
            self._cache.close(request.take_lease())
        self._requests.forget(request)

    def _send(
        self,
        request_id: RequestId,
        outcome: Outcome,
        code: str | None,
        message: str,
        stored: StoredPages | None = None,
        wait_s: float | None = None,
        stages: tuple[StageTime, ...] = (),
    ) -> None:
        context, requests = self._context, self._requests
        context.count(_COUNTERS[outcome])
        retry_after_s = None
        if code == "overloaded":
            retry_after_s = bounded_retry_after_s(whole_wait_s(context, requests) if wait_s is None else wait_s)
        context.out.ended.append(
            Ended(
                request_id=request_id,
                outcome=outcome,
                error_code=code,
                message=message,
                retry_after_s=retry_after_s,
                stored=stored,
                stages=stages,
            )
        )
