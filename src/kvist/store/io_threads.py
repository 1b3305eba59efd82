"""Copy pages between the host pool and a store (store/), on threads; the engine's loop never calls a store itself.

    engine loop: start ──► reads (FindPages, FetchPages) ──► threads: exists, get ──► reports ──► engine loop: poll
                     └───► writes (StorePages) ────────────► threads: put ─────────┘   (after a call of `wakeup`)

    attach ──► an `_AttachedStore`: the store, its threads, its breaker ──detach──► no new calls
                                                                            ──the last call returns──► store closed

Reads do not queue behind writes: requests wait for reads only. Every job gets exactly one report, with 0 pages on any
failure. A store that hangs must not block the engine: a call that takes longer than the deadline, or that raises, opens
the circuit breaker.

    closed ──a call hangs or raises──► open: every job is answered 0 at once ──pause──► half open: one job is tried
       ▲                                              ▲────────the job hangs or raises───────┤
       └─────────────────────────────────────────────────────the job returns in time────────┘

A hung call occupies its thread, and keeps its slots in flight, until it returns; its report comes then. Each thread
that hangs leaves fewer tries: a store that hangs for good occupies its threads and the slots of their jobs, no more.

kv/tiers/storage.py decides which page is copied where.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvist.clock import Clock
from kvist.cores import num_usable_cores
from kvist.errors import StoreError
from kvist.memory.host_pool import HostPool
from kvist.plan.tiers import (
    PIECE_PAGES,
    CancelFetch,
    FetchPages,
    FindPages,
    PagesFetched,
    PagesFound,
    PagesStored,
    StoreJob,
    StorePages,
)
from kvist.store.backend import PageStore, StoreStats

STORE_COUNTERS = (
    *("storage_finds", "storage_find_seconds"),
    *("storage_reads", "storage_read_bytes", "storage_read_seconds"),
    *("storage_writes", "storage_write_bytes", "storage_write_seconds"),
    "storage_slow_calls",  # calls that took longer than the deadline
    "storage_raised_calls",
    "storage_unasked_jobs",  # jobs answered without a call, because the breaker was open
    *("storage_broken_pages", "storage_refused_pages", "storage_evicted_pages"),  # counted by the store
)
BREAKER_CLOSED, BREAKER_OPEN, BREAKER_HALF_OPEN = "closed", "open", "half_open"
PAUSE_S = 5.0  # between two tries of a store that hangs
CLOSE_S = 2.0  # the longest wait for calls under way when the engine ends

logger = logging.getLogger(__name__)

_Job = FindPages | FetchPages | StorePages
_COUNTED = {FindPages: "storage_find", FetchPages: "storage_read", StorePages: "storage_write"}
Report = PagesFound | PagesFetched | PagesStored
_ANSWERS: dict[type, Callable[..., Report]]
_ANSWERS = {FindPages: PagesFound, FetchPages: PagesFetched, StorePages: PagesStored}


@dataclass(slots=True, eq=False)
class _Call:
    """A job that a thread runs. Mutable; owned by the thread, except `is_slow`, which the engine loop sets."""

    job: _Job
    started_s: float  # of the current call of the store
    is_slow: bool = False  # the call took longer than the deadline
    answered: bool = False  # the store has answered for every page of the job

    @property
    def slots(self) -> tuple[int, ...]:
        return () if isinstance(self.job, FindPages) else self.job.host_slots


def num_readers() -> int:
    """Return the number of reading threads. Four are faster than fewer even on two busy cores."""
    return min(8, max(4, num_usable_cores() // 2))


def num_writers() -> int:
    """Return the number of writing threads. One thread writes about 1.4 GB/s."""
    return min(4, max(2, num_usable_cores() // 4))


class StoreMover:
    """The attached store, and detached stores with calls under way. Only the engine loop calls the public methods,
    except `report`; any thread may call `wakeup`."""

    def __init__(self, host: HostPool, *, wakeup: Callable[[], None], clock: Clock, deadline_s: float) -> None:
        self.host = host
        self.wakeup = wakeup
        self.clock = clock
        self.deadline_s = deadline_s
        self._reports: deque[Report] = deque()
        self._attached: _AttachedStore | None = None
        self._detached: list[_AttachedStore] = []  # with calls under way
        self._totals: dict[str, float] = dict.fromkeys(STORE_COUNTERS, 0)  # of closed stores
        self._errors: Counter[str] = Counter()  # of closed stores

    def attach(self, store: PageStore, stats: StoreStats) -> None:
        """Use this store from now on, and close it after `detach`. The caller passes the store's current `stats`,
        because the call may block."""
        assert self._attached is None, "detach the other store first"
        self._attached = _AttachedStore(store, stats, self)

    def detach(self) -> threading.Event:
        """Start no new calls and answer waiting jobs. Return an event that is set when the last call has returned and
        the store is closed."""
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
            self.report(job, 0)
        else:
            self._attached.start(job)

    def poll(self) -> list[Report]:
        """Return the reports since the last call. Call at least once a second: `poll` checks the deadline of calls."""
        now_s = self.clock.now_s()
        for store in self._stores():
            store.notice_deadline(now_s)
        for store in [each for each in self._detached if each.closed.is_set()]:
            self._detached.remove(store)
            store.add_to(self._totals)
            self._errors.update(store.stats.errors)
        return [self._reports.popleft() for _ in range(len(self._reports))]

    def num_detached(self) -> int:
        """Return the number of detached stores that still have calls under way."""
        return sum(not store.closed.is_set() for store in self._detached)

    def breaker(self) -> str:
        return BREAKER_CLOSED if self._attached is None else self._attached.breaker()

    def num_quarantined_pages(self) -> int:
        """Return the number of host slots held by calls that hang."""
        return sum(store.num_quarantined_pages() for store in self._stores())

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
        """Return error counts by the name of the errno, summed over all stores so far."""
        errors = self._errors.copy()
        for store in self._stores():
            errors.update(store.stats.errors)
        return dict(errors)

    def close(self) -> bool:
        """Detach the store and wait for its calls. Return False if a call hangs: it may still write into the pool."""
        if self._attached is not None:
            self.detach()
        give_up_s = self.clock.now_s() + CLOSE_S
        return all(store.closed.wait(max(0.0, give_up_s - self.clock.now_s())) for store in self._detached)

    def _stores(self) -> list[_AttachedStore]:
        return [*self._detached, *([] if self._attached is None else [self._attached])]

    def report(self, job: _Job, num_pages: int, answered: bool = False) -> None:
        """Queue a job's report and wake the engine loop. Any thread may call this method."""
        more = {"answered": answered} if isinstance(job, FindPages) else {}
        self._reports.append(_ANSWERS[type(job)](job_id=job.job_id, num_pages=num_pages, **more))
        self.wakeup()


class _WorkerQueue:
    """The jobs of one direction (reads or writes). Mutable; guarded by its store's lock."""

    def __init__(self, lock: threading.Lock, num_threads: int) -> None:
        self.num_threads = num_threads
        self.has_work = threading.Condition(lock)
        self.waiting: deque[_Job] = deque()  # bounded by the pages that the cache allows in flight
        self.calls: list[_Call] = []


class _AttachedStore:
    """One store with its threads and breaker. `_lock` guards the mutable state, and is never held during a call of the
    store or of the mover."""

    def __init__(self, store: PageStore, stats: StoreStats, mover: StoreMover) -> None:
        self.stats = stats
        self.closed = threading.Event()  # every call has returned, and the store is closed
        self._store = store
        self._pages = mover.host.tensor.numpy()  # [num_pages, page_bytes] uint8
        self._mover = mover
        self._clock = mover.clock
        self._lock = threading.Lock()
        self._reads, self._writes = _WorkerQueue(self._lock, num_readers()), _WorkerQueue(self._lock, num_writers())
        self._retry_at_s: float | None = None  # set while the breaker is open or half open
        self._stopped = False
        self._counts: dict[str, float] = dict.fromkeys(STORE_COUNTERS, 0)
        self._num_threads = self._reads.num_threads + self._writes.num_threads
        for queue, name in ((self._reads, "kvist-store-read"), (self._writes, "kvist-store-write")):
            for _ in range(queue.num_threads):
                threading.Thread(target=self._serve, args=(queue,), name=name, daemon=True).start()

    def start(self, job: _Job) -> None:
        queue = self._writes if isinstance(job, StorePages) else self._reads
        with self._lock:
            admitted = self._admits(queue)
            if admitted:
                queue.waiting.append(job)
                queue.has_work.notify()
            else:
                self._counts["storage_unasked_jobs"] += 1
        if not admitted:
            self._answer([job])

    def cancel(self, job_id: int) -> None:
        with self._lock:
            cancelled = [job for job in self._reads.waiting if job.job_id == job_id]
            for job in cancelled:
                self._reads.waiting.remove(job)
        self._answer(cancelled)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            dropped = self._drop_waiting()
            for queue in (self._reads, self._writes):
                queue.has_work.notify_all()
        self._answer(dropped)

    def notice_deadline(self, now_s: float) -> None:
        dropped: list[_Job] = []
        with self._lock:
            for call in self._calls():
                if call.is_slow or now_s - call.started_s <= self._mover.deadline_s:
                    continue
                call.is_slow = True
                self._counts["storage_slow_calls"] += 1
                dropped += self._open_breaker(now_s)
                logger.warning(
                    "storage tier: %s takes longer than %g s; the breaker opens",
                    _describe(call.job),
                    self._mover.deadline_s,
                )
        self._answer(dropped)

    def breaker(self) -> str:
        with self._lock:
            if self._retry_at_s is None:
                return BREAKER_CLOSED
            may_probe = self._clock.now_s() >= self._retry_at_s
            return BREAKER_HALF_OPEN if may_probe and self._is_probing() else BREAKER_OPEN

    def num_quarantined_pages(self) -> int:
        with self._lock:
            return sum(len(call.slots) for call in self._calls() if call.is_slow)

    def add_to(self, totals: dict[str, float]) -> None:
        with self._lock:
            for name, count in self._counts.items():
                totals[name] += count
        totals["storage_broken_pages"] += self.stats.num_broken
        totals["storage_refused_pages"] += self.stats.num_refused
        totals["storage_evicted_pages"] += self.stats.num_evicted

    # ------------------------------------------------------------ the breaker; callers hold the lock

    def _admits(self, queue: _WorkerQueue) -> bool:
        if self._retry_at_s is None:
            return True
        is_idle = len(queue.calls) < queue.num_threads
        return is_idle and not self._is_probing() and self._clock.now_s() >= self._retry_at_s

    def _is_probing(self) -> bool:
        return bool(self._reads.waiting or self._writes.waiting) or any(not call.is_slow for call in self._calls())

    def _open_breaker(self, now_s: float) -> list[_Job]:
        """Return the waiting jobs, which the caller must answer."""
        self._retry_at_s = now_s + PAUSE_S
        dropped = self._drop_waiting()
        self._counts["storage_unasked_jobs"] += len(dropped)
        return dropped

    def _drop_waiting(self) -> list[_Job]:
        dropped = [*self._reads.waiting, *self._writes.waiting]
        self._reads.waiting.clear()
        self._writes.waiting.clear()
        return dropped

    def _calls(self) -> list[_Call]:
        return [*self._reads.calls, *self._writes.calls]

    # ------------------------------------------------------------ the threads

    def _serve(self, queue: _WorkerQueue) -> None:
        while (call := self._next_call(queue)) is not None:
            started_s = call.started_s
            num_pages, has_raised = 0, False
            try:
                num_pages = self._run_job(call)
            except Exception:  # the thread must survive a failed job, and the job must be answered
                logger.exception("storage tier: %s failed", _describe(call.job))
                has_raised = True
            self._answer(self._finish_call(queue, call, num_pages, started_s, has_raised))
            self._mover.report(call.job, num_pages, call.answered and not has_raised)
        with self._lock:
            self._num_threads -= 1
            is_last = self._num_threads == 0
        if is_last:
            with contextlib.suppress(Exception):  # the store is not used any more
                self._store.close()
            self.closed.set()
            self._mover.wakeup()

    def _next_call(self, queue: _WorkerQueue) -> _Call | None:
        with self._lock:
            queue.has_work.wait_for(lambda: self._stopped or queue.waiting)
            if self._stopped:
                return None
            call = _Call(queue.waiting.popleft(), self._clock.now_s())
            queue.calls.append(call)
            return call

    def _run_job(self, call: _Call) -> int:
        """Return how many leading pages the store has (find), are in their slots (fetch), or are stored (store)."""
        job, num_done = call.job, 0
        assert max(call.slots, default=0) < len(self._pages), "a page outside the pool"
        persistent = self._mover.host.persistent if isinstance(job, FetchPages) else None
        if persistent is not None:
            persistent.clear(call.slots)
        for first in range(0, len(job.digests), PIECE_PAGES):
            digests = job.digests[first : first + PIECE_PAGES]
            call.started_s = self._clock.now_s()
            num_pages = self._call_store(job, digests, call.slots[first : first + PIECE_PAGES])
            num_done += num_pages
            call.answered = num_pages < len(digests) or num_done == len(job.digests)
            if num_pages < len(digests) or call.is_slow or self._stopped:
                break
        if persistent is not None and not self._stopped:
            # Before the report: after it, the slots may belong to other pages.
            assert isinstance(job, FetchPages)
            persistent.record(job.host_slots[:num_done], job.names[:num_done])
        self.stats = self._store.stats()
        return num_done

    def _call_store(self, job: _Job, digests: Sequence[bytes], slots: Sequence[int]) -> int:
        pages = [self._pages[slot].data for slot in slots]
        match job:
            case FindPages():
                num_pages = self._store.exists(digests)
            case FetchPages():
                num_pages = self._store.get(digests, pages)
            case StorePages():
                num_pages = self._store.put(digests, pages)
        if not 0 <= num_pages <= len(digests):
            raise StoreError(f"the store returned {num_pages} pages for {len(digests)} keys")
        return num_pages

    def _finish_call(
        self, queue: _WorkerQueue, call: _Call, num_pages: int, started_s: float, has_raised: bool
    ) -> list[_Job]:
        """Count the call. Return the jobs that the caller must answer because the breaker opened."""
        name = _COUNTED[type(call.job)]
        with self._lock:
            now_s = self._clock.now_s()
            queue.calls.remove(call)
            self._counts[f"{name}s"] += 1
            self._counts[f"{name}_seconds"] += now_s - started_s
            if call.slots:
                self._counts[f"{name}_bytes"] += num_pages * self._pages.shape[1]
            if has_raised:
                self._counts["storage_raised_calls"] += 1
                return self._open_breaker(now_s)
            if self._retry_at_s is not None and not call.is_slow and now_s >= self._retry_at_s:
                self._retry_at_s = None
                logger.info("storage tier: the store answers again; the breaker is closed")
        return []

    def _answer(self, dropped: Sequence[_Job]) -> None:
        for job in dropped:
            self._mover.report(job, 0)


def _describe(job: _Job) -> str:
    return f"{type(job).__name__} of {len(job.digests)} pages"
