"""One step of the scheduler: handles events, fires due timers, plans the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvist.kv.cache import PageCache
from kvist.lease_messages import LeaseCommand
from kvist.plan.events import Event, RoleChanged, StepFailed, StepFinished
from kvist.plan.grammars import GrammarCompiled
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
from kvist.request import EpochId, Role
from kvist.scheduler.admission import Admission
from kvist.scheduler.batching import Batcher
from kvist.scheduler.config import SchedulerConfig
from kvist.scheduler.context import SchedulerContext
from kvist.scheduler.endings import Endings
from kvist.scheduler.handoff.side import SideParts
from kvist.scheduler.handoff.sides import Handoffs
from kvist.scheduler.handoff.source import SourceSide
from kvist.scheduler.handoff.stored import StoredHandoffs
from kvist.scheduler.handoff.target import TargetSide
from kvist.scheduler.leases import Leases
from kvist.scheduler.pending import PendingSteps
from kvist.scheduler.queue_wait import whole_wait_s
from kvist.scheduler.results import Results
from kvist.scheduler.states import Requests
from kvist.scheduler.status import SchedulerStatus
from kvist.scheduler.timers import TimerKind
from kvist.wire import Abort, FlushCache, PeerSpec, Submit


def build_scheduler(role: Role, config: SchedulerConfig, cache: PageCache, epoch: EpochId, own: PeerSpec) -> Steps:
    """Build a scheduler, with both sides of its handoffs. `own` is this engine as its peers see it."""
    # the longest sequence whose K/V fits into an otherwise empty pool
    context_len = min(config.max_model_len, cache.num_pages * cache.page_size)
    context = SchedulerContext(config=config, role=role, modes=role.modes, context_len=context_len)
    requests = Requests(context, cache)
    pending, leases = PendingSteps(overlap=config.overlap), Leases(context, cache)
    endings = Endings(context, requests, cache, pending)
    parts = SideParts(context=context, requests=requests, cache=cache, endings=endings, epoch=epoch, own=own)
    handoffs = Handoffs(SourceSide(parts), TargetSide(parts), StoredHandoffs(parts), parts)
    return Steps(
        context=context,
        requests=requests,
        cache=cache,
        handoffs=handoffs,
        leases=leases,
        admission=Admission(context, requests, cache, endings, handoffs, leases),
        batcher=Batcher(context, requests, cache, pending, endings, handoffs, leases),
        results=Results(context, requests, cache, pending, endings, handoffs, leases),
    )


class Steps:
    """The scheduler. Mutable; its one owner is the loop. `requests` is for readers: metrics and tests."""

    def __init__(
        self,
        *,
        context: SchedulerContext,
        requests: Requests,
        cache: PageCache,
        handoffs: Handoffs,
        leases: Leases,
        admission: Admission,
        batcher: Batcher,
        results: Results,
    ) -> None:
        self.requests = requests
        self._context = context
        self._cache = cache
        self._handoffs = handoffs
        self._leases = leases
        self._admission = admission
        self._batcher = batcher
        self._flushing: dict[int, Flush] = {}  # by the id of the job to be reported before the flush is answered
        self._handlers: dict[type[Event], Callable[[Any], None]] = {
            Submit: admission.on_submit,
            GrammarCompiled: admission.on_grammar_compiled,
            Abort: admission.on_abort,
            StepFinished: results.on_step_finished,
            StepFailed: results.on_step_failed,
            FlushCache: self._flush,
            LeaseCommand: leases.on_command,
            RoleChanged: context.on_role_changed,
            PagesLoaded: batcher.on_pages_loaded,
            PagesBackedUp: cache.backed_up,
            PagesForgotten: lambda event: context.out.flushes.append(self._flushing.pop(event.job_id)),
            **handoffs.handlers(),
        }
        if cache.storage is not None:
            store_events = (PagesFound, PagesFetched, PagesStored, StorageAttached)
            self._handlers |= dict.fromkeys(store_events, cache.storage.on_event)
        self._on_timer: dict[TimerKind, Callable[[str], None]] = {
            TimerKind.COMPILED: admission.on_grammar_timeout,
            TimerKind.QUEUE: admission.on_queue_timeout,
            TimerKind.LEASE: leases.on_time,
            TimerKind.PREFETCH: admission.on_prefetch_timeout,
            **handoffs.timer_handlers(),
        }

    def step(self, now_s: float, events: Sequence[Event], *, with_batch: bool = True) -> Plan:
        """See `Scheduler.step`. Raises no error for any message from outside."""
        context = self._context
        context.now_s = now_s
        context.step_count += 1
        for event in events:
            self._handlers[type(event)](event)
        self._handoffs.stored.end_settled()
        self._admission.queue_fetched()  # before the timers: pages reported in this step count as in time
        while (due := context.timers.pop_due(now_s)) is not None:
            kind, key = due
            self._on_timer[kind](key)
        self._admission.queue_fetched()
        batch = self._batcher.plan() if with_batch else None
        self._batcher.load_early()
        return context.out.take(
            batch=batch,
            tier_jobs=self._cache.plan_jobs(),
            watched_epochs=self._handoffs.watched_epochs,
            changed_pages=self._cache.take_changed_pages(),
            seen_in_store=None if self._cache.storage is None else self._cache.storage.take_seen(),
            wake_at_s=context.timers.next_at_s(),
        )

    def has_work(self) -> bool:
        return bool(self.requests.live) or self._handoffs.num_open > 0

    def status(self) -> SchedulerStatus:
        num_waiting = self.requests.num_waiting
        return SchedulerStatus(
            num_running=len(self.requests.live) - num_waiting,
            num_waiting=num_waiting,
            pages=self._cache.counts(),
            leases=self._leases.counts(),
            service_s=self._context.service_time.mean_s,
            queue_wait_s=whole_wait_s(self._context, self.requests),
            host_pages=self._cache.host_counts(),
            totals={**self._context.totals, **self._cache.totals()},
        )

    def _flush(self, event: FlushCache) -> None:
        num_pages, job_id = self._cache.flush(event.tier)
        flush = Flush(call_id=event.call_id, num_pages=num_pages)
        if job_id is None:
            self._context.out.flushes.append(flush)
        else:
            self._flushing[job_id] = flush
