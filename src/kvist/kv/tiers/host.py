"""The index of the host tier (L2): its pages by digest, and the order of eviction. Pure: no bytes and no clock.

    reserve ──► writing ──written(ok)──► resident ──pin──► loading ──unpin──► resident ──► evicted
                   └──written(failed)──► lost: never matched; written again or evicted

free + cached + in_flight == total. A slot is in flight while it is pinned: a job (plan/tiers.py) reads or writes the
slot, or a prefetch keeps its page. A pinned slot is never given to another page. All other slots in use are cached.

The parent of a page is the page before it in the prefix. A page enters only after its parent, and is evicted before its
parent. The tier therefore holds whole prefixes, and a match can reach every page. The least recently used leaf without
a pin is evicted first. Outdated entries of the heap of leaves are dropped when they reach the top.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvist.kv.changes import PageChanges


@dataclass(slots=True, eq=False)
class HostPage:
    """One slot in use. Mutable; its one owner is the `HostTier`."""

    digest: bytes
    slot: int
    parent: HostPage | None  # None: the first page of a prefix
    last_use: int
    num_children: int = 0
    num_pins: int = 0  # jobs that read or write the page, and prefetches that keep it
    row: int = 0  # in the list of all pages (changes.py), while resident
    resident: bool = False  # the slot holds the page's bytes
    stored: bool = False  # believed to be in the storage tier, or on its way there
    from_storage: bool = False  # the bytes came from the storage tier, and no request has loaded them yet

    @property
    def lost(self) -> bool:
        """Whether the page's bytes are neither in the slot nor being copied there."""
        return not self.resident and not self.num_pins

    @property
    def name(self) -> tuple[bytes, bytes | None]:
        """The page's digest, and its parent's."""
        return self.digest, None if self.parent is None else self.parent.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedPage:
    """A slot that an earlier worker process filled (memory/persistence.py)."""

    slot: int
    digest: bytes
    parent: bytes | None  # digest of the parent page
    last_use: int  # above 0; only the order matters


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCounts:
    """Slots by state: free + cached + in_flight == total."""

    free: int
    cached: int
    in_flight: int
    total: int


class HostTier:
    """The slots and pages of the host tier. Mutable; its one owner is `PageCache`."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages > 0
        self.num_pages = num_pages
        self.num_evicted = 0
        self._pages: dict[bytes, HostPage] = {}
        self._free = list(
            range(num_pages - 1, -1, -1)
        )  # slot 0 on top: memory that is never needed never becomes resident
        self._leaves: list[tuple[int, int, HostPage]] = []  # a heap by last use; the second number only breaks ties
        self._num_in_flight = 0
        self._num_uses = 0
        self._num_pushed = 0
        self._num_jobs = 0
        self.changes = PageChanges("host")

    def restore(self, saved: Sequence[SavedPage]) -> None:
        """Enter the saved pages, parents before children. Call once, before any other method."""
        assert not self._pages
        for each in saved:
            parent = None if each.parent is None else self._pages[each.parent]
            page = self._pages[each.digest] = HostPage(each.digest, each.slot, parent, each.last_use)
            page.resident = True
            if parent is not None:
                parent.num_children += 1
            page.row = self.changes.on_stored(page.digest)
        used = {each.slot for each in saved}
        assert len(used) == len(self._pages), "a slot holds one page"
        self._free = [slot for slot in self._free if slot not in used]
        self._num_uses = max((each.last_use for each in saved), default=0)
        for page in self._pages.values():
            self._offer(page)

    def next_job_id(self) -> int:
        """Return a new id for a job (plan/tiers.py) of any kind."""
        self._num_jobs += 1
        return self._num_jobs

    def get(self, digest: bytes) -> HostPage | None:
        return self._pages.get(digest)

    def match(self, digests: Iterable[bytes]) -> list[HostPage]:
        """Return the leading pages that are resident."""
        found: list[HostPage] = []
        for digest in digests:
            page = self._pages.get(digest)
            if page is None or not page.resident:
                break
            found.append(page)
        return found

    def touch(self, pages: Iterable[HostPage]) -> None:
        """Mark the pages as used now, all at the same time."""
        self._num_uses += 1
        for page in pages:
            page.last_use = self._num_uses
            self._offer(page)

    def reserve(self, parent: HostPage | None, digest: bytes) -> HostPage | None:
        """Reserve a slot for the page, pinned until `written`, evicting a page if needed. None: no slot can be
        freed."""
        page = self._pages.get(digest)
        if page is None:
            if not self._free and not self._evict_sparing(parent):
                return None
            self._num_uses += 1
            page = self._pages[digest] = HostPage(digest, self._free.pop(), parent, self._num_uses)
            if parent is not None:
                parent.num_children += 1
        else:
            assert page.lost, "the page is resident, or is being written"
        self.pin(page)
        return page

    def written(self, page: HostPage, *, ok: bool) -> None:
        page.resident = ok
        if ok:
            page.row = self.changes.on_stored(page.digest)
        self.unpin(page)

    def pin(self, page: HostPage) -> None:
        """Keep the page in its slot until `unpin`. Pins nest."""
        self._num_in_flight += not page.num_pins
        page.num_pins += 1

    def unpin(self, page: HostPage) -> None:
        page.num_pins -= 1
        self._num_in_flight -= not page.num_pins
        self._offer(page)

    def forget_stored(self) -> None:
        for page in self._pages.values():
            page.stored = False

    def flush(self) -> list[int]:
        """Drop every page that is not pinned and has no pinned descendant; return the freed slots."""
        num_free = len(self._free)
        while self._evict():
            pass
        return self._free[num_free:]

    def counts(self) -> HostCounts:
        return HostCounts(
            free=len(self._free),
            cached=len(self._pages) - self._num_in_flight,
            in_flight=self._num_in_flight,
            total=self.num_pages,
        )

    def pages(self) -> Iterator[HostPage]:
        """Yield every page that has a slot, resident or not."""
        return iter(self._pages.values())

    def digests(self) -> list[bytes]:
        """Return the digest of every resident page."""
        return [page.digest for page in self._pages.values() if page.resident]

    def _evict_sparing(self, parent: HostPage | None) -> bool:
        """Evict a page, but not `parent`: its child is about to be written."""
        if parent is None:
            return self._evict()
        self.pin(parent)
        try:
            return self._evict()
        finally:
            self.unpin(parent)

    def _evict(self) -> bool:
        while self._leaves:
            last_use, _, page = heapq.heappop(self._leaves)
            if self._is_idle_leaf(page, last_use):
                self._drop(page)
                return True
        return False

    def _drop(self, page: HostPage) -> None:
        del self._pages[page.digest]
        self._free.append(page.slot)
        self.num_evicted += 1
        if page.resident:
            self.changes.on_removed(page.digest, page.row)
        parent = page.parent
        if parent is not None:
            parent.num_children -= 1
            parent.last_use = max(parent.last_use, page.last_use)  # a use of the page was a use of its prefix
            self._offer(parent)

    def _offer(self, page: HostPage) -> None:
        if page.num_children or page.num_pins:
            return
        self._num_pushed += 1
        heapq.heappush(self._leaves, (page.last_use, self._num_pushed, page))
        if len(self._leaves) > 2 * len(self._pages) + 64:
            self._leaves = [entry for entry in self._leaves if self._is_idle_leaf(entry[2], entry[0])]
            heapq.heapify(self._leaves)

    def _is_idle_leaf(self, page: HostPage, last_use: int) -> bool:
        return (
            page.last_use == last_use
            and not page.num_children
            and not page.num_pins
            and self._pages.get(page.digest) is page
        )
