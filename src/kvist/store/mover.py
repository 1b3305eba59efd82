"""Copies pages between the host pool and the attached store: jobs in, reports out.

    engine loop: start ──► the attached store's threads (io_threads.py) ──► reports ──► engine loop: poll
                                                                            (after a call of `wakeup`)

    attach ──► `StoreThreads` ──detach──► no new calls ──the last call returns──► the store is closed

Every job gets exactly one report; without a store the report comes at once, with 0 pages. A detached store whose calls
hang exists beside the next store until the calls return. kv/tiers/storage.py decides which page is copied where.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable

from kvist.clock import Clock
from kvist.memory.host_pool import HostPool
from kvist.plan.tiers import (
    CancelFetch,
    FetchPages,
    FindPages,
    PagesFetched,
    PagesFound,
    PagesStored,
    StoreJob,
    StoreReport,
)
from kvist.store.backend import PageStore, StoreStats
from kvist.store.breaker import BreakerState
from kvist.store.counters import STORE_COUNTERS
from kvist.store.io_threads import IOSettings, StoreThreads, Threads
from kvist.store.quarantine import Job

CLOSE_S = 2.0  # the longest wait for calls under way when the engine ends


class StoreMover:
    """The attached store, and detached stores with calls under way. Only the engine loop calls the public methods; any
    thread may call `wakeup`."""

    def __init__(
        self,
        host: HostPool,
        *,
        wakeup: Callable[[], None],
        clock: Clock,
        deadline_s: float,
        threads: Threads | None = None,  # None: by the number of cores
    ) -> None:
        self._clock = clock
        self._wakeup = wakeup
        self._io = IOSettings(
            host=host,
            clock=clock,
            deadline_s=deadline_s,
            report=self._report,
            wakeup=wakeup,
            threads=threads or Threads(),
        )
        self._reports: deque[StoreReport] = deque()
        self._attached: StoreThreads | None = None
        self._detached: list[StoreThreads] = []  # with calls under way
        self._totals: dict[str, float] = STORE_COUNTERS.zeros()  # of closed stores
        self._errors: Counter[str] = Counter()  # of closed stores

    def attach(self, store: PageStore, stats: StoreStats) -> None:
        """Use this store until `detach`, which also closes it. The caller passes the current `store.stats()`, because
        that call may block."""
        assert self._attached is None, "detach the other store first"
        self._attached = StoreThreads(store, stats, self._io)

    def detach(self) -> threading.Event:
        """Start no new calls, and report waiting jobs with 0 pages. Return an event that is set when the last call has
        returned and the store is closed."""
        assert self._attached is not None
        store, self._attached = self._attached, None
        store.stop()
        self._detached.append(store)
        return store.closed

    def start(self, job: StoreJob) -> None:
        if isinstance(job, CancelFetch):
            if self._attached is not None:
                self._attached.cancel(job.job_id)
        elif self._attached is None:
            self._report(job, 0, False)
        else:
            self._attached.start(job)

    def poll(self) -> list[StoreReport]:
        """Return the reports since the last call. Must be called once a second, because it checks the deadlines."""
        now_s = self._clock.now_s()
        for store in self._stores():
            store.check_deadlines(now_s)
        for store in [each for each in self._detached if each.closed.is_set()]:
            self._detached.remove(store)
            store.add_to(self._totals)
            self._errors.update(store.stats.errors)
        return [self._reports.popleft() for _ in range(len(self._reports))]

    def num_detached(self) -> int:
        """Return the number of detached stores that still have calls under way."""
        return sum(not store.closed.is_set() for store in self._detached)

    def breaker(self) -> BreakerState:
        return BreakerState.CLOSED if self._attached is None else self._attached.breaker()

    def num_quarantined_pages(self) -> int:
        """Return the number of host slots in quarantine."""
        return sum(store.num_quarantined_pages() for store in self._stores())

    def slots_under_call(self) -> set[int]:
        """Return the host slots that calls of attached and detached stores may read or write."""
        return {slot for store in self._stores() for slot in store.slots_under_call()}

    def stats(self) -> StoreStats | None:
        """Return the attached store's statistics, as of its last call."""
        return None if self._attached is None else self._attached.stats

    def totals(self) -> dict[str, float]:
        """Return the values of STORE_COUNTERS, summed over all stores so far."""
        totals = dict(self._totals)
        for store in self._stores():
            store.add_to(totals)
        return totals

    def errors(self) -> dict[str, int]:
        """Return the counts of errors by name, summed over all stores so far."""
        errors = self._errors.copy()
        for store in self._stores():
            errors.update(store.stats.errors)
        return dict(errors)

    def close(self) -> bool:
        """Detach the store and wait for its calls. Return False if a call hangs: it may still write into the pool."""
        if self._attached is not None:
            self.detach()
        give_up_s = self._clock.now_s() + CLOSE_S
        return all(store.closed.wait(max(0.0, give_up_s - self._clock.now_s())) for store in self._detached)

    def _stores(self) -> list[StoreThreads]:
        return [*self._detached, *([] if self._attached is None else [self._attached])]

    def _report(self, job: Job, num_pages: int, answered: bool) -> None:
        """Queue a job's report and wake the engine loop. Any thread may call this method."""
        report: StoreReport
        match job:
            case FindPages():
                report = PagesFound(job_id=job.job_id, num_pages=num_pages, answered=answered)
            case FetchPages():
                report = PagesFetched(job_id=job.job_id, num_pages=num_pages)
            case _:
                report = PagesStored(job_id=job.job_id, num_pages=num_pages)
        self._reports.append(report)
        self._wakeup()
