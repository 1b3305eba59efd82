"""Runs one step of any role: handles events, fires due timers, plans the batch. Roles differ in their handoff side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from kvist.plan.events import Event, StepFailed, StepFinished
from kvist.plan.plan import Flush, Plan
from kvist.plan.tiers import (
    PagesBackedUp,
    PagesFetched,
    PagesForgotten,
    PagesFound,
    PagesLoaded,
    PagesStored,
    StorageAttached,
)
from kvist.request import EpochId, HandoffId
from kvist.scheduler.batching import Batcher
from kvist.scheduler.load import SchedulerLoad
from kvist.scheduler.requests import HandoffHooks, RequestTable
from kvist.scheduler.timers import TimerKind
from kvist.wire import Abort, FlushCache, Submit


class HandoffSide(HandoffHooks, Protocol):
    """One engine's side of its handoffs, as `Steps` uses it."""

    @property
    def num_open(self) -> int: ...

    @property
    def watched_epochs(self) -> frozenset[EpochId]: ...

    def on_timer(self, kind: TimerKind, handoff_id: HandoffId) -> None: ...


class Steps:
    """The scheduler of a role. Mutable; its one owner is the loop. `handlers` handle the handoff events of the role."""

    def __init__(
        self, table: RequestTable, side: HandoffSide, handlers: Mapping[type[Event], Callable[[Any], None]]
    ) -> None:
        table.handoff_side = side
        self._table = table
        self._handoff_side = side
        self._batcher = Batcher(table)
        self._flushing: dict[int, Flush] = {}  # by the job that must be reported before the flush is answered
        self._handlers: dict[type[Event], Callable[[Any], None]] = {
            Submit: table.on_submit,
            Abort: lambda event: table.on_abort(event.request_id),
            StepFinished: self._batcher.on_step_finished,
            StepFailed: self._batcher.on_step_failed,
            FlushCache: self._flush,
            PagesLoaded: self._batcher.on_pages_loaded,
            PagesBackedUp: table.cache.backed_up,
            PagesForgotten: lambda event: table.out.flushes.append(self._flushing.pop(event.job_id)),
            **dict.fromkeys((PagesFound, PagesFetched, PagesStored, StorageAttached), table.cache.storage_event),
            **handlers,
        }

    def step(self, now_s: float, events: Sequence[Event], *, with_batch: bool = True) -> Plan:
        """See `Scheduler.step`. Raises no error for any message from outside. An event of the other handoff side is a
        bug of the loop."""
        table = self._table
        table.now_s = now_s
        table.step_count += 1
        for event in events:
            self._handlers[type(event)](event)
        table.requeue_prefetched()  # before the timers: pages reported in this step are in time, however late it is
        while (due := table.timers.pop_due(now_s)) is not None:
            kind, key = due
            if kind is TimerKind.QUEUE:
                table.on_queue_timeout(key)
            elif kind is TimerKind.PREFETCH:
                table.on_prefetch_timeout(key)
            else:
                self._handoff_side.on_timer(kind, HandoffId(key))
        table.requeue_prefetched()
        batch = self._batcher.plan() if with_batch else None
        return table.out.take(
            batch=batch,
            moves=table.cache.drain_jobs(),
            watched_epochs=self._handoff_side.watched_epochs,
            cache_changes=table.cache.drain_changes(),
            wake_at_s=table.timers.next_at_s(),
        )

    def has_work(self) -> bool:
        """Return whether a request is live or a handoff is open: a shutdown now would lose one of them."""
        return bool(self._table.live) or self._handoff_side.num_open > 0

    def load(self) -> SchedulerLoad:
        table = self._table
        return SchedulerLoad(
            num_running=len(table.live) - table.num_waiting,
            num_waiting=table.num_waiting,
            pages=table.cache.counts(),
            service_s=table.service_time.mean_s,
            host_pages=table.cache.host_counts(),
            totals={**table.totals, **table.cache.totals()},
        )

    def _flush(self, event: FlushCache) -> None:
        num_pages, job_id = self._table.cache.flush(event.tier)
        flush = Flush(call_id=event.call_id, num_pages=num_pages)
        if job_id is None:
            self._table.out.flushes.append(flush)
        else:
            self._flushing[job_id] = flush
