"""The store mover: every job is answered once, and a store that misreports, raises or hangs blocks no request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from kvist.errors import StoreUnreachable
from kvist.memory.host_pool import HostPool
from kvist.memory.persistence import PersistentPages
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
    StoreReport,
)
from kvist.store.backend import HostMemory, StoreContext, StoreStats
from kvist.store.breaker import PAUSE_S
from kvist.store.io_threads import Threads, num_readers
from kvist.store.mover import StoreMover
from kvist.testing.clocks import FakeClock
from kvist.testing.memory_store import MemoryStore
from kvist.testing.waits import wait_until

PAGE_BYTES, NUM_PAGES, DEADLINE_S = 64, 400, 10.0
NUM_READERS = num_readers()
GIVE_UP_S = 60.0


def digest(number: int) -> bytes:
    return number.to_bytes(32, "big")


class ControlledStore(MemoryStore):
    """A store that hangs while `go` is not set, and returns `answer()`, if set, in place of the right number."""

    def __init__(self, memory: HostMemory | None = None) -> None:
        super().__init__(StoreContext(namespace="n", page_bytes=PAGE_BYTES, host_memory=memory))
        self.go = threading.Event()
        self.go.set()
        self.answer: Callable[[], int] | None = None
        self.calls: list[str] = []
        self.closed = False

    def _answer(self, name: str, truth: Callable[[], int]) -> int:
        self.calls.append(name)
        assert self.go.wait(GIVE_UP_S)
        return truth() if self.answer is None else self.answer()

    def exists(self, keys: Sequence[bytes]) -> int:
        return self._answer("exists", lambda: MemoryStore.exists(self, keys))

    def get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> int:
        return self._answer("get", lambda: MemoryStore.get(self, keys, into))

    def put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        return self._answer("put", lambda: MemoryStore.put(self, keys, pages))

    def probe(self) -> None:
        self._answer("probe", lambda: 0)

    def close(self) -> None:
        self.closed = True
        super().close()


class Moving:
    def __init__(self) -> None:
        self.host = HostPool(NUM_PAGES, PAGE_BYTES, pinned=False)
        self.pages = self.host.tensor.numpy()
        self.pages[:] = np.arange(NUM_PAGES, dtype=np.uint8)[:, None]
        self.clock = FakeClock(100.0)
        self.woken = threading.Event()
        self.mover = StoreMover(self.host, wakeup=self.woken.set, clock=self.clock, deadline_s=DEADLINE_S)
        tensor = self.host.tensor
        self.store = ControlledStore(HostMemory(address=tensor.data_ptr(), num_bytes=tensor.nbytes))
        self.mover.attach(self.store, self.store.stats())
        self.num_jobs = 0

    def start(self, kind: type[FindPages] | type[FetchPages] | type[StorePages], count: int, slot: int = 0) -> StoreJob:
        """Start a job for pages [0, count), from or to the slots from `slot` on."""
        self.num_jobs += 1
        digests, slots = tuple(map(digest, range(count))), tuple(range(slot, slot + count))
        job: StoreJob
        if kind is FindPages:
            job = FindPages(job_id=self.num_jobs, digests=digests)
        else:
            job = kind(job_id=self.num_jobs, digests=digests, host_slots=slots)  # type: ignore[call-arg]
        self.mover.start(job)
        return job

    def reports(self, number: int = 1) -> list[StoreReport]:
        found: list[StoreReport] = []
        give_up_s = time.monotonic() + GIVE_UP_S
        while len(found) < number:
            assert time.monotonic() < give_up_s, f"{found}, {self.store.calls}"
            self.woken.wait(0.2)
            self.woken.clear()
            found += self.mover.poll()
        return found

    def hang(self, kind: type[FetchPages] | type[StorePages] = FetchPages, count: int = 3) -> None:
        """Let one call of the store hang until the deadline has passed."""
        self.store.go.clear()
        num_calls = len(self.store.calls)
        self.start(kind, count, slot=10)
        wait_until(lambda: len(self.store.calls) > num_calls)
        self.clock.advance(DEADLINE_S + 1)
        assert self.mover.poll() == []


@pytest.fixture
def moving() -> Iterator[Moving]:
    made = Moving()
    yield made
    made.store.go.set()
    assert made.mover.close()


def test_the_leading_stored_pages_come_back_byte_for_byte(moving: Moving) -> None:
    moving.start(StorePages, 5)
    assert moving.reports() == [PagesStored(job_id=1, num_pages=5)]
    moving.start(FindPages, 9)
    assert moving.reports() == [PagesFound(job_id=2, num_pages=5)]
    moving.start(FetchPages, 9, slot=20)
    assert moving.reports() == [PagesFetched(job_id=3, num_pages=5)]
    assert (moving.pages[20:25] == moving.pages[:5]).all()
    assert (moving.pages[29:] == np.arange(29, NUM_PAGES).astype(np.uint8)[:, None]).all(), "beyond its slots"
    totals = moving.mover.totals()
    assert [totals[f"storage_{name}"] for name in ("finds", "reads", "writes")] == [1, 1, 1]
    assert [totals[f"storage_{name}_bytes"] for name in ("read", "write")] == [5 * PAGE_BYTES] * 2


def test_a_long_job_is_split_into_calls_with_a_deadline_each(moving: Moving) -> None:
    moving.start(StorePages, 2 * PIECE_PAGES + 1)
    assert moving.reports() == [PagesStored(job_id=1, num_pages=2 * PIECE_PAGES + 1)]
    assert moving.store.calls == ["put"] * 3


def test_a_page_missing_in_the_first_call_of_a_long_job_ends_it_there(moving: Moving) -> None:
    moving.start(StorePages, 2 * PIECE_PAGES)
    moving.reports()
    del moving.store._pages[digest(5)]
    moving.start(FindPages, 2 * PIECE_PAGES)
    moving.start(FetchPages, 100)
    moving.start(FetchPages, 2 * PIECE_PAGES)
    reports = moving.reports(3)
    assert [report.num_pages for report in reports if not isinstance(report, PagesStored)] == [5, 5, 5]


def test_without_a_store_every_job_is_answered_with_zero_pages(moving: Moving) -> None:
    moving.mover.detach()
    for kind in (FindPages, FetchPages, StorePages):
        moving.start(kind, 3)
    assert moving.reports(3) == [
        PagesFound(job_id=1, num_pages=0, answered=False),
        PagesFetched(job_id=2, num_pages=0),
        PagesStored(job_id=3, num_pages=0),
    ]


def test_reads_do_not_wait_for_slow_writes(moving: Moving) -> None:
    moving.store.go.clear()
    for _ in range(10):
        moving.start(StorePages, 3)
    wait_until(lambda: moving.store.calls == ["put"] * 2)
    moving.start(FindPages, 3)
    wait_until(lambda: "exists" in moving.store.calls)
    moving.store.go.set()
    moving.reports(11)


@pytest.mark.parametrize("answer", [-1, 4, 10**9])
def test_a_store_that_reports_more_pages_than_asked_for_counts_as_failed(moving: Moving, answer: int) -> None:
    moving.store.answer = lambda: answer
    moving.start(FetchPages, 3)
    assert moving.reports() == [PagesFetched(job_id=1, num_pages=0)]


def test_a_fetch_that_has_not_begun_can_be_cancelled_and_is_answered_at_once(moving: Moving) -> None:
    moving.store.go.clear()
    for _ in range(NUM_READERS):
        moving.start(FetchPages, 1)
    wait_until(lambda: len(moving.store.calls) == NUM_READERS)
    job = moving.start(FetchPages, 3)
    moving.mover.start(CancelFetch(job_id=job.job_id))
    assert moving.reports() == [PagesFetched(job_id=job.job_id, num_pages=0)]
    moving.mover.start(CancelFetch(job_id=1))  # it has begun
    assert moving.mover.poll() == []
    moving.store.go.set()
    assert len(moving.reports(NUM_READERS)) == NUM_READERS
    assert len(moving.store.calls) == NUM_READERS


def test_an_exception_counts_as_zero_pages_and_opens_the_breaker(moving: Moving) -> None:
    def fail() -> int:
        raise OSError("the disk is gone")

    moving.store.answer = fail
    moving.start(StorePages, 3)
    assert moving.reports() == [PagesStored(job_id=1, num_pages=0)]
    assert moving.mover.breaker().value == "open"
    moving.start(FindPages, 3)
    assert moving.reports() == [PagesFound(job_id=2, num_pages=0, answered=False)]
    assert moving.store.calls == ["put"]
    totals = moving.mover.totals()
    assert (totals["storage_raised_calls"], totals["storage_unasked_jobs"]) == (1, 1)


def test_a_hung_call_opens_the_breaker_and_keeps_its_slots_until_it_returns(moving: Moving) -> None:
    moving.start(StorePages, 3)
    moving.reports()
    moving.hang(FetchPages)
    assert moving.mover.breaker().value == "open"
    assert moving.mover.num_quarantined_pages() == 3
    moving.start(FindPages, 3)
    moving.start(StorePages, 3)
    assert moving.reports(2) == [PagesFound(job_id=3, num_pages=0, answered=False), PagesStored(job_id=4, num_pages=0)]
    moving.store.go.set()
    assert moving.reports() == [PagesFetched(job_id=2, num_pages=3)]
    assert (moving.pages[10:13] == moving.pages[:3]).all()
    assert moving.mover.breaker().value == "open", "a late return does not close the breaker"
    assert moving.mover.num_quarantined_pages() == 0
    assert moving.mover.totals()["storage_slow_calls"] == 1


def test_jobs_waiting_behind_a_hung_call_are_answered_when_the_breaker_opens(moving: Moving) -> None:
    moving.store.go.clear()
    for _ in range(NUM_READERS + 5):
        moving.start(FetchPages, 1)
    wait_until(lambda: len(moving.store.calls) == NUM_READERS)
    moving.clock.advance(DEADLINE_S + 1)
    assert {report.job_id for report in moving.reports(5)} == set(range(NUM_READERS + 1, NUM_READERS + 6))
    assert moving.mover.totals()["storage_unasked_jobs"] == 5
    moving.store.go.set()
    assert {report.job_id for report in moving.reports(NUM_READERS)} == set(range(1, NUM_READERS + 1))


def test_an_unanswered_lookup_is_reported_apart_from_a_miss(moving: Moving) -> None:
    moving.start(StorePages, PIECE_PAGES)
    moving.reports()
    moving.start(FindPages, PIECE_PAGES + 5)
    assert moving.reports() == [PagesFound(job_id=2, num_pages=PIECE_PAGES)]
    moving.store.go.clear()
    moving.start(FindPages, PIECE_PAGES + 5)
    wait_until(lambda: moving.store.calls[-1] == "exists" and len(moving.store.calls) == 4)
    moving.clock.advance(DEADLINE_S + 1)
    assert moving.mover.poll() == []
    moving.store.go.set()
    assert moving.reports() == [PagesFound(job_id=3, num_pages=PIECE_PAGES, answered=False)]


def test_the_store_is_probed_after_a_pause_and_used_again_when_the_probe_returns_in_time(moving: Moving) -> None:
    moving.hang()
    moving.clock.advance(PAUSE_S - 1)
    moving.mover.poll()
    moving.start(FindPages, 3)
    assert moving.reports() == [PagesFound(job_id=2, num_pages=0, answered=False)], "too early"
    moving.clock.advance(1)
    assert moving.mover.poll() == []
    wait_until(lambda: moving.store.calls[-1] == "probe")
    assert moving.mover.breaker().value == "half_open"
    moving.start(FindPages, 3)
    assert moving.reports() == [PagesFound(job_id=3, num_pages=0, answered=False)], "no request waits for the probe"
    moving.mover.poll()
    moving.store.go.set()
    wait_until(lambda: moving.mover.breaker().value == "closed")
    assert moving.store.calls.count("probe") == 1
    assert moving.reports() == [PagesFetched(job_id=1, num_pages=0)]
    moving.start(StorePages, 3)
    assert moving.reports() == [PagesStored(job_id=4, num_pages=3)]
    assert moving.mover.totals()["storage_finds"] == 0, "a probe is not counted as a job"


def test_an_unreachable_store_opens_the_breaker_and_is_probed_until_it_answers(moving: Moving) -> None:
    def fail() -> int:
        raise StoreUnreachable("the master does not answer")

    moving.store.answer = fail
    moving.start(FindPages, 3)
    assert moving.reports() == [PagesFound(job_id=1, num_pages=0, answered=False)]
    assert moving.mover.breaker().value == "open"
    for number in (2, 3):
        moving.clock.advance(PAUSE_S)
        moving.mover.poll()
        wait_until(partial(lambda number: moving.mover.totals()["storage_unreachable_calls"] == number, number))
        assert moving.mover.breaker().value == "open"
    assert moving.mover.totals()["storage_raised_calls"] == 0, "no bug"
    moving.store.answer = None
    moving.clock.advance(PAUSE_S)
    moving.mover.poll()
    wait_until(lambda: moving.mover.breaker().value == "closed")


def test_a_store_that_hangs_for_good_occupies_only_its_own_threads(moving: Moving) -> None:
    moving.hang()
    for number in range(1, 3 * NUM_READERS):
        moving.clock.advance(PAUSE_S)
        moving.mover.poll()
        wait_until(partial(lambda number: len(moving.store.calls) >= min(number + 1, NUM_READERS), number))
        moving.clock.advance(DEADLINE_S + 1)
        moving.mover.poll()
    assert moving.store.calls == ["get"] + ["probe"] * (NUM_READERS - 1)
    assert moving.mover.num_quarantined_pages() == 3, "a probe has no pages"


def test_a_store_gets_no_more_threads_than_make_it_faster() -> None:
    started: list[str] = []

    def make(*, target: Callable[..., None], args: tuple[object, ...], name: str, daemon: bool) -> threading.Thread:
        started.append(name)
        return threading.Thread(target=target, args=args, daemon=daemon)

    threads = Threads(num_readers=4, num_writers=2, make=make)
    host = HostPool(4, PAGE_BYTES, pinned=False)
    mover = StoreMover(host, wakeup=lambda: None, clock=FakeClock(), deadline_s=1.0, threads=threads)
    for max_readers, max_writers, expected in ((None, None, 6), (3, None, 5), (1, 1, 2)):
        store = MemoryStore(StoreContext(namespace="n", page_bytes=PAGE_BYTES))
        store.max_readers, store.max_writers = max_readers, max_writers
        started.clear()
        mover.attach(store, store.stats())
        assert len(started) == expected
        assert mover.detach().wait(GIVE_UP_S)
    host.close()


def test_a_detached_store_is_closed_when_its_last_call_has_returned(moving: Moving) -> None:
    moving.store.go.clear()
    moving.start(FetchPages, 3)
    wait_until(lambda: moving.store.calls)
    for _ in range(2 * NUM_READERS):
        moving.start(FetchPages, 1)
    moving.mover.detach()
    other = ControlledStore()
    moving.mover.attach(other, other.stats())
    moving.start(StorePages, 3)
    assert not moving.store.closed
    assert moving.store.is_registered, "the hung call may still use the host memory"
    assert moving.mover.num_detached() == 1
    moving.store.go.set()
    assert len(moving.reports(2 * NUM_READERS + 2)) == 2 * NUM_READERS + 2
    wait_until(lambda: moving.mover.poll() == [] and moving.mover.num_detached() == 0)
    assert moving.store.closed
    assert not other.closed
    assert moving.mover.totals()["storage_reads"] >= 1, "the counts of the former store stay"


def test_a_closed_store_is_not_counted_as_detached_even_before_a_poll(moving: Moving) -> None:
    assert moving.mover.detach().wait(60)
    assert moving.mover.num_detached() == 0


def test_a_hung_call_does_not_delay_the_end_of_the_engine(moving: Moving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.store.mover.CLOSE_S", 0.1)
    moving.store.go.clear()
    moving.start(FetchPages, 3)
    wait_until(lambda: moving.store.calls)
    assert not moving.mover.close()
    moving.store.go.set()
    wait_until(lambda: moving.store.closed)


def test_fetched_pages_are_recorded_and_failed_ones_cleared_before_the_report(tmp_path: Path) -> None:
    def persistent() -> PersistentPages:
        return PersistentPages(tmp_path / "kept", namespace="n", num_pages=8, page_bytes=PAGE_BYTES)

    store = MemoryStore(StoreContext(namespace="n", page_bytes=PAGE_BYTES))
    pages = [bytes([number]) * PAGE_BYTES for number in range(3)]
    store.put([digest(n) for n in range(3)], [memoryview(page) for page in pages])
    kept = persistent()
    kept.record([5, 6, 7], [(digest(50), None), (digest(51), digest(50)), (digest(52), digest(51))])
    host = HostPool(8, PAGE_BYTES, pinned=False, persistent=kept)
    there_when_reported: list[list[tuple[int, bytes]]] = []

    def look_once() -> None:
        if not there_when_reported:
            there_when_reported.append(look())

    mover = StoreMover(
        host,
        wakeup=look_once,
        clock=FakeClock(),
        deadline_s=1.0,
    )

    def look() -> list[tuple[int, bytes]]:
        found = (kept._verified(slot) for slot in range(8))
        return [(page.slot, page.digest) for page in found if page is not None]

    mover.attach(store, store.stats())
    names = ((digest(0), None), (digest(1), digest(0)), (digest(2), digest(1)), (digest(3), digest(2)))
    mover.start(FetchPages(job_id=1, digests=tuple(digest(n) for n in range(4)), host_slots=(2, 3, 5, 6), names=names))
    give_up_s = time.monotonic() + GIVE_UP_S
    while not mover.poll():
        assert time.monotonic() < give_up_s
        time.sleep(0.001)
    assert mover.close()
    expected = [(2, digest(0)), (3, digest(1)), (5, digest(2)), (7, digest(52))]
    assert there_when_reported[0] == expected
    host.close()
    kept.close()
    assert [page.digest for page in persistent().restore()] == [digest(0), digest(1), digest(2)]


def test_store_statistics_are_those_of_its_last_call(moving: Moving) -> None:
    moving.store.stats = lambda: StoreStats(  # type: ignore[method-assign]
        stored_bytes=7, errors={"EIO": 2}, num_broken=3, num_refused=4, num_evicted=5
    )
    moving.start(FindPages, 1)
    moving.reports()
    totals = moving.mover.totals()
    assert [totals[f"storage_{name}_pages"] for name in ("broken", "refused", "evicted")] == [3, 4, 5]
    assert moving.mover.errors() == {"EIO": 2}
    assert moving.mover.stats() == moving.store.stats()
