"""Decides for the storage tier (L3) which pages to fetch for waiting requests, and which host pages to store. Pure.

    begin ──► FindPages ──found──► (queued until the share has room) ──► FetchPages
              ──fetched──► resident in the host tier, pinned there for the request until `close`

A prefetch first looks up in the store all pages that are missing in the host tier, in prefix order, since a page enters
the host tier only after its parent. If a page is already being fetched for another request, the prefetch waits for that
fetch; no page is fetched twice. Fetched pages stay pinned until their request is admitted: otherwise waiting requests
would evict each other's pages. The share: pages being fetched, or pinned for a prefetch, take at most half of the host
tier.

prefetch.py has the states of a prefetch; store_queue.py decides which pages are stored. Every job gets exactly one
report; until then its slots are in flight. A hung job occupies its slots, and their part of the share, until it
returns. The scheduler decides how long a request waits; the store mover copies the bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvist.kv.tiers.host import HostPage, HostTier
from kvist.kv.tiers.prefetch import Fetch, Prefetch, PrefetchConfig, PrefetchState, PrefetchTrigger
from kvist.kv.tiers.store_queue import StoreQueue
from kvist.plan.plan import SeenInStore
from kvist.plan.tiers import (
    CancelFetch,
    FetchPages,
    FindPages,
    PagesFetched,
    PagesFound,
    PagesStored,
    StorageAttached,
    StoreJob,
)


@dataclass(slots=True, eq=False)
class PrefixStoring:
    """The full pages of one prompt on their way to the store. Mutable; its one owner is the `StorageTier`."""

    digests: list[bytes] = field(default_factory=list, repr=False)  # in prefix order
    num_stored: int = 0  # leading pages that are in the store


# Most pages in one fetch. Several threads then fetch a long prefix together, and the pages of a fetch that has ended go
# into the device pool while the others go on. A store that moves batches is near its full rate at 16 pages of 1 MiB.
FETCH_PAGES = 16
MAX_FINDS = 1024  # look-ups under way; a request beyond the limit is not looked up in the store


class StorageTier:
    """Mutable; its one owner is the scheduler's `PageCache`, which uses the same host tier. Without a store until
    `StorageAttached`."""

    def __init__(
        self, host: HostTier, config: PrefetchConfig, *, page_size: int, fetch_pages: int = FETCH_PAGES
    ) -> None:
        """`fetch_pages`: the most pages in one fetch."""
        self._host = host
        self._config = config
        self._page_size = page_size
        self._fetch_pages = fetch_pages
        self._min_pages = max(1, -(-config.threshold_tokens // page_size))
        self._max_reserved = max(1, host.num_pages // 2)
        self._attached = False
        self._store_queue = StoreQueue(host)
        self._finds: dict[int, Prefetch] = {}  # by job id
        self._fetches: dict[int, Fetch] = {}  # by job id
        self._fetching: dict[HostPage, Fetch] = {}
        self._queue: deque[Prefetch] = deque()  # QUEUED
        self._blocked_head: tuple[Prefetch, int] | None = None  # a head without room, and `_num_reserved` at that time
        self._open: dict[Prefetch, None] = {}  # not CLOSED, in the order of arrival
        self._num_reserved = 0  # pages being fetched, and pages fetched for an open prefetch
        self._jobs: list[StoreJob] = []
        self._settled: list[Prefetch] = []
        self._progressed: dict[Prefetch, None] = {}  # pages that they wait for have come
        self._seen: dict[bytes, bool] = {}  # digest → whether the store has the page, since the last `take_seen`
        self._num_found = self._num_missing = self._num_fetched = self._num_failed_fetches = 0

    # ---------------------------------------------------------------- the store's reports

    def on_event(self, event: PagesFound | PagesFetched | PagesStored | StorageAttached) -> None:
        match event:
            case PagesFound():
                self._on_found(event)
            case PagesFetched():
                self._on_fetched(event)
            case PagesStored():
                for page in self._store_queue.stored(event):
                    self._seen[page.digest] = True
            case StorageAttached():
                self._on_attached(event.attached)

    def _on_attached(self, attached: bool) -> None:
        """Start with a new store, whose content is unknown, or without a store: then all prefetches end."""
        self._attached = attached
        self._store_queue.on_store_changed()
        if not attached:
            for prefetch in [each for each in self._open if not each.is_done]:
                self.give_up(prefetch)
                self._settled.append(prefetch)

    def _on_found(self, event: PagesFound) -> None:
        prefetch = self._finds.pop(event.job_id)
        self._num_found += event.num_pages
        asked = prefetch.digests[prefetch.find_start :]
        self._seen.update(dict.fromkeys(asked[: event.num_pages], True))
        if event.answered:
            self._seen.update(dict.fromkeys(asked[event.num_pages : event.num_pages + 1], False))
            self._num_missing += prefetch.num_asked - event.num_pages
        if prefetch.state is not PrefetchState.FINDING:
            return  # the request has stopped waiting
        prefetch.find_end = prefetch.find_start + event.num_pages
        if self.may_fetch(prefetch.num_found_beyond_device, for_handoff=prefetch.for_handoff):
            prefetch.fire(PrefetchTrigger.FOUND)
            self._queue.append(prefetch)
        else:
            prefetch.fire(PrefetchTrigger.FOUND_TOO_FEW)
            self._settle_if_fetched(prefetch)

    def _on_fetched(self, event: PagesFetched) -> None:
        fetch = self._fetches.pop(event.job_id)
        owner, num_pages = fetch.owner, event.num_pages
        for index, page in enumerate(fetch.pages):
            del self._fetching[page]
            page.from_storage = index < num_pages
            page.stored = index < num_pages and fetch.generation == self._store_queue.generation
            self._host.written(page, ok=index < num_pages)
        self._num_fetched += num_pages
        if not fetch.is_cancelled:
            self._num_failed_fetches += len(fetch.pages) - num_pages
        self._num_reserved -= len(fetch.pages)
        if owner.state is not PrefetchState.CLOSED:
            self._num_reserved += num_pages
            owner.num_fetched += num_pages
            if owner.num_fetched:
                owner.keep_prefix(self._host)
        self._progressed |= dict.fromkeys(fetch.waiters)
        for prefetch in fetch.waiters:
            if prefetch.on_fetch_ended(fetch):
                self._settled.append(prefetch)

    def _settle_if_fetched(self, prefetch: Prefetch) -> None:
        if prefetch.fire_if_fetched():
            self._settled.append(prefetch)

    # ---------------------------------------------------------------- to the store

    def store(self, pages: Iterable[HostPage]) -> None:
        """Queue the resident pages of a path that are not known to be stored. `pages` are in prefix order."""
        if self._attached:
            self._store_queue.store(pages)

    @property
    def is_attached(self) -> bool:
        """Whether there is a store."""
        return self._attached

    def store_first(self, storing: PrefixStoring, digests: Sequence[bytes]) -> None:
        """Add pages to a prefix that is stored before all pages of the background. The caller copies them to the host
        tier, and must call `end_storing`."""
        storing.digests += digests
        self._store_queue.hurry(digests)
        self.store(page for page in map(self._host.get, digests) if page is not None)

    def is_settled(self, storing: PrefixStoring) -> bool:
        """Count the leading pages that are stored; return whether no further page is on its way to the store."""
        while storing.num_stored < len(storing.digests):
            page = self._host.get(storing.digests[storing.num_stored])
            if page is None or page.lost:
                return True
            if not page.resident or self._store_queue.has(page):
                return False
            if not page.stored:
                return True
            storing.num_stored += 1
        return True

    def end_storing(self, storing: PrefixStoring) -> None:
        """Stop waiting for the pages. The rest is stored in the background."""
        self._store_queue.stop_hurrying(storing.digests)

    # ---------------------------------------------------------------- from the store

    def may_fetch(self, num_pages: int, *, for_handoff: bool = False) -> bool:
        return self._attached and num_pages >= (1 if for_handoff else self._min_pages)

    def begin(self, digests: Sequence[bytes], num_cached: int, *, for_handoff: bool = False) -> Prefetch | None:
        """Start a prefetch of a request's pages, of which the first `num_cached` are in the device pool.

        Return None if there is nothing to wait for. The caller must `close` the prefetch."""
        host = self._host
        wait_s = self._config.wait_s((len(digests) - num_cached) * self._page_size, for_handoff=for_handoff)
        prefetch = Prefetch(digests=digests, num_cached=num_cached, wait_s=wait_s, for_handoff=for_handoff)
        known: list[HostPage] = []
        for digest in digests:
            page = host.get(digest)
            if page is None or page.lost:
                break
            known.append(page)
            self._join(prefetch, page)
        host.touch(known)
        prefetch.find_start = len(known)
        num_missing = len(digests) - max(len(known), num_cached)
        if self.may_fetch(num_missing, for_handoff=for_handoff) and len(self._finds) < MAX_FINDS:
            job_id = host.next_job_id()
            self._finds[job_id] = prefetch
            self._jobs.append(FindPages(job_id=job_id, digests=tuple(digests[len(known) :])))
        elif prefetch.fetches:
            prefetch.fire(PrefetchTrigger.FOUND_TOO_FEW)
        else:
            return None
        self._open[prefetch] = None
        return prefetch

    def give_up(self, prefetch: Prefetch) -> None:
        """Stop waiting, and cancel fetches that have not begun. Pages fetched so far stay pinned until `close`."""
        was_queued = prefetch.state is PrefetchState.QUEUED
        if not prefetch.fire(PrefetchTrigger.GIVEN_UP):
            return
        if was_queued:
            self._queue.remove(prefetch)
        for fetch in prefetch.fetches:
            fetch.waiters.remove(prefetch)
            if not fetch.waiters and not fetch.is_cancelled:
                fetch.is_cancelled = True
                self._jobs.append(CancelFetch(job_id=fetch.job_id))
        prefetch.fetches.clear()

    def close(self, prefetch: Prefetch) -> None:
        """Unpin the fetched pages: the request was admitted or has ended. Call once."""
        self.give_up(prefetch)
        was_open = prefetch.fire(PrefetchTrigger.CLOSED)
        assert was_open, "a prefetch is closed once"
        del self._open[prefetch]
        self._num_reserved -= prefetch.num_fetched
        prefetch.release_prefix(self._host)

    def start_queued(self) -> None:
        """Start queued fetches in order. The head waits until there is room for all its pages, or half of the share is
        free; only in the second case are not all of its pages fetched."""
        while self._queue:
            prefetch = self._queue[0]
            if self._blocked_head == (prefetch, self._num_reserved):
                return
            pages = map(self._host.get, prefetch.digests[: prefetch.find_end])
            num_wanted = sum(page is None or page.lost for page in pages)
            if self._num_reserved + min(num_wanted, -(-self._max_reserved // 2)) > self._max_reserved:
                self._blocked_head = prefetch, self._num_reserved
                return
            self._queue.popleft()
            prefetch.fire(PrefetchTrigger.STARTED)
            self._fetch(prefetch)
            self._settle_if_fetched(prefetch)

    def _fetch(self, prefetch: Prefetch) -> None:
        """Fetch the pages that are neither resident nor being fetched, until the share is full.

        Pages before `find_start` that were evicted since the look-up are fetched too."""
        parent: HostPage | None = None
        pages: list[HostPage] = []
        for digest in prefetch.digests[: prefetch.find_end]:
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
        for start in range(0, len(pages), self._fetch_pages):
            self._begin_fetch(prefetch, pages[start : start + self._fetch_pages])

    def _begin_fetch(self, prefetch: Prefetch, pages: list[HostPage]) -> None:
        fetch = Fetch(self._host.next_job_id(), pages, prefetch, [], self._store_queue.generation)
        prefetch.wait_for(fetch)
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
        if fetch is not None:
            prefetch.wait_for(fetch)

    # ---------------------------------------------------------------- jobs, settled prefetches, counts

    def take_settled(self) -> list[Prefetch]:
        """Return the prefetches that have become DONE since the last call. Some may be closed already."""
        settled, self._settled = self._settled, []
        return settled

    def take_progressed(self) -> list[Prefetch]:
        """Return the prefetches for which a fetch has ended since the last call. Some may be done, or closed."""
        progressed, self._progressed = self._progressed, {}
        return [*progressed]

    def take_seen(self) -> SeenInStore | None:
        """Return the pages that the store turned out to have or to lack since the last call, for routing."""
        if not self._seen:
            return None
        seen, self._seen = self._seen, {}
        found = tuple(digest for digest, is_there in seen.items() if is_there)
        return SeenInStore(found=found, missing=tuple(digest for digest, is_there in seen.items() if not is_there))

    def take_jobs(self) -> list[StoreJob]:
        jobs, self._jobs = self._jobs, []
        return [*jobs, *self._store_queue.take_jobs()]

    @property
    def open_prefetches(self) -> list[Prefetch]:
        return [*self._open]

    @property
    def num_reserved(self) -> int:
        """Host pages being fetched, and pages fetched for an open prefetch."""
        return self._num_reserved

    @property
    def num_storing(self) -> int:
        """Host pages in jobs that store them."""
        return self._store_queue.num_pages

    @property
    def num_due(self) -> int:
        """Host pages that wait to be stored."""
        return self._store_queue.num_due

    def totals(self) -> dict[str, float]:
        """Return the values of this tier's counters."""
        return {
            "storage_hit_pages": self._num_found,
            "storage_miss_pages": self._num_missing,
            "storage_fetched_pages": self._num_fetched,
            "storage_stored_pages": self._store_queue.num_stored,
            "storage_skipped_pages": self._store_queue.num_skipped,
            "storage_failed_pages": self._num_failed_fetches + self._store_queue.num_failed,
        }
