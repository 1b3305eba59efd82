"""The tiers of one engine in bytes, without a model: the real cache, real pools with tiny pages, the real movers with
their threads removed or stepped by the test, and optionally a real folder to persist in and a store.

The right bytes of a page are derived from everything that the page was computed from, never from its digest
(`right_page`): a digest that names two different pages is found too.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from kvist.kv.cache import PageCache
from kvist.kv.keys import page_digests
from kvist.kv.lease import PageLease
from kvist.kv.tiers.host import HostTier
from kvist.kv.tiers.prefetch import Prefetch, PrefetchConfig
from kvist.kv.tiers.storage import StorageTier
from kvist.memory.host_pool import HostPool
from kvist.memory.page_copier import PageMover
from kvist.memory.persistence import PersistentPages
from kvist.plan.tiers import (
    BackUpPages,
    FetchPages,
    LoadPages,
    PagesBackedUp,
    PagesLoaded,
    StorageAttached,
    StoreJob,
    StorePages,
)
from kvist.testing.clocks import FakeClock
from kvist.testing.stepped_store import FaultyStore, SteppedStoreMover, in_fiber, pause

PAGE_SIZE = 2  # tokens
PAGE_BYTES = 32
NONSENSE = 0xEE


@functools.cache
def right_page(namespace: str, cache_salt: str, token_ids: tuple[int, ...]) -> bytes:
    """K/V of the last page of `token_ids`."""
    return hashlib.blake2b(repr((namespace, cache_salt, token_ids)).encode(), digest_size=PAGE_BYTES).digest()


class RightPages:
    """The right bytes of every digest that a test has used."""

    def __init__(self) -> None:
        self.by_digest: dict[bytes, bytes] = {}
        self.by_name: dict[tuple[str, bytes], bytes] = {}  # by namespace and digest

    def digests(self, namespace: str, cache_salt: str, token_ids: Sequence[int]) -> list[bytes]:
        digests = page_digests(token_ids, PAGE_SIZE, namespace, cache_salt)
        for page, digest in enumerate(digests):
            right = right_page(namespace, cache_salt, tuple(token_ids[: (page + 1) * PAGE_SIZE]))
            assert self.by_digest.setdefault(digest, right) == right, "one digest for two different pages"
            self.by_name[namespace, digest] = right
        return digests


class ManualCopyQueue:
    """The copy queue of mover.py without its thread: the test steps it page by page."""

    def __init__(self, _name: str, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], _clock: FakeClock) -> None:
        ((source, target),) = pieces
        self.num_jobs = 0
        self.num_bytes = self.seconds = 0.0
        self._source, self._target = source.numpy(), target.numpy()
        self._jobs: deque[tuple[Sequence[int], Sequence[int], Callable[[bool], None], Callable[[], None]]] = deque()
        self._num_copied: int | None = None  # pages of the first job; None: not begun
        self.afterwards: deque[Callable[[], None]] = deque()  # the thread's remaining work for a reported job

    def start(
        self,
        source_ids: Sequence[int],
        target_ids: Sequence[int],
        done: Callable[[bool], None],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._jobs.append((source_ids, target_ids, done, begin))

    def run(self, work: Callable[[], None]) -> None:
        """Queue `work` like a job without pages."""
        self.start((), (), lambda _ok: None, work)

    @property
    def busy(self) -> bool:
        return bool(self._jobs or self.afterwards)

    def step(self, *, fails: bool = False) -> None:
        if self.afterwards:
            self.afterwards.popleft()()
            return
        source_ids, target_ids, done, begin = self._jobs[0]
        if self._num_copied is None:
            begin()
            self._num_copied = 0
        elif fails:
            self._target[list(target_ids[self._num_copied :]), ::2] = NONSENSE  # torn
            self._end(done, ok=False)
        elif self._num_copied < len(source_ids):
            self._target[target_ids[self._num_copied]] = self._source[source_ids[self._num_copied]]
            self._num_copied += 1
        else:
            self._end(done, ok=True)

    def _end(self, done: Callable[[bool], None], *, ok: bool) -> None:
        self._jobs.popleft()
        self._num_copied = None
        done(ok)


class LateRecords:
    """A folder whose records are written late, as if the thread that writes them were not scheduled."""

    def __init__(self, real: PersistentPages, afterwards: deque[Callable[[], None]]) -> None:
        self.tensor = real.tensor
        self._real, self._afterwards = real, afterwards

    def clear(self, slots: Sequence[int]) -> None:
        pause()
        self._real.clear(slots)
        pause()

    def record(self, slots: Sequence[int], names: Sequence[tuple[bytes, bytes | None]]) -> None:
        write = functools.partial(self._real.record, slots, names)
        if in_fiber() is None:
            self._afterwards.append(write)
        else:
            pause()
            write()


class LateReports(deque[Any]):
    """Reports of backups, delayed behind the thread's earlier work."""

    def __init__(self, afterwards: deque[Callable[[], None]]) -> None:
        super().__init__()
        self._afterwards = afterwards

    def append(self, report: Any) -> None:
        if isinstance(report, PagesBackedUp):
            self._afterwards.append(functools.partial(super().append, report))
        else:
            super().append(report)


@dataclass(eq=False)
class Request:
    lease: PageLease
    cache_salt: str
    token_ids: tuple[int, ...]
    num_written: int  # tokens whose K/V the lease has
    load_id: int | None  # of the load under way


class ByteEngine:
    def __init__(
        self,
        right: RightPages,
        *,
        namespace: str = "model",
        num_pages: int = 8,
        num_host_pages: int = 16,
        policy: str = "write_through",
        folder: Path | None = None,
        store: FaultyStore | None = None,
    ) -> None:
        self.right, self.namespace = right, namespace
        self.clock = FakeClock()
        afterwards: deque[Callable[[], None]] = deque()
        self.device = torch.full((num_pages, PAGE_BYTES), NONSENSE, dtype=torch.uint8)
        self.tier = HostTier(num_host_pages)
        self.persistent: PersistentPages | None = None
        records: Any = None
        if folder is not None:
            self.persistent = PersistentPages(
                folder, namespace=namespace, num_pages=num_host_pages, page_bytes=PAGE_BYTES
            )
            self.tier.restore(self.persistent.restore())
            records = LateRecords(self.persistent, afterwards)
        self.host_pool = HostPool(num_host_pages, PAGE_BYTES, pinned=False, persistent=records)
        self.storage = StorageTier(self.tier, PrefetchConfig(threshold_tokens=PAGE_SIZE), page_size=PAGE_SIZE)
        self.cache = PageCache(
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            namespace=namespace,
            host=self.tier,
            write_policy=policy,
            storage=self.storage,
        )
        device: Any = SimpleNamespace(pieces=lambda: [(0, self.device)])
        with mock.patch("kvist.memory.page_copier._CopyQueue", ManualCopyQueue):
            self.mover = PageMover(device, self.host_pool, wakeup=lambda: None, clock=self.clock)
        mover: Any = self.mover
        self.loads: ManualCopyQueue = mover._loads
        self.backups: ManualCopyQueue = mover._backups
        self.backups.afterwards = afterwards
        self.mover._reports = LateReports(afterwards)
        self.requests: list[Request] = []
        self.under_way: dict[int, LoadPages | BackUpPages | FetchPages | StorePages] = {}  # by job id
        self.store_mover = SteppedStoreMover(self.host_pool, self.clock)
        self.fetching: list[tuple[Prefetch, tuple[int, ...], str]] = []  # requests that wait for the store
        if store is not None:
            self.attach(store)

    # ------------------------------------------------------------ the scheduler's part

    def submit(self, token_ids: tuple[int, ...], cache_salt: str = "") -> None:
        """Admit a request at once, or after its prefetch from the store."""
        prefetch = self.cache.prefetch(token_ids, cache_salt=cache_salt, max_tokens=len(token_ids))
        if prefetch is None:
            self.admit(token_ids, cache_salt)
        else:
            self.fetching.append((prefetch, token_ids, cache_salt))
            self.start_jobs()

    def finish_prefetch(self, prefetch: Prefetch, *, gives_up: bool = False, is_aborted: bool = False) -> None:
        """End the wait for a prefetch, done or given up; admit the request unless it was aborted."""
        (waiting,) = (each for each in self.fetching if each[0] is prefetch)
        self.fetching.remove(waiting)
        if gives_up:
            self.storage.give_up(prefetch)
        if not is_aborted:
            self.admit(waiting[1], waiting[2])
        self.storage.close(prefetch)
        self.start_jobs()

    def attach(self, store: FaultyStore) -> None:
        self.store_mover.attach(store)
        self.storage.on_event(StorageAttached(attached=True))

    def detach(self) -> None:
        self.store_mover.detach()
        self.storage.on_event(StorageAttached(attached=False))
        self.deliver_reports()

    def admit(self, token_ids: tuple[int, ...], cache_salt: str = "") -> Request | None:
        digests = self.right.digests(self.namespace, cache_salt, token_ids)
        lease = self.cache.open(token_ids, cache_salt=cache_salt, max_tokens=len(token_ids))
        num_found = len(lease.page_ids)
        assert lease.num_cached_tokens == num_found * PAGE_SIZE <= len(digests) * PAGE_SIZE
        if not self.cache.grow(lease, len(token_ids)):
            self.cache.close(lease)
            self.start_jobs()
            return None
        self.device[lease.page_ids[num_found:]] = NONSENSE
        load_id = self.cache.start_load(lease, token_ids, max_tokens=len(token_ids))
        request = Request(lease, cache_salt, token_ids, num_found * PAGE_SIZE, load_id)
        self.requests.append(request)
        self.start_jobs()
        return request

    def compute(self, request: Request, num_tokens: int) -> None:
        """Write K/V of the next tokens, up to the end of the lease's pages."""
        assert request.load_id is None
        first = request.num_written // PAGE_SIZE
        room = min(len(request.lease.page_ids) * PAGE_SIZE, len(request.token_ids))
        request.num_written = min(request.num_written + num_tokens, room)
        for page, right in enumerate(self.right_pages(request)):
            if page >= first:
                self.device[request.lease.page_ids[page]] = torch.frombuffer(bytearray(right), dtype=torch.uint8)
        self.cache.insert(request.lease, request.token_ids, request.num_written)
        self.start_jobs()

    def close(self, request: Request) -> None:
        self.requests.remove(request)
        self.cache.close(request.lease)

    def start_jobs(self) -> None:
        for job in self.cache.plan_jobs():
            if isinstance(job, LoadPages | BackUpPages | FetchPages | StorePages):
                self.under_way[job.job_id] = job
            if isinstance(job, StoreJob):
                self.store_mover.start(job)
            else:
                self.mover.start(job)

    def deliver_reports(self) -> None:
        """Pass the movers' reports to the cache."""
        for report in self.mover.poll():
            self.under_way.pop(report.job_id, None)
            if isinstance(report, PagesBackedUp):
                self.cache.backed_up(report)
            if not isinstance(report, PagesLoaded):
                continue
            (request,) = (each for each in self.requests if each.load_id == report.job_id)
            request.num_written = self.cache.loaded(report, request.token_ids)
            request.load_id = None
        for event in self.store_mover.poll():
            self.under_way.pop(event.job_id, None)
            self.storage.on_event(event)
        self.start_jobs()
        self.storage.start_queued()
        for prefetch in self.storage.take_settled():
            if any(each[0] is prefetch for each in self.fetching):
                self.finish_prefetch(prefetch)

    def settle(self) -> None:
        """Run all jobs to their end and deliver the reports."""
        self.deliver_reports()
        while self.loads.busy or self.backups.busy or self.store_mover.busy() or self.mover._reports:
            for copies in (self.loads, self.backups):
                if copies.busy:
                    copies.step()
            for fiber in self.store_mover.fibers:
                fiber.step()
            self.deliver_reports()

    def settle_store(self) -> None:
        """Run the store's jobs to their end and deliver the reports; copies to and from the device wait."""
        self.deliver_reports()
        while self.store_mover.busy():
            for fiber in self.store_mover.fibers:
                fiber.step()
            self.deliver_reports()

    def step_store_until_it_fetches(self) -> None:
        """Step until a call of the store is reading pages, or no job is left."""
        while self.store_mover.busy() and not self.store_mover.slots_under_call():
            for fiber in self.store_mover.fibers:
                fiber.step()
            self.deliver_reports()

    def answer(self, token_ids: tuple[int, ...], cache_salt: str = "") -> int:
        """Run a whole request; return how many of its tokens were cached."""
        request = self.admit(token_ids, cache_salt)
        while request is None:  # pages must be copied before they can be evicted
            assert self.backups.busy
            self.settle()
            request = self.admit(token_ids, cache_salt)
        self.settle()
        num_cached = request.num_written
        self.check_bytes()
        self.compute(request, len(token_ids))
        self.settle()
        self.check_bytes()
        self.close(request)
        return num_cached

    def evict_device(self) -> None:
        """Evict all unused pages from the device pool."""
        self.cache.evict(self.cache.counts().evictable)

    def kill(self) -> None:
        """Stop all threads where they are, and release the folder's lock as the system would."""
        self.requests = []
        self.store_mover.kill()
        self.host_pool.close()
        if self.persistent is not None:
            self.persistent.close()

    # ------------------------------------------------------------ the invariants

    def right_pages(self, request: Request) -> list[bytes]:
        written = request.token_ids[: request.num_written]
        digests = self.right.digests(self.namespace, request.cache_salt, written)
        return [self.right.by_digest[digest] for digest in digests]

    def check_bytes(self) -> None:
        device, host = self.device.numpy(), self.host_pool.tensor.numpy()
        for request in self.requests:
            for page_id, right in zip(request.lease.page_ids, self.right_pages(request), strict=False):
                assert device[page_id].tobytes() == right
        for node in self.cache._tree.nodes():
            assert device[node.page_id].tobytes() == self.right.by_digest[node.digest]
        for page in self.tier.pages():
            assert not page.resident or host[page.slot].tobytes() == self.right.by_digest[page.digest]

    def check_ledgers(self) -> None:
        pages, host = self.cache.counts(), self.tier.counts()
        assert pages.free + pages.cached + pages.owned + pages.in_flight == pages.total
        assert host.free + host.cached + host.in_flight == host.total
        cache = self.cache
        under_way = self.under_way.values()
        assert pages.in_flight == sum(len(job.page_ids) for job in under_way if isinstance(job, LoadPages))
        assert pages.cached == len([*cache._tree.nodes()])
        used = {page_id for request in self.requests for page_id in request.lease.page_ids}
        assert pages.free + pages.cached + pages.owned + pages.in_flight - pages.evictable >= len(used)
        storage = self.storage
        moving = {slot for job in under_way for slot in job.host_slots}
        kept = {prefetch.pinned.slot for prefetch in storage.open_prefetches if prefetch.pinned is not None}
        assert host.in_flight == len(moving | kept)
        slots = [page.slot for page in self.tier.pages()]
        assert len(slots) == len(set(slots)) == host.total - host.free, "each slot is free or has one page"
        num_fetching = sum(len(job.host_slots) for job in under_way if isinstance(job, FetchPages))
        num_kept = sum(prefetch.num_fetched for prefetch in storage.open_prefetches)
        assert storage.num_reserved == num_fetching + num_kept <= max(1, host.total // 2)
        assert storage.num_storing == sum(len(job.host_slots) for job in under_way if isinstance(job, StorePages))
        assert {prefetch for prefetch, _, _ in self.fetching} == set(storage.open_prefetches)
        assert self.store_mover.slots_under_call() <= moving, "a slot under a call of the store must be in flight"
