"""Runs one step: handles events, fires due timers, plans the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvist.kv.cache import PageCache
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
from kvist.plan.transfers import PeerDied
from kvist.request import EpochId, Mode, Role
from kvist.scheduler.batching import Batcher
from kvist.scheduler.config import SchedulerConfig
from kvist.scheduler.entry import TokenRule
from kvist.scheduler.load import SchedulerLoad
from kvist.scheduler.requests import RequestTable
from kvist.scheduler.source import SourceSide
from kvist.scheduler.target import TargetSide
from kvist.scheduler.timers import TimerKind
from kvist.wire import Abort, FlushCache, PoolAddress, Submit


def build_scheduler(
    role: Role,
    config: SchedulerConfig,
    cache: PageCache,
    epoch: EpochId,
    pool_address: PoolAddress,
    *,
    needs_known_token: TokenRule | None = None,
) -> Steps:
    """Build a scheduler, with both sides of its handoffs. Peers find our pages at `pool_address`.

    `needs_known_token`: whether the last token of a request with these parameters must be known before its next row is
    planned, so that its rows do not overlap; all other rows do. None: for no request."""
    table = RequestTable(config, cache, role=role, needs_known_token=needs_known_token)
    source = SourceSide(table, epoch=epoch, pool=pool_address)
    target = TargetSide(table, epoch=epoch, pool=pool_address)
    return Steps(table, source, target)


class Steps:
    """The scheduler. Mutable; its one owner is the loop."""

    def __init__(self, table: RequestTable, source: SourceSide, target: TargetSide) -> None:
        table.handoff_sides = {Mode.PREFILL: source, Mode.DECODE: target}
        self._table = table
        self._source, self._target = source, target
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
            **source.handlers(),
            **target.handlers(),
            PeerDied: self._on_peer_died,
        }
        self._on_timer: dict[TimerKind, Callable[[str], None]] = {
            TimerKind.QUEUE: table.on_queue_timeout,
            TimerKind.PREFETCH: table.on_prefetch_timeout,
            **source.timer_handlers(),
            **target.timer_handlers(),
        }
        if table.cache.storage is not None:
            store_events = (PagesFound, PagesFetched, PagesStored, StorageAttached)
            self._handlers |= dict.fromkeys(store_events, table.cache.storage.on_event)

    def step(self, now_s: float, events: Sequence[Event], *, with_batch: bool = True) -> Plan:
        """See `Scheduler.step`. Raises no error for any message from outside."""
        table = self._table
        table.now_s = now_s
        table.step_count += 1
        for event in events:
            self._handlers[type(event)](event)
        table.requeue_prefetched()  # before the timers: pages reported in this step are in time, however late it is
        while (due := table.timers.pop_due(now_s)) is not None:
            kind, key = due
            self._on_timer[kind](key)
        table.requeue_prefetched()
        batch = self._batcher.plan() if with_batch else None
        return table.out.take(
            batch=batch,
            moves=table.cache.plan_jobs(),
            watched_epochs=self._source.watched_epochs | self._target.watched_epochs,
            page_events=table.cache.take_page_events(),
            wake_at_s=table.timers.next_at_s(),
        )

    def has_work(self) -> bool:
        """Return whether a request is live or a handoff is open: a shutdown now would lose one of them."""
        return bool(self._table.live) or self._source.num_open > 0 or self._target.num_open > 0

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

    def _on_peer_died(self, event: PeerDied) -> None:
        self._source.on_peer_died(event)
        self._target.on_peer_died(event)

    def _flush(self, event: FlushCache) -> None:
        num_pages, job_id = self._table.cache.flush(event.tier)
        flush = Flush(call_id=event.call_id, num_pages=num_pages)
        if job_id is None:
            self._table.out.flushes.append(flush)
        else:
            self._flushing[job_id] = flush
