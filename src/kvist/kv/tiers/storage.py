"""The plan for the storage tier (L3): which host pages to store, and which pages to fetch for a waiting request. Pure.

    resident in the host tier, not known to be stored ──store──► (due, until a job may start) ──► StorePages ──stored──►
              marked `stored`
    begin ──► FindPages ──found──► (queued until the share of the host tier has room) ──► FetchPages ──fetched──►
              resident in the host tier, pinned there for the request until `close`

A prefetch first queries the store for the pages missing in the host tier, in prefix order: a page enters the host tier
only after the page it continues. A request waits for pages that are already being fetched for another; no page is
fetched twice. Fetched pages stay until their request is admitted: otherwise waiting requests would evict each other's
pages. Pages being fetched or kept take at most half of the host tier, and pages being stored at most a quarter, so that
a store cannot occupy all of it.

Every job gets exactly one report; until then its slots are in flight. A hung job occupies its slots, and their part of
the share, until it returns. The scheduler decides how long a request waits; the store mover copies the bytes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvist.kv.tiers.host import HostPage, HostTier
from kvist.plan.tiers import (
    PIECE_PAGES,
    CancelFetch,
    FetchPages,
    FindPages,
    PagesFetched,
    PagesFound,
    PagesStored,
    StorageAttached,
    StoreJob,
    StorePages,
)

PREFETCH_POLICIES = ("best_effort", "wait_complete", "timeout")
FETCH_PAGES = 16  # pages in one job: a request waits, and several threads share a longer prefix
MAX_FINDS = 1024  # look-ups under way; a request beyond the limit is not looked up in the store
MAX_STORES = 64  # jobs under way; further pages wait
MAX_PAGES_STORED = 2048  # in all these jobs together

STORAGE_COUNTERS = (
    "storage_hit_pages",
    "storage_miss_pages",  # that the store reported missing
    "storage_fetched_pages",
    "storage_stored_pages",
    "storage_skipped_pages",  # due to be stored, and evicted from the host tier before a job could start
    "storage_failed_pages",  # in fetches and stores that failed; pages of cancelled fetches do not count
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchConfig:
    """How long a request may wait for its pages from the store, and the smallest prefix worth fetching."""

    policy: str = "timeout"  # one of PREFETCH_POLICIES
    base_s: float = 1.0  # `timeout`: the longest wait is base_s + per_1k_s for each 1000 tokens
    per_1k_s: float = 0.25
    threshold_tokens: int = 256  # fewer tokens are computed rather than fetched

    def __post_init__(self) -> None:
        assert self.policy in PREFETCH_POLICIES

    def wait_s(self, num_tokens: int) -> float:
        """Return the longest wait for `num_tokens` tokens."""
        if self.policy == "timeout":
            return self.base_s + self.per_1k_s * num_tokens / 1000
        return 0.0 if self.policy == "best_effort" else math.inf


@dataclass(slots=True, eq=False, kw_only=True)
class Prefetch:
    """One request's prefetch from the store. Mutable; its one owner is the `StorageTier`: others only read it."""

    wait_s: float
    _digests: Sequence[bytes] = field(repr=False)  # of the prompt's pages, from the first
    _num_cached: int  # leading pages in the device pool, which need no fetch
    _find_start: int  # the store is asked for pages [_find_start, len(_digests))
    _find_end: int = 0  # the store has pages [_find_start, _find_end), by its answer
    _finding: bool = False
    _queued: bool = False
    _fetches: list[_Fetch] = field(default_factory=list)  # under way and waited for, including other requests' fetches
    _num_fetched: int = 0  # pages fetched for this request, which count in the share until `close`
    _num_resident: int = 0  # leading pages resident when `_pinned` was set
    _pinned: HostPage | None = None  # the last of the leading pages; the pin keeps the whole prefix
    _closed: bool = False

    @property
    def done(self) -> bool:
        """Whether nothing is left to wait for."""
        return not (self._finding or self._queued or self._fetches)


@dataclass(slots=True, eq=False)
class _Fetch:
    job_id: int
    pages: list[HostPage]
    owner: Prefetch  # the prefetch that started the job
    waiters: list[Prefetch]  # all prefetches that wait for the pages
    generation: int  # of the store
    cancelled: bool = False


class StorageTier:
    """The stores and prefetches under way. Mutable; its one owner is `PageCache`, which uses the same host tier.
    Detached until `attach`."""

    def __init__(self, host: HostTier, config: PrefetchConfig, *, page_size: int) -> None:
        self._host = host
        self._config = config
        self._page_size = page_size
        self._min_pages = max(1, -(-config.threshold_tokens // page_size))
        self._max_reserved = max(1, host.num_pages // 2)
        self._max_stored = min(MAX_PAGES_STORED, max(1, host.num_pages // 4))
        self._attached = False
        self._generation = 0  # +1 with each attach or detach: knowledge about one store is not valid for the next
        self._finds: dict[int, Prefetch] = {}  # by job id
        self._fetches: dict[int, _Fetch] = {}  # by job id
        self._stores: dict[int, tuple[int, list[HostPage]]] = {}  # by job id, with the generation of their start
        self._due: dict[HostPage, None] = {}  # to be stored, oldest first; some may have been evicted since
        self._fetching: dict[HostPage, _Fetch] = {}
        self._queue: deque[Prefetch] = deque()  # found in the store, waiting for room in the share
        self._blocked_head: tuple[Prefetch, int] | None = None  # a head that found no room, and `_num_reserved` then
        self._open: dict[Prefetch, None] = {}  # in the order of arrival
        self._num_reserved = 0  # pages being fetched, and pages fetched for an open prefetch
        self._num_stored = 0  # in `_stores`
        self._jobs: list[StoreJob] = []
        self._done: list[Prefetch] = []
        self.totals: dict[str, float] = dict.fromkeys(STORAGE_COUNTERS, 0)

    def on_event(self, event: PagesFound | PagesFetched | PagesStored | StorageAttached) -> None:
        match event:
            case PagesFound():
                self.found(event)
            case PagesFetched():
                self.fetched(event)
            case PagesStored():
                self.stored(event)
            case StorageAttached():
                self.attach(event.attached)

    def attach(self, attached: bool) -> None:
        """Switch to a new store, with unknown content, or to none (`attached` is False), which ends all prefetches."""
        self._attached = attached
        self._generation += 1
        self._due.clear()
        self._host.forget_stored()
        if not attached:
            for prefetch in [each for each in self._open if not each.done]:
                self.give_up(prefetch)
                self._done.append(prefetch)

    # ---------------------------------------------------------------- to the store

    def store(self, pages: Iterable[HostPage]) -> None:
        """Store the pages of a path, in prefix order, that are resident and not known to be stored."""
        if not self._attached:
            return
        self._due.update(dict.fromkeys(page for page in pages if page.resident and not page.stored))
        while len(self._due) > self._host.num_pages:  # some of them were evicted
            del self._due[next(iter(self._due))]
            self.totals["storage_skipped_pages"] += 1
        self._begin_stores()

    def _begin_stores(self) -> None:
        while self._num_stored < self._max_stored and len(self._stores) < MAX_STORES:
            piece = self._next_due(min(PIECE_PAGES, self._max_stored - self._num_stored))
            if not piece:
                return
            self._num_stored += len(piece)
            for page in piece:
                page.stored = True  # until a failure is reported: no second job stores the page
                self._host.pin(page)
            job_id = self._host.next_job_id()
            self._stores[job_id] = self._generation, piece
            self._jobs.append(
                StorePages(
                    job_id=job_id,
                    digests=tuple(page.digest for page in piece),
                    host_slots=tuple(page.slot for page in piece),
                )
            )

    def _next_due(self, num_pages: int) -> list[HostPage]:
        piece: list[HostPage] = []
        while self._due and len(piece) < num_pages:
            page = next(iter(self._due))
            del self._due[page]
            if self._host.get(page.digest) is page:
                piece.append(page)
            else:
                self.totals["storage_skipped_pages"] += 1
        return piece

    def stored(self, event: PagesStored) -> None:
        generation, pages = self._stores.pop(event.job_id)
        self._num_stored -= len(pages)
        for index, page in enumerate(pages):
            self._host.unpin(page)
            if index >= event.num_pages and generation == self._generation:
                page.stored = False
        self.totals["storage_stored_pages"] += event.num_pages
        self.totals["storage_failed_pages"] += len(pages) - event.num_pages
        self._begin_stores()

    # ---------------------------------------------------------------- from the store

    def may_fetch(self, num_pages: int) -> bool:
        return self._attached and num_pages >= self._min_pages

    def begin(self, digests: Sequence[bytes], num_cached: int) -> Prefetch | None:
        """Start a prefetch of a request's pages, of which the first `num_cached` are in the device pool.

        Return None if there is nothing to wait for. The caller must `close` the prefetch."""
        host = self._host
        prefetch = Prefetch(wait_s=0.0, _digests=digests, _num_cached=num_cached, _find_start=0)
        known: list[HostPage] = []
        for digest in digests:
            page = host.get(digest)
            if page is None or page.lost:
                break
            known.append(page)
            self._join(prefetch, page)
        host.touch(known)
        prefetch._find_start = len(known)
        num_more = len(digests) - max(len(known), num_cached)
        if self.may_fetch(num_more) and len(self._finds) < MAX_FINDS:
            prefetch._finding = True
            job_id = host.next_job_id()
            self._finds[job_id] = prefetch
            self._jobs.append(FindPages(job_id=job_id, digests=tuple(digests[len(known) :])))
        if prefetch.done:
            return None
        prefetch.wait_s = self._config.wait_s((len(digests) - num_cached) * self._page_size)
        self._open[prefetch] = None
        return prefetch

    def found(self, event: PagesFound) -> None:
        prefetch = self._finds.pop(event.job_id)
        self.totals["storage_hit_pages"] += event.num_pages
        if event.answered:
            self.totals["storage_miss_pages"] += len(prefetch._digests) - prefetch._find_start - event.num_pages
        if not prefetch._finding:
            return  # the request does not wait any more
        prefetch._finding = False
        prefetch._find_end = prefetch._find_start + event.num_pages
        if self.may_fetch(prefetch._find_end - max(prefetch._find_start, prefetch._num_cached)):
            prefetch._queued = True
            self._queue.append(prefetch)
        elif prefetch.done:
            self._done.append(prefetch)

    def fetched(self, event: PagesFetched) -> None:
        fetch = self._fetches.pop(event.job_id)
        owner, num_pages = fetch.owner, event.num_pages
        for index, page in enumerate(fetch.pages):
            del self._fetching[page]
            page.from_storage = index < num_pages
            page.stored = index < num_pages and fetch.generation == self._generation
            self._host.written(page, ok=index < num_pages)
        self.totals["storage_fetched_pages"] += num_pages
        if not fetch.cancelled:
            self.totals["storage_failed_pages"] += len(fetch.pages) - num_pages
        if owner._closed:
            self._num_reserved -= len(fetch.pages)
        else:
            self._num_reserved -= len(fetch.pages) - num_pages
            owner._num_fetched += num_pages
            self._pin_prefix(owner)
        for prefetch in fetch.waiters:
            prefetch._fetches.remove(fetch)
            if prefetch.done:
                self._done.append(prefetch)

    def give_up(self, prefetch: Prefetch) -> None:
        """Stop waiting: cancel fetches that have not begun. Pages fetched so far stay until `close`."""
        prefetch._finding = False
        if prefetch._queued:
            prefetch._queued = False
            self._queue.remove(prefetch)
        for fetch in prefetch._fetches:
            fetch.waiters.remove(prefetch)
            if not fetch.waiters and not fetch.cancelled:
                fetch.cancelled = True
                self._jobs.append(CancelFetch(job_id=fetch.job_id))
        prefetch._fetches.clear()

    def close(self, prefetch: Prefetch) -> None:
        """Release the fetched pages: the request was admitted, or ended. Call once."""
        assert not prefetch._closed
        self.give_up(prefetch)
        del self._open[prefetch]
        prefetch._closed = True
        self._num_reserved -= prefetch._num_fetched
        if prefetch._pinned is not None:
            self._host.unpin(prefetch._pinned)

    def take_settled(self) -> list[Prefetch]:
        """Return the prefetches that have nothing left to wait for since the last call, each once. Some may be closed
        already."""
        done, self._done = self._done, []
        return done

    def take_jobs(self) -> list[StoreJob]:
        jobs, self._jobs = self._jobs, []
        return jobs

    def start_queued(self) -> None:
        """Start queued fetches in order. The head waits until the share has room for all its pages or for half of the
        share; only in the second case does it get fewer pages than it wants."""
        while self._queue:
            prefetch = self._queue[0]
            if self._blocked_head == (prefetch, self._num_reserved):
                return
            pages = map(self._host.get, prefetch._digests[: prefetch._find_end])
            num_wanted = sum(page is None or page.lost for page in pages)
            if self._num_reserved + min(num_wanted, -(-self._max_reserved // 2)) > self._max_reserved:
                self._blocked_head = prefetch, self._num_reserved
                return
            self._queue.popleft()
            prefetch._queued = False
            self._fetch(prefetch)
            if prefetch.done:
                self._done.append(prefetch)

    def _fetch(self, prefetch: Prefetch) -> None:
        """Fetch the pages that are neither resident nor being fetched, up to the room in the share.

        Pages before `_find_start` that were evicted since the look-up are fetched too."""
        parent: HostPage | None = None
        pages: list[HostPage] = []
        for digest in prefetch._digests[: prefetch._find_end]:
            page = self._host.get(digest)
            if page is None or page.lost:
                has_room = self._num_reserved + len(pages) < self._max_reserved
                page = self._host.reserve(parent, digest) if has_room else None
                if page is None:
                    break
                pages.append(page)
            else:
                self._join(prefetch, page)
            parent = page
        self._num_reserved += len(pages)
        for start in range(0, len(pages), FETCH_PAGES):
            self._begin_fetch(prefetch, pages[start : start + FETCH_PAGES])

    def _begin_fetch(self, prefetch: Prefetch, pages: list[HostPage]) -> None:
        fetch = _Fetch(self._host.next_job_id(), pages, prefetch, [prefetch], self._generation)
        prefetch._fetches.append(fetch)
        self._fetches[fetch.job_id] = fetch
        self._fetching.update(dict.fromkeys(pages, fetch))
        self._jobs.append(
            FetchPages(
                job_id=fetch.job_id,
                digests=tuple(page.digest for page in pages),
                host_slots=tuple(page.slot for page in pages),
                names=tuple(page.name for page in pages),
            )
        )

    def _join(self, prefetch: Prefetch, page: HostPage) -> None:
        fetch = self._fetching.get(page)
        if fetch is not None and prefetch not in fetch.waiters:
            fetch.waiters.append(prefetch)
            prefetch._fetches.append(fetch)

    def _pin_prefix(self, prefetch: Prefetch) -> None:
        """Pin the last of the leading resident pages: this keeps the prefix, since children are evicted first."""
        if not prefetch._num_fetched:
            return
        last = prefetch._pinned
        while prefetch._num_resident < len(prefetch._digests):
            page = self._host.get(prefetch._digests[prefetch._num_resident])
            if page is None or not page.resident:
                break
            last = page
            prefetch._num_resident += 1
        if last is not None and last is not prefetch._pinned:
            self._host.pin(last)
            if prefetch._pinned is not None:
                self._host.unpin(prefetch._pinned)
            prefetch._pinned = last
