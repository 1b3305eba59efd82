"""The threads of one store: every job runs in a thread, and the engine loop never calls the store itself.

    start ──► reads (FindPages, FetchPages) ──► threads: exists, get ──► report
       └────► writes (StorePages) ────────────► threads: put ─────────┘

Reads do not wait for writes, because requests wait for reads only. Every job gets exactly one report, with 0 pages
after a failure. A store that hangs must not block the engine: a call that takes longer than the deadline, or that
raises, opens the circuit breaker (breaker.py), and waiting jobs are reported at once. A hung call occupies its thread,
and keeps its slots in quarantine (quarantine.py), until it returns; then it is reported. While the breaker is open, the
store is only probed, from a reading thread. A probe needs an idle thread, so a store that never answers occupies at
most its threads and the slots of their jobs.

    StoreThreads ──stop──► no new calls ──the last call returns──► the store is closed
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from kvist.clock import Clock
from kvist.cores import num_usable_cores
from kvist.errors import StoreError, StoreUnreachable
from kvist.memory.host_pool import HostPool
from kvist.plan.tiers import PIECE_PAGES, FetchPages, FindPages, StorePages
from kvist.store.backend import PageStore, StoreStats
from kvist.store.breaker import BreakerState, CircuitBreaker
from kvist.store.counters import STORE_COUNTERS
from kvist.store.quarantine import CallsUnderWay, Job, Probe, StoreCall

_COUNTED = {FindPages: "storage_find", FetchPages: "storage_read", StorePages: "storage_write"}

logger = logging.getLogger(__name__)


def num_readers() -> int:
    """Return the number of reading threads. Four are faster than fewer even on two busy cores; each of many threads
    waits for a process of its own (page_readers/)."""
    return min(12, max(4, 3 * num_usable_cores() // 4))


def num_writers() -> int:
    """Return the number of writing threads. One thread writes about 1.4 GB/s."""
    return min(4, max(2, num_usable_cores() // 4))


class Lock(Protocol):
    def __enter__(self) -> object: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class Condition(Protocol):
    def wait_for(self, predicate: Callable[[], object]) -> object: ...
    def notify(self) -> None: ...
    def notify_all(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """The number of threads of each store, and the classes of the threads and of what they wait for."""

    num_readers: int = field(default_factory=num_readers)
    num_writers: int = field(default_factory=num_writers)
    make: Callable[..., Any] = threading.Thread
    make_lock: Callable[[], Lock] = threading.Lock
    make_condition: Callable[[Any], Condition] = threading.Condition  # on such a lock


@dataclass(frozen=True, slots=True, kw_only=True)
class IOSettings:
    """The settings that the threads of every store of one engine share."""

    host: HostPool
    clock: Clock
    deadline_s: float  # of one call of the store
    report: Callable[[Job, int, bool], None]  # job, number of pages, whether the store answered; from any thread
    wakeup: Callable[[], None]  # of the engine loop; from any thread
    threads: Threads


class WorkerQueue:
    """The jobs of one direction (reads or writes). Mutable; guarded by its store's lock."""

    def __init__(self, has_work: Condition, num_threads: int) -> None:
        self.num_threads = num_threads
        self.has_work = has_work  # on the store's lock
        self.waiting: deque[Job | Probe] = deque()  # bounded by the pages that the cache allows in flight
        self.calls = CallsUnderWay()


class StoreThreads:
    """One store with its threads and breaker. `_lock` guards the mutable state, and is never held during a call of the
    store or of `report`."""

    def __init__(self, store: PageStore, stats: StoreStats, io: IOSettings) -> None:
        self.stats = stats  # as of the last call
        self.closed = threading.Event()  # every call has returned, and the store is closed
        self._store = store
        self._pages = io.host.tensor.numpy()  # [num_pages, page_bytes] uint8
        self._io = io
        self._lock = io.threads.make_lock()
        threads = io.threads
        num_readers = min(threads.num_readers, store.max_readers or threads.num_readers)
        num_writers = min(threads.num_writers, store.max_writers or threads.num_writers)
        self._reads = WorkerQueue(threads.make_condition(self._lock), num_readers)
        self._writes = WorkerQueue(threads.make_condition(self._lock), num_writers)
        self._queues = (self._reads, self._writes)
        self._breaker = CircuitBreaker()
        self._stopped = False
        self._counts: dict[str, float] = STORE_COUNTERS.zeros()
        self._num_threads = sum(queue.num_threads for queue in self._queues)
        for queue, name in ((self._reads, "kvist-store-read"), (self._writes, "kvist-store-write")):
            for _ in range(queue.num_threads):
                io.threads.make(target=self._serve, args=(queue,), name=name, daemon=True).start()

    # ------------------------------------------------------------ the engine loop

    def start(self, job: Job) -> None:
        queue = self._writes if isinstance(job, StorePages) else self._reads
        with self._lock:
            admitted = self._breaker.is_closed
            if admitted:
                queue.waiting.append(job)
                queue.has_work.notify()
            else:
                self._counts["storage_unasked_jobs"] += 1
        if not admitted:
            self._report_unasked([job])

    def cancel(self, job_id: int) -> None:
        with self._lock:
            cancelled = [job for job in self._reads.waiting if not isinstance(job, Probe) and job.job_id == job_id]
            for job in cancelled:
                self._reads.waiting.remove(job)
        self._report_unasked(cancelled)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            dropped = self._drop_waiting()
            for queue in self._queues:
                queue.has_work.notify_all()
        self._report_unasked(dropped)

    def check_deadlines(self, now_s: float) -> None:
        """Open the breaker for calls that hang, and probe the store after the pause."""
        dropped: list[Job] = []
        with self._lock:
            for call in [each for queue in self._queues for each in queue.calls.quarantine(now_s, self._io.deadline_s)]:
                self._counts["storage_slow_calls"] += 1
                dropped += self._open_breaker(now_s)
                logger.warning(
                    "storage tier: %s takes longer than %g s; the breaker opens",
                    _describe(call.job),
                    self._io.deadline_s,
                )
            has_idle_thread = len(self._reads.calls) < self._reads.num_threads  # a thread that hangs would not probe
            if has_idle_thread and not self._stopped and self._breaker.needs_probe(now_s, is_tried=self._is_tried()):
                self._reads.waiting.append(Probe())
                self._reads.has_work.notify()
        self._report_unasked(dropped)

    def breaker(self) -> BreakerState:
        with self._lock:
            return self._breaker.state(self._io.clock.now_s(), is_tried=self._is_tried())

    def num_quarantined_pages(self) -> int:
        with self._lock:
            return sum(queue.calls.num_quarantined_pages for queue in self._queues)

    def slots_under_call(self) -> set[int]:
        """Return the host slots of all calls under way, hung or not: a thread may read or write them."""
        with self._lock:
            return {slot for queue in self._queues for call in queue.calls for slot in call.slots}

    def add_to(self, totals: dict[str, float]) -> None:
        with self._lock:
            for name, count in self._counts.items():
                totals[name] += count
        totals["storage_broken_pages"] += self.stats.num_broken
        totals["storage_refused_pages"] += self.stats.num_refused
        totals["storage_evicted_pages"] += self.stats.num_evicted

    # ------------------------------------------------------------ the breaker; callers hold the lock

    def _is_tried(self) -> bool:
        return any(queue.waiting or queue.calls.some_in_time for queue in self._queues)

    def _open_breaker(self, now_s: float) -> list[Job]:
        """Open the breaker. Return the waiting jobs, which the caller must report."""
        self._breaker.on_failure(now_s)
        dropped = self._drop_waiting()
        self._counts["storage_unasked_jobs"] += len(dropped)
        return dropped

    def _drop_waiting(self) -> list[Job]:
        dropped = [job for queue in self._queues for job in queue.waiting if not isinstance(job, Probe)]
        for queue in self._queues:
            queue.waiting.clear()
        return dropped

    # ------------------------------------------------------------ the threads

    def _serve(self, queue: WorkerQueue) -> None:
        while (call := self._next_call(queue)) is not None:
            started_s = call.started_s
            num_pages, failure = 0, None
            try:
                num_pages = self._run_job(call)
            except Exception as error:  # the thread must survive a failed job, and the job must be answered
                failure = error
            self._report_unasked(self._finish_call(queue, call, num_pages, started_s, failure))
            if not isinstance(call.job, Probe):
                self._io.report(call.job, num_pages, call.answered and failure is None)
        with self._lock:
            self._num_threads -= 1
            is_last = self._num_threads == 0
        if is_last:
            with contextlib.suppress(Exception):  # the store is not used any more
                self._store.close()
            self.closed.set()
            self._io.wakeup()

    def _next_call(self, queue: WorkerQueue) -> StoreCall | None:
        with self._lock:
            queue.has_work.wait_for(lambda: self._stopped or queue.waiting)
            if self._stopped:
                return None
            return queue.calls.begin(queue.waiting.popleft(), self._io.clock.now_s())

    def _run_job(self, call: StoreCall) -> int:
        """Return the number of leading pages that are found, or fetched into their slots, or stored."""
        job, num_done = call.job, 0
        if isinstance(job, Probe):
            self._store.probe()
            return 0
        assert max(call.slots, default=0) < len(self._pages), "a page outside the pool"
        persistent = self._io.host.persistent if isinstance(job, FetchPages) else None
        if persistent is not None:
            persistent.clear(call.slots)
        for first in range(0, len(job.digests), PIECE_PAGES):
            digests = job.digests[first : first + PIECE_PAGES]
            call.started_s = self._io.clock.now_s()
            num_pages = self._call_store(job, digests, call.slots[first : first + PIECE_PAGES])
            num_done += num_pages
            call.answered = num_pages < len(digests) or num_done == len(job.digests)
            if num_pages < len(digests) or call.hangs or self._stopped:
                break
        if persistent is not None and not self._stopped:
            # Written before the report: after it, the slots may be used for other pages.
            assert isinstance(job, FetchPages)
            persistent.record(job.host_slots[:num_done], job.names[:num_done])
        self.stats = self._store.stats()
        return num_done

    def _call_store(self, job: Job, digests: Sequence[bytes], slots: Sequence[int]) -> int:
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
        self, queue: WorkerQueue, call: StoreCall, num_pages: int, started_s: float, failure: Exception | None
    ) -> list[Job]:
        """Count the call. If it opens the breaker, return the waiting jobs, which the caller must report."""
        with self._lock:
            now_s = self._io.clock.now_s()
            queue.calls.end(call)
            if not isinstance(call.job, Probe):
                name = _COUNTED[type(call.job)]
                self._counts[f"{name}s"] += 1
                self._counts[f"{name}_seconds"] += now_s - started_s
                if call.slots:
                    self._counts[f"{name}_bytes"] += num_pages * self._pages.shape[1]
            if failure is not None:
                if isinstance(failure, StoreUnreachable):
                    self._counts["storage_unreachable_calls"] += 1
                    logger.warning("storage tier: %s; the breaker opens", failure.message)
                else:
                    self._counts["storage_raised_calls"] += 1
                    logger.error("storage tier: %s failed", _describe(call.job), exc_info=failure)
                return self._open_breaker(now_s)
            if not call.hangs and self._breaker.on_success(now_s):
                logger.info("storage tier: the store answers again; the breaker is closed")
        return []

    def _report_unasked(self, dropped: Sequence[Job]) -> None:
        for job in dropped:
            self._io.report(job, 0, False)


def _describe(job: Job | Probe) -> str:
    if isinstance(job, Probe):
        return "a probe of the store"
    return f"{type(job).__name__} of {len(job.digests)} pages"
