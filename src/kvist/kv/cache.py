"""The page cache: allocation and prefix sharing for a scheduler, from the ledger (pages.py) and the tree (radix.py).

The life of a request's pages: `open` pins the longest cached prefix; `grow` allocates pages, evicting unused cached
pages when too few are free; `insert` reports how much K/V is written, and full pages enter the tree for other requests
to match; `close` releases everything. While a peer may touch pages, `begin_transfer` … `end_transfer` keep the pages
IN_FLIGHT.

With a host tier (kv/tiers/host.py) a page may also be in host memory:

    insert (or a hit) ──due by the write policy──► BackUpPages ──backed_up──► resident in the host tier
    open ─ grow ─ start_load: pages after the match, resident in the host tier ──► LoadPages ──loaded──► insert

With `write_back` a page is due when it is about to be evicted. The cache then pins the path to that page and copies the
pages that the host tier lacks. After the copy the pages are prepared: they are evicted first, without a further wait.
Copies start when less than an eighth of the pool is free or prepared, so that `grow` seldom waits for a copy. A page
that cannot be copied (no free host slot, or the copy failed) counts as prepared too, and is lost on eviction: no
request waits for the same page twice.

With a storage tier (tiers/storage.py) resident host pages are also stored, and `prefetch`, called before `open`,
fetches pages from the store into the host tier. `start_load` then loads them like all other host pages.

Pages under a backup cannot be freed: the lease that inserted the pages keeps its pin until the backup is reported, even
if the lease is closed. Pages under a load are IN_FLIGHT. Eviction from the device pool leaves the host tier's copy, and
eviction from the host tier leaves the device pool's.

The cache copies no bytes, keeps no tokens and knows no requests. An inserted page is never written again; the page
being filled always belongs to its lease alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvist.kv.ceiling import EvictionHistory
from kvist.kv.keys import iter_page_digests, iter_page_keys, page_keys, root_digest
from kvist.kv.lease import PageLease
from kvist.kv.pages import PageCounts, PageLedger, PageState
from kvist.kv.radix import OwnershipChange, PageNode, RadixTree, Root
from kvist.kv.tiers.host import HostCounts, HostPage, HostTier
from kvist.kv.tiers.storage import STORAGE_COUNTERS, Prefetch, StorageTier
from kvist.plan.tiers import (
    BackUpPages,
    ForgetPages,
    LoadPages,
    PagesBackedUp,
    PagesFetched,
    PagesFound,
    PagesLoaded,
    PagesStored,
    StorageAttached,
    TierJob,
)

# Hits after which a page is due for a backup; None: due on eviction.
WRITE_POLICIES: dict[str, int | None] = {"write_through": 0, "write_through_selective": 2, "write_back": None}
MAX_BACKUPS = 64  # jobs under way; pages that become due while all are under way are skipped
MAX_PAGES_BACKED_UP = 2048  # in all backups under way; with write_back, the last job may exceed it
LOW_WATER_SHARE = 8  # write_back: copies start when fewer than 1 page in LOW_WATER_SHARE is free or prepared

# Counters of the tiers and of the ceiling, the hits of an infinite cache (ceiling.py): in pages, never decreasing.
TIER_COUNTERS = (
    "device_hit_pages",
    "device_miss_pages",
    "device_evicted_pages",
    "host_hit_pages",
    "host_miss_pages",
    "host_evicted_pages",
    "host_loaded_pages",
    "host_backed_up_pages",
    "host_skipped_pages",  # due for a backup and skipped: too many under way, or no free slot
    "host_failed_pages",  # in loads and backups that failed
    *STORAGE_COUNTERS,
    "ceiling_remembered_pages",  # evicted from the device pool and remembered; each once, unless forgotten since
    "ceiling_forgotten_pages",  # remembered pages that were forgotten; above 0 the ceiling is a lower bound
)


class PageCache:
    """One engine's pages. Mutable; its one owner is the scheduler. Every call is synchronous and reads no clock."""

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        namespace: str,
        host: HostTier | None = None,
        write_policy: str = "write_through",
        storage: StorageTier | None = None,  # over the same host tier
    ) -> None:
        assert num_pages > 0
        assert page_size > 0
        self._page_size = page_size
        self._ledger = PageLedger(num_pages)
        self._tree = RadixTree(namespace)
        self._namespace = namespace
        self._host = host
        self._storage = storage
        self._history = EvictionHistory()
        self._hits_to_back_up = WRITE_POLICIES[write_policy]
        self._loads: dict[int, tuple[PageLease, list[HostPage]]] = {}  # under way, by job id
        self._loading: dict[HostPage, int] = {}  # the pages of `_loads`, with their job ids
        self._backups: dict[int, tuple[PageLease, list[HostPage]]] = {}  # under way, by job id
        self._num_pages_backed_up = 0  # in `_backups`
        self._num_pinned_for_backup = 0  # pages that only write_back's own leases pin
        self._low_water = num_pages // LOW_WATER_SHARE + 1
        self._jobs: list[TierJob] = []  # since the last `drain_jobs`
        self._num_tiers: dict[bytes, int] = {}  # tiers that hold the page, as of the last drain; with a host tier only
        self._totals: dict[str, float] = dict.fromkeys(TIER_COUNTERS, 0)

    @property
    def page_size(self) -> int:
        return self._page_size

    @property
    def num_pages(self) -> int:
        return self._ledger.num_pages

    def open(self, token_ids: Sequence[int], *, cache_salt: str = "", max_tokens: int) -> PageLease:
        """Pin the longest cached prefix of `token_ids`: whole pages, at most `max_tokens` tokens.

        A caller that must compute at least the last token passes `len(token_ids) - 1`.
        """
        num_pages = min(len(token_ids), max_tokens) // self._page_size
        pin = self._tree.pin(iter_page_keys(token_ids, self._page_size, num_pages), cache_salt)
        return PageLease(page_ids=pin.page_ids, num_cached_tokens=pin.num_pages * self._page_size, _pin=pin)

    def grow(self, lease: PageLease, num_tokens: int) -> bool:
        """Make `lease.page_ids` cover `num_tokens`, evicting pages if too few are free.

        Return False, with no page allocated, if too few pages are free or evictable; with `write_back` also while the
        pages to evict are being copied.
        """
        num_pages = -(-num_tokens // self._page_size) - len(lease.page_ids)
        if num_pages <= 0:
            return True
        assert not lease._closed
        num_short = num_pages - self._ledger.num_free
        if num_short > 0:
            if num_short > self._tree.num_evictable or not self._make_evictable(num_short):
                return False
            self._evict(num_short)
        lease.page_ids.extend(self._ledger.allocate(num_pages))
        return True

    @property
    def num_reclaimable(self) -> int:
        """Return the pages that are free or evictable, including (`write_back`) pages evictable after their copies."""
        return self._ledger.num_free + self._tree.num_evictable + self._num_pinned_for_backup

    def waits_for_copies(self, lease: PageLease, num_tokens: int) -> bool:
        """Return whether `grow` can succeed after the copies under way, if no other request takes the pages first."""
        return -(-num_tokens // self._page_size) - len(lease.page_ids) <= self.num_reclaimable

    def insert(self, lease: PageLease, token_ids: Sequence[int], num_tokens: int) -> None:
        """Enter the full pages of `token_ids[:num_tokens]`, whose K/V is written, into the tree, pinned by this lease.

        Later calls pass more tokens; the lease remembers which pages are in the tree. If another request already uses
        a page with the same tokens, this lease keeps its own page. The pages must not be in flight.
        """
        first, last = lease._pin.num_pages, num_tokens // self._page_size
        if last <= first:  # most calls: no page became full
            return
        assert not lease._closed
        assert num_tokens <= len(token_ids), "inserted beyond the tokens"
        assert last <= len(lease.page_ids), "inserted beyond the pages"
        assert not lease._in_flight, "end the transfer before the pages are shared"
        keys = page_keys(token_ids, self._page_size, first, last)
        self._apply(self._tree.extend(lease._pin, keys, lease.page_ids[first:last]))
        if self._host is not None and self._hits_to_back_up == 0:
            self._back_up(lease, self._tree.tail(lease._pin, last - first))

    def close(self, lease: PageLease) -> None:
        """Unpin the lease's shared pages and free its own pages. Call once, with no page in flight.

        Shared pages stay pinned until the backups of this lease are reported."""
        assert not lease._closed, "a lease is closed once"
        assert not lease._in_flight, "a peer may still touch these pages: end the transfer first"
        lease._closed = True
        self._ledger.move(lease.page_ids[lease._pin.num_pages :], PageState.OWNED, PageState.FREE)
        lease.page_ids = []  # a new list: a plan may still hold the old one
        if not lease._num_backups:
            self._unpin(lease)

    def _unpin(self, lease: PageLease) -> None:
        self._apply(self._tree.unpin(lease._pin, prepared=lease._num_pinned_for_backup is not None))
        self._num_pinned_for_backup -= lease._num_pinned_for_backup or 0
        self._ledger.move([*lease._pin.duplicates.values()], PageState.OWNED, PageState.FREE)

    def begin_transfer(self, lease: PageLease, first_page: int) -> None:
        """Let a peer touch `lease.page_ids[first_page:]`: pages that are not in the tree become IN_FLIGHT.

        Pages in the tree stay CACHED: their content is final, and the lease pins them until it closes.
        """
        assert not lease._closed
        in_flight = set(lease._in_flight)
        not_in_tree = lease.page_ids[max(first_page, lease._pin.num_pages) :]
        page_ids = [page_id for page_id in not_in_tree if page_id not in in_flight]
        self._ledger.move(page_ids, PageState.OWNED, PageState.IN_FLIGHT)
        lease._in_flight.extend(page_ids)

    def end_transfer(self, lease: PageLease) -> None:
        """Return the lease's pages in flight to OWNED: no peer touches the pages any more."""
        self._ledger.move(lease._in_flight, PageState.IN_FLIGHT, PageState.OWNED)
        lease._in_flight = []

    # ---------------------------------------------------------------- the host tier

    def start_load(self, lease: PageLease, token_ids: Sequence[int], *, max_tokens: int) -> int | None:
        """Count the lease's hits and their ceiling, and start to load the pages that the host tier has after them.

        Called once, when the lease covers at least `max_tokens` tokens and its request is admitted. Return the id of
        the load, or None if the host tier has no further page. With a load, do not use the lease before `loaded`."""
        pin, host, totals = lease._pin, self._host, self._totals
        first, last = pin.num_pages, min(len(token_ids), max_tokens) // self._page_size
        totals["device_hit_pages"] += first
        totals["device_miss_pages"] += last - first
        if host is None:
            self._measure_ceiling(lease, pin.node.digest, token_ids, first, last)
            return None
        nodes = self._tree.tail(pin, first)
        for node in nodes:
            node.num_hits += 1
        if self._hits_to_back_up is not None:
            self._back_up(lease, nodes)
        found = host.match(self._digests_after(pin.node.digest, token_ids, first, last))
        totals["host_hit_pages"] += len(found)
        totals["host_miss_pages"] += last - first - len(found)
        digest = found[-1].digest if found else pin.node.digest
        self._measure_ceiling(lease, digest, token_ids, first + len(found), last)
        path = [*filter(None, (host.get(node.digest) for node in nodes)), *found]
        host.touch(path)
        if self._storage is not None:
            self._storage.store(path)
        if not found:
            return None
        page_ids = lease.page_ids[first : first + len(found)]
        self._ledger.move(page_ids, PageState.OWNED, PageState.IN_FLIGHT)
        lease._in_flight.extend(page_ids)
        lease.num_fetched_tokens = sum(page.from_storage for page in found) * self._page_size
        lease.num_loaded_tokens = len(found) * self._page_size - lease.num_fetched_tokens
        job_id = host.next_job_id()
        for page in found:
            host.pin(page)
            page.from_storage = False
            self._loading[page] = job_id
        self._loads[job_id] = lease, found
        self._jobs.append(
            LoadPages(job_id=job_id, host_slots=tuple(page.slot for page in found), page_ids=tuple(page_ids))
        )
        return job_id

    def pending_load(self, lease: PageLease, token_ids: Sequence[int], *, max_tokens: int) -> int | None:
        """Return the id of another lease's load of this lease's next page, if any: after `loaded` the tree has it."""
        first = lease._pin.num_pages
        if not self._loads or (first + 1) * self._page_size > min(len(token_ids), max_tokens):
            return None
        assert self._host is not None
        page = self._host.get(next(self._digests_after(lease._pin.node.digest, token_ids, first, first + 1)))
        return None if page is None else self._loading.get(page)

    def loaded(self, event: PagesLoaded, token_ids: Sequence[int]) -> int:
        """End a load that `start_load` began; return the number of tokens whose K/V the lease has now."""
        lease, found = self._loads.pop(event.job_id)
        assert self._host is not None
        for page in found:
            self._host.unpin(page)
            self._loading.pop(page, None)
        self.end_transfer(lease)
        self._totals["host_loaded_pages" if event.ok else "host_failed_pages"] += len(found)
        if event.ok:
            self.insert(lease, token_ids, (lease._pin.num_pages + len(found)) * self._page_size)
        return lease._pin.num_pages * self._page_size

    def backed_up(self, event: PagesBackedUp) -> None:
        lease, pages = self._backups.pop(event.job_id)
        assert self._host is not None
        for page in pages:
            self._host.written(page, ok=event.ok)
        if event.ok and self._storage is not None:
            self._storage.store(pages)
        self._totals["host_backed_up_pages" if event.ok else "host_failed_pages"] += len(pages)
        self._num_pages_backed_up -= len(pages)
        lease._num_backups -= 1
        if lease._closed and not lease._num_backups:
            self._unpin(lease)

    def drain_jobs(self) -> list[TierJob]:
        """Return the jobs for the movers since the last call. With write_back, first start the copies that are due."""
        self._make_evictable(self._low_water - self._ledger.num_free)
        jobs, self._jobs = self._jobs, []
        return jobs if self._storage is None else [*jobs, *self._storage.drain_jobs()]

    def host_counts(self) -> HostCounts | None:
        return None if self._host is None else self._host.counts()

    def totals(self) -> dict[str, float]:
        """Return the values of TIER_COUNTERS."""
        num_evicted = 0 if self._host is None else self._host.num_evicted
        return {
            **self._totals,
            **({} if self._storage is None else self._storage.totals),
            "host_evicted_pages": num_evicted,
            "ceiling_remembered_pages": self._history.num_remembered,
            "ceiling_forgotten_pages": self._history.num_forgotten,
        }

    def _make_evictable(self, num_pages: int) -> bool:
        """Return whether `num_pages` can be evicted now. With write_back, start the missing copies first."""
        tree, host = self._tree, self._host
        if host is None or self._hits_to_back_up is not None:
            return num_pages <= tree.num_evictable
        while tree.num_prepared + self._num_pinned_for_backup < num_pages and (node := tree.oldest_idle()) is not None:
            known = host.get(node.digest)
            if known is not None and known.resident:
                tree.mark_prepared(node)
            elif len(self._backups) < MAX_BACKUPS and self._num_pages_backed_up < MAX_PAGES_BACKED_UP:
                self._write_back(node)
            else:
                break
        return num_pages <= tree.num_prepared

    def _write_back(self, leaf: PageNode) -> None:
        """Copy the pages of the path that the host tier lacks, head first: the host holds whole prefixes only."""
        pin, num_pinned = self._tree.pin_path(leaf)
        lease = PageLease(page_ids=[], num_cached_tokens=0, _pin=pin, _closed=True, _num_pinned_for_backup=num_pinned)
        self._num_pinned_for_backup += num_pinned
        nodes = self._tree.tail(pin, pin.num_pages)
        for node in nodes:
            node.num_hits = 0
        self._back_up(lease, nodes)
        if not lease._num_backups:  # no free host slot
            self._unpin(lease)

    def _back_up(self, lease: PageLease, nodes: list[PageNode]) -> None:
        """Back up the path's `nodes` that are due and not in the host tier, in prefix order. After the first skipped
        page all others are skipped too, since no match would reach them."""
        host, pages, page_ids = self._host, list[HostPage](), list[int]()
        assert host is not None
        for index, node in enumerate(nodes):
            known = host.get(node.digest)
            if known is not None and not known.lost:
                continue
            if node.num_hits < (self._hits_to_back_up or 0) or node in lease._pin.duplicates:
                break  # a duplicate: this lease's pin does not keep the page in the tree
            parent = None if isinstance(node.parent, Root) else host.get(node.parent.digest)
            may_begin = lease._num_pinned_for_backup is not None or (
                len(self._backups) < MAX_BACKUPS and self._num_pages_backed_up + len(pages) < MAX_PAGES_BACKED_UP
            )
            has_parent = parent is not None or isinstance(node.parent, Root)
            page = host.reserve(parent, node.digest) if may_begin and has_parent else None
            if page is None:
                self._totals["host_skipped_pages"] += len(nodes) - index
                break
            pages.append(page)
            page_ids.append(node.page_id)
        if not pages:
            return
        job_id = host.next_job_id()
        self._backups[job_id] = lease, pages
        self._num_pages_backed_up += len(pages)
        lease._num_backups += 1
        self._jobs.append(
            BackUpPages(
                job_id=job_id,
                page_ids=tuple(page_ids),
                host_slots=tuple(page.slot for page in pages),
                names=tuple(page.name for page in pages),
            )
        )

    def _measure_ceiling(
        self, lease: PageLease, digest: bytes, token_ids: Sequence[int], num_found: int, last: int
    ) -> None:
        """Set `lease.num_ceiling_tokens`: the `num_found` pages found in the tiers, the last with `digest`, and the
        evicted pages that continue them."""
        num_more = self._history.num_leading(self._digests_after(digest, token_ids, num_found, last))
        lease.num_ceiling_tokens = (num_found + num_more) * self._page_size

    def _digests_after(self, digest: bytes, token_ids: Sequence[int], first: int, last: int) -> Iterator[bytes]:
        return iter_page_digests(digest, token_ids, self._page_size, last, first)

    # ---------------------------------------------------------------- the storage tier

    def prefetch(self, token_ids: Sequence[int], *, cache_salt: str = "", max_tokens: int) -> Prefetch | None:
        """Ask the store for the pages that neither tier has. Return None if there is nothing to wait for.

        The caller closes the prefetch when the request is admitted (after `start_load`) or ends."""
        num_pages = min(len(token_ids), max_tokens) // self._page_size
        if self._storage is None or not self._storage.may_fetch(num_pages):
            return None
        cached = self._tree.match(iter_page_keys(token_ids, self._page_size, num_pages), cache_salt)
        if not self._storage.may_fetch(num_pages - len(cached)):
            return None
        last = cached[-1].digest if cached else root_digest(self._namespace, cache_salt)
        digests = [node.digest for node in cached]
        digests += self._digests_after(last, token_ids, len(cached), num_pages)
        return self._storage.begin(digests, len(cached))

    def give_up_prefetch(self, prefetch: Prefetch) -> None:
        """Stop waiting for a prefetch. Pages fetched so far stay until `close_prefetch`."""
        assert self._storage is not None
        self._storage.give_up(prefetch)

    def close_prefetch(self, prefetch: Prefetch) -> None:
        assert self._storage is not None
        self._storage.close(prefetch)

    def storage_event(self, event: PagesFound | PagesFetched | PagesStored | StorageAttached) -> None:
        assert self._storage is not None
        match event:
            case PagesFound():
                self._storage.found(event)
            case PagesFetched():
                self._storage.fetched(event)
            case PagesStored():
                self._storage.stored(event)
            case StorageAttached():
                self._storage.attach(event.attached)

    def drain_prefetches(self) -> list[Prefetch]:
        """Return the prefetches that finished since the last call. Some may be closed already."""
        return [] if self._storage is None else self._storage.drain_done()

    # ---------------------------------------------------------------- what is cached

    def probe(self, token_ids: Sequence[int], cache_salt: str = "") -> int:
        """Return how many tokens `open` would find cached. The eviction order does not change."""
        keys = iter_page_keys(token_ids, self._page_size, len(token_ids) // self._page_size)
        return len(self._tree.match(keys, cache_salt)) * self._page_size

    def flush(self, tier: str | None = None) -> tuple[int, int | None]:
        """Free every cached page that no lease uses in the "device" tier, in the "host" tier, or in both.

        Return the number of pages, and the id of the `ForgetPages` job after which no restart restores them (None: no
        host page was freed). Pages flushed from the device do not count in the ceiling: more memory would not have
        kept them."""
        num_pages, slots = 0, list[int]()
        if tier != "host":
            num_pages = self._tree.num_evictable
            self._evict(num_pages)
            self._history.clear()
        if tier != "device" and self._host is not None:
            slots = self._host.flush()
        if not slots:
            return num_pages, None
        assert self._host is not None
        job_id = self._host.next_job_id()
        self._jobs.append(ForgetPages(job_id=job_id, host_slots=tuple(slots)))
        return num_pages + len(slots), job_id

    def counts(self) -> PageCounts:
        count = self._ledger.count
        return PageCounts(
            free=count(PageState.FREE),
            cached=count(PageState.CACHED),
            owned=count(PageState.OWNED),
            in_flight=count(PageState.IN_FLIGHT),
            evictable=self._tree.num_evictable,
            total=self._ledger.num_pages,
        )

    def drain_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Return the digests that (entered, left) the set of pages cached in any tier, net since the last call."""
        added, removed = self._tree.drain_changes()
        if self._host is None:
            return added, removed
        before: dict[bytes, int] = {}
        changes = [(digest, True) for digest in added] + [(digest, False) for digest in removed]
        for digest, came in changes + self._host.drain_changes():
            num_tiers = self._num_tiers.get(digest, 0)
            before.setdefault(digest, num_tiers)
            self._num_tiers[digest] = num_tiers + (1 if came else -1)
        now = {digest: self._num_tiers[digest] for digest in before}
        for digest, num_tiers in now.items():
            if not num_tiers:
                del self._num_tiers[digest]
        return (
            [digest for digest in before if now[digest] and not before[digest]],
            [digest for digest in before if before[digest] and not now[digest]],
        )

    def digests(self) -> list[bytes]:
        """Return the digest of every page cached in any tier; of the tree's digests, parents come before children."""
        digests = [node.digest for node in self._tree.nodes()]
        return digests if self._host is None else [*dict.fromkeys([*digests, *self._host.digests()])]

    def _evict(self, num_pages: int) -> None:
        nodes = [self._tree.evict() for _ in range(num_pages)]
        for node in nodes:
            self._history.remember(node.digest)
        self._ledger.move([node.page_id for node in nodes], PageState.CACHED, PageState.FREE)
        self._totals["device_evicted_pages"] += num_pages

    def _apply(self, change: OwnershipChange) -> None:
        self._ledger.move(change.taken, PageState.OWNED, PageState.CACHED)
        if change.released:
            self._ledger.move(change.released, PageState.CACHED, PageState.FREE)
