"""The requests that wait for the grammar of their constraint, before they wait for pages or in the queue.

A request waits at most `grammar_compile_timeout_s`, and then fails. Its pages are fetched from the store meanwhile. The
compiler keeps grammars by content: most requests wait for a fraction of a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvist.plan.grammars import CompileGrammar
from kvist.request import RequestId
from kvist.scheduler.active import ActiveRequest
from kvist.scheduler.context import SchedulerContext
from kvist.scheduler.timers import TimerKind


class Compiling:
    """The requests in state COMPILING. Mutable; its one owner is `Requests`."""

    def __init__(self, context: SchedulerContext) -> None:
        self._context = context
        self._requests: dict[RequestId, ActiveRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[ActiveRequest]:
        return iter(self._requests.values())

    def get(self, request_id: RequestId) -> ActiveRequest | None:
        return self._requests.get(request_id)

    def enter(self, request: ActiveRequest) -> None:
        context, constraint = self._context, request.sampling.constraint
        assert constraint is not None, f"{request.request_id} has no constraint to wait for"
        self._requests[request.request_id] = request
        context.out.grammar_jobs.append(CompileGrammar(request_id=request.request_id, constraint=constraint))
        deadline_s = context.now_s + context.config.grammar_compile_timeout_s
        context.timers.set(TimerKind.COMPILED, request.request_id, deadline_s)

    def leave(self, request: ActiveRequest) -> None:
        del self._requests[request.request_id]
        jobs = self._context.out.grammar_jobs
        jobs[:] = [job for job in jobs if job.request_id != request.request_id]  # it was compiled before
        self._context.timers.cancel(TimerKind.COMPILED, request.request_id)
        self._context.count("grammar_wait_seconds", self._context.now_s - request.arrived_s)
