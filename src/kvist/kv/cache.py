"""The page cache: allocation and prefix sharing for a scheduler, and the tiers behind the device pool.

Life cycle of a request's pages: `open` pins the longest cached prefix; `grow` allocates pages, evicting unpinned cached
pages when too few are free; `insert` enters the pages that became full into the tree, where other requests match them;
`close` releases everything. From `begin_transfer` to `end_transfer` a peer may access pages, and they are IN_FLIGHT.

With a host tier (tiers/host.py) a page may also be in host memory:

    insert (or a hit) ──due by the write policy──► BackUpPages ──backed_up──► resident in the host tier
    open ─ grow ─ start_load: pages after the match, resident in the host tier ──► LoadPages ──loaded──► insert

With a storage tier (tiers/storage.py) resident host pages are also stored, and `prefetch`, called before `open`,
fetches pages from the store into the host tier. `start_load` then loads them like all other host pages; `load_early`
loads pages that have come while the others are being fetched (scheduler/early_loads.py).

Pages that are being backed up cannot be freed: the lease of the backup keeps its pin until the backup is reported, even
if the lease is closed. Pages that are being loaded are IN_FLIGHT. A page evicted from one tier stays in the other.

    device_tier.py        the device pool: ledger (pages.py) and tree (radix.py)
    tiers/write_policy.py  when a page is copied to the host tier
    tiers/copies.py        loads and backups under way
    counters.py            hits, and the ceiling

The cache copies no bytes, keeps no tokens and knows no requests. An inserted page is never written again; a page that
is not full belongs to one lease only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from kvist.kv.changes import PageChanges
from kvist.kv.counters import CACHE_COUNTERS, HitCounters
from kvist.kv.device_tier import DeviceTier
from kvist.kv.keys import iter_page_digests, iter_page_keys, page_digests, page_keys, root_digest
from kvist.kv.lease import PageLease
from kvist.kv.pages import PageCounts, PageState
from kvist.kv.tiers.copies import HostCopies
from kvist.kv.tiers.host import HostCounts, HostPage, HostTier
from kvist.kv.tiers.prefetch import Prefetch
from kvist.kv.tiers.storage import PrefixStoring, StorageTier
from kvist.kv.tiers.write_policy import WRITE_POLICIES, WritePolicy
from kvist.plan.plan import ChangedPages
from kvist.plan.tiers import PagesBackedUp, PagesLoaded, TierJob
from kvist.wire import ListedPages, PageTier

_MAX_EMPTY_PIECES = 64  # skipped in one call


@dataclass(frozen=True, slots=True, kw_only=True)
class _HostSide:
    """The host tier as the cache uses it."""

    tier: HostTier
    copies: HostCopies
    policy: WritePolicy


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
        self._namespace = namespace
        self._device = DeviceTier(num_pages, namespace)
        self._ledger, self._tree = self._device.ledger, self._device.tree
        self._host: _HostSide | None = None
        if host is not None:
            copies = HostCopies(host)
            policy = WRITE_POLICIES[write_policy](self._device, copies)
            self._host = _HostSide(tier=host, copies=copies, policy=policy)
        self.storage = storage  # the scheduler passes the store's reports and the ends of prefetches to it
        self._hits = HitCounters()
        self._num_host_hits = self._num_host_misses = 0
        self._early_pages: dict[int, int] = {}  # number of pages of each early load under way, by job id

    @property
    def page_size(self) -> int:
        return self._page_size

    @property
    def num_pages(self) -> int:
        return self._ledger.num_pages

    def page_state(self, page_id: int) -> PageState:
        return self._ledger.state(page_id)

    # ---------------------------------------------------------------- leases

    def open(self, token_ids: Sequence[int], *, cache_salt: str = "", max_tokens: int) -> PageLease:
        """Pin the longest cached prefix of `token_ids`: whole pages, at most `max_tokens` tokens.

        A caller that must compute at least the last token passes `len(token_ids) - 1`.
        """
        num_pages = min(len(token_ids), max_tokens) // self._page_size
        pin = self._tree.pin(iter_page_keys(token_ids, self._page_size, num_pages), cache_salt)
        return PageLease(page_ids=pin.page_ids, num_cached_tokens=pin.num_pages * self._page_size, pin=pin)

    def page_digests(self, token_ids: Sequence[int], cache_salt: str) -> list[bytes]:
        """Return the digest of each full page of these tokens, cached or not."""
        return page_digests(token_ids, self._page_size, self._namespace, cache_salt)

    def digests_of(self, lease: PageLease) -> list[bytes]:
        """Return the digests of the lease's pages that are in the tree, in prefix order."""
        return [node.digest for node in self._tree.tail(lease.pin, lease.pin.num_pages)]

    def grow(self, lease: PageLease, num_tokens: int) -> bool:
        """Make `lease.page_ids` cover `num_tokens`, evicting pages if too few are free.

        Return False, with no page allocated, if too few pages are free or evictable; with `write_back` also while the
        pages to evict are being copied.
        """
        num_pages = -(-num_tokens // self._page_size) - len(lease.page_ids)
        if num_pages <= 0:
            return True
        assert not lease.is_closed
        num_short = num_pages - self._ledger.num_free
        if num_short > 0:
            if num_short > self._tree.num_evictable:
                return False
            if self._host is not None and not self._host.policy.make_evictable(num_short):
                return False
            self.evict(num_short)
        lease.page_ids.extend(self._ledger.allocate(num_pages))
        return True

    @property
    def num_reclaimable(self) -> int:
        """The number of pages that are free or evictable, including pages evictable after copies under way: with
        `write_back`, and of early loads."""
        num_free = self._ledger.num_free + self._tree.num_evictable + sum(self._early_pages.values())
        return num_free if self._host is None else num_free + self._host.policy.num_pinned

    def waits_for_copies(self, lease: PageLease, num_tokens: int) -> bool:
        """Return whether `grow` can succeed when the copies under way have ended, if no other request is first."""
        return -(-num_tokens // self._page_size) - len(lease.page_ids) <= self.num_reclaimable

    def insert(self, lease: PageLease, token_ids: Sequence[int], num_tokens: int) -> None:
        """Enter the full pages of `token_ids[:num_tokens]`, whose K/V is written, into the tree, pinned by this lease.

        Later calls pass more tokens; the lease knows which pages are in the tree. If another request is using a page
        with the same tokens, this lease keeps its own page. The pages must not be in flight.
        """
        pin = lease.pin
        first, last = pin.num_pages, num_tokens // self._page_size
        if last <= first:  # most calls: no page became full
            return
        assert not lease.is_closed
        assert num_tokens <= len(token_ids), "inserted beyond the tokens"
        assert last <= len(lease.page_ids), "inserted beyond the pages"
        assert not lease.is_in_flight, "end the transfer before the pages are shared"
        keys = page_keys(token_ids, self._page_size, first, last)
        self._device.apply(self._tree.extend(pin, keys, lease.page_ids[first:last]))
        if self._host is not None:
            self._host.policy.on_full(lease, self._tree.tail(pin, last - first))

    def close(self, lease: PageLease) -> None:
        """Unpin the lease's shared pages and free its own pages. Call once, with no page in flight.

        Shared pages stay pinned until the backups of this lease are reported."""
        self._ledger.move(lease.close(), PageState.OWNED, PageState.FREE)
        if self._host is None:
            self._device.unpin(lease.pin)
        elif lease.is_unused:
            self._host.policy.release(lease)

    def begin_transfer(self, lease: PageLease, first_page: int) -> None:
        """Allow a peer to access `lease.page_ids[first_page:]`: pages that are not in the tree become IN_FLIGHT.

        Pages in the tree stay CACHED: their content is final, and the lease pins them until it is closed.
        """
        not_in_tree = lease.page_ids[max(first_page, lease.pin.num_pages) :]
        self._ledger.move(lease.begin_transfer(not_in_tree), PageState.OWNED, PageState.IN_FLIGHT)

    def end_transfer(self, lease: PageLease) -> None:
        """Make the lease's pages in flight OWNED again: no peer accesses them any more."""
        self._ledger.move(lease.end_transfer(), PageState.IN_FLIGHT, PageState.OWNED)

    # ---------------------------------------------------------------- the tiers behind the device pool

    def prefetch(
        self, token_ids: Sequence[int], *, cache_salt: str = "", max_tokens: int, for_handoff: bool = False
    ) -> Prefetch | None:
        """Start a prefetch of the pages that are in neither tier. Return None if there is nothing to wait for. With
        `for_handoff` the pages were stored for this request, and a prefix of any length is worth a wait.

        The caller closes the prefetch (`storage.close`) when the request ends or, after `start_load`, is admitted."""
        num_pages = min(len(token_ids), max_tokens) // self._page_size
        if self.storage is None or not self.storage.may_fetch(num_pages, for_handoff=for_handoff):
            return None
        cached = self._tree.match(iter_page_keys(token_ids, self._page_size, num_pages), cache_salt)
        if not self.storage.may_fetch(num_pages - len(cached), for_handoff=for_handoff):
            return None
        last = cached[-1].digest if cached else root_digest(self._namespace, cache_salt)
        digests = [node.digest for node in cached]
        digests += self._digests_after(last, token_ids, len(cached), num_pages)
        return self.storage.begin(digests, len(cached), for_handoff=for_handoff)

    def store_at_once(self, lease: PageLease, storing: PrefixStoring) -> None:
        """Copy the pages of the lease that are in the tree, and not in `storing` yet, to the host tier and to the
        store, under every write policy, and before pages that no request waits for."""
        assert self._host is not None
        assert self.storage is not None
        nodes = self._tree.tail(lease.pin, lease.pin.num_pages - len(storing.digests))
        self._host.copies.back_up(lease, nodes, exceeds_limit=True)
        self.storage.store_first(storing, [node.digest for node in nodes])

    def start_load(self, lease: PageLease, token_ids: Sequence[int], *, max_tokens: int) -> int | None:
        """Count the lease's hits and their ceiling, and start to load the pages that the host tier has after them.

        Called once, when the lease covers at least `max_tokens` tokens and its request is admitted. Return the job id
        of the load, or None if the host tier has no further page. With a load, use the lease only after `loaded`."""
        pin = lease.pin
        first, last = pin.num_pages, min(len(token_ids), max_tokens) // self._page_size
        found = [] if self._host is None else self._use_host_pages(self._host, lease, token_ids, first, last)
        num_found = first + len(found)
        num_early = lease.num_early_tokens // self._page_size
        self._hits.count(first - num_early, last - first + num_early)
        self._num_host_hits += num_early
        digest = found[-1].digest if found else pin.node.digest
        num_evicted = self._hits.num_evicted_before(self._digests_after(digest, token_ids, num_found, last))
        lease.num_ceiling_tokens = (num_found + num_evicted) * self._page_size
        if not found:
            return None
        assert self._host is not None
        return self._begin_load(self._host, lease, found)

    def _begin_load(self, host: _HostSide, lease: PageLease, found: list[HostPage]) -> int:
        """Load pages into the pages of the lease after those in the tree; return the job's id."""
        first = lease.pin.num_pages
        page_ids = lease.page_ids[first : first + len(found)]
        self._ledger.move(lease.begin_transfer(page_ids), PageState.OWNED, PageState.IN_FLIGHT)
        return host.copies.begin_load(lease, found, page_ids)

    def is_in_host(self, digests: Sequence[bytes], index: int) -> bool:
        """Return whether there is a page with this index, and the host tier has it."""
        page = self._host.tier.get(digests[index]) if self._host is not None and index < len(digests) else None
        return page is not None and page.resident

    def is_loading(self, digests: Sequence[bytes], index: int) -> bool:
        """Return whether there is a page with this index, and a load of it is under way."""
        if self._host is None or index >= len(digests):
            return False
        return self._host.copies.load_of(digests[index]) is not None

    def has_room(self, num_reserved: int) -> bool:
        """Return whether more than `num_reserved` pages are free or evictable."""
        return self._ledger.num_free + self._tree.num_evictable > num_reserved

    def load_early(self, lease: PageLease, digests: Sequence[bytes], *, num_reserved: int) -> int | None:
        """Start to load pages that the host tier has after the lease's pages, for a request that is not admitted yet.

        `digests` are those of the prompt's pages, from the first. Return the job id; None if the host tier has no
        further page, or if not even one page is free or evictable beyond `num_reserved`. The lease then has its pages
        after `loaded`, and is used for nothing else."""
        assert self._host is not None
        first = lease.pin.num_pages
        num_free = self._ledger.num_free + self._tree.num_evictable - num_reserved
        num_room = max(0, num_free + len(lease.page_ids) - first)
        found = self._host.tier.match(islice(digests, first, first + num_room))
        if not found or not self.grow(lease, (first + len(found)) * self._page_size):
            return None
        job_id = self._begin_load(self._host, lease, found)
        self._early_pages[job_id] = len(found)
        return job_id

    def _use_host_pages(
        self, host: _HostSide, lease: PageLease, token_ids: Sequence[int], first: int, last: int
    ) -> list[HostPage]:
        """Return the pages that the host tier has after the lease's `first` pages, and mark the whole path as used."""
        nodes = self._tree.tail(lease.pin, first)
        for node in nodes:
            node.num_hits += 1
        host.policy.on_hit(lease, nodes)
        found = host.tier.match(self._digests_after(lease.pin.node.digest, token_ids, first, last))
        self._num_host_hits += len(found)
        self._num_host_misses += last - first - len(found)
        path = [*filter(None, (host.tier.get(node.digest) for node in nodes)), *found]
        host.tier.touch(path)
        if self.storage is not None:
            self.storage.store(path)
        return found

    def pending_load(self, lease: PageLease, token_ids: Sequence[int], *, max_tokens: int) -> int | None:
        """Return the job id of another lease's load of this lease's next page, if any. After `loaded` the page is in
        the tree."""
        if self._host is None or not self._host.copies.is_loading:
            return None
        first = lease.pin.num_pages
        if (first + 1) * self._page_size > min(len(token_ids), max_tokens):
            return None
        return self._host.copies.load_of(next(self._digests_after(lease.pin.node.digest, token_ids, first, first + 1)))

    def loaded(self, event: PagesLoaded, token_ids: Sequence[int]) -> int:
        """End a load of `start_load` or `load_early`; return the number of tokens whose K/V the lease has now."""
        assert self._host is not None
        load = self._host.copies.loaded(event)
        lease, num_pages = load.lease, len(load.pages)
        self._early_pages.pop(event.job_id, None)
        self.end_transfer(lease)
        if event.ok:
            lease.count_loaded(num_pages * self._page_size, load.num_fetched * self._page_size)
            self.insert(lease, token_ids, (lease.pin.num_pages + num_pages) * self._page_size)
        return lease.pin.num_pages * self._page_size

    def backed_up(self, event: PagesBackedUp) -> None:
        assert self._host is not None
        lease, pages = self._host.copies.backed_up(event)
        if event.ok and self.storage is not None:
            self.storage.store(pages)
        if lease.is_unused:
            self._host.policy.release(lease)

    def plan_jobs(self) -> list[TierJob]:
        """Start the copies that are due. Return all jobs for the movers since the last call."""
        if self._host is None:
            return []
        self._host.policy.start_due()
        jobs: list[TierJob] = [*self._host.copies.take_jobs()]
        if self.storage is not None:
            self.storage.start_queued()
            jobs += self.storage.take_jobs()
        return jobs

    def _digests_after(self, digest: bytes, token_ids: Sequence[int], first: int, last: int) -> Iterator[bytes]:
        return iter_page_digests(digest, token_ids, self._page_size, last, first)

    # ---------------------------------------------------------------- all cached pages

    def flush(self, tier: str | None = None) -> tuple[int, int | None]:
        """Free the unpinned cached pages of the "device" tier, of the "host" tier, or (None) of both.

        Return the number of pages, and the id of the `ForgetPages` job after which no restart restores them (None: no
        host page was freed). Pages flushed from the device do not count in the ceiling: a larger pool would not have
        kept them."""
        num_pages, job_id = 0, None
        if tier != "host":
            num_pages = self._tree.num_evictable
            self.evict(num_pages)
            self._hits.forget_evictions()
        if tier != "device" and self._host is not None:
            num_host_pages, job_id = self._host.copies.flush()
            num_pages += num_host_pages
        return num_pages, job_id

    def evict(self, num_pages: int) -> None:
        """Evict `num_pages` pages from the device pool. At least `num_pages` must be evictable."""
        self._hits.on_evicted(self._device.evict(num_pages))

    def counts(self) -> PageCounts:
        return self._device.counts()

    def host_counts(self) -> HostCounts | None:
        return None if self._host is None else self._host.tier.counts()

    def totals(self) -> dict[str, float]:
        """Return the values of CACHE_COUNTERS."""
        counted = {
            **self._hits.totals(),
            "host_hit_pages": self._num_host_hits,
            "host_miss_pages": self._num_host_misses,
            **({} if self._host is None else self._host.copies.totals()),
            **({} if self.storage is None else self.storage.totals()),
        }
        return CACHE_COUNTERS.filled(counted)

    def take_changed_pages(self) -> tuple[ChangedPages, ...]:
        """Return the pages that entered and left each tier since the last call."""
        events = self._tree.changes.take()
        return events if self._host is None else events + self._host.tier.changes.take()

    def list_pages(self, first_piece: int) -> ListedPages:
        """Return a piece of the list of all cached pages, of both tiers in turn; empty pieces are skipped."""
        tiers: list[tuple[PageTier, PageChanges]] = [("device", self._tree.changes)]
        if self._host is not None:
            tiers.append(("host", self._host.tier.changes))
        num_pieces = len(tiers) * max(changes.num_pieces for _, changes in tiers)
        tier, digests, piece = tiers[0][0], b"", first_piece
        for _ in range(_MAX_EMPTY_PIECES):
            if piece >= num_pieces or digests:
                break
            tier, changes = tiers[piece % len(tiers)]
            number = piece // len(tiers)
            digests = changes.piece(number) if number < changes.num_pieces else b""
            piece += 1
        following = piece if piece < num_pieces else None
        return ListedPages(tier=tier, digests=digests, first_piece=first_piece, next_piece=following)
