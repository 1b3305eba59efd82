"""Which pages the host tier (L2) holds, by digest, and which goes next. Pure: it owns no bytes and no clock.

    reserve ──► writing ──written(ok)──► resident ──begin──► loading ──end──► resident ──► evicted
                   └──written(failed)──► lost: nothing to match; written again or evicted

free + cached + in_flight == total, where in_flight are the slots that a move (moves.py) reads or writes, or that a
prefetch keeps: they are never given to another page. Cached are all others in use.

A page is taken in only behind the page it continues, and a leaf is evicted before that: so what is here are whole
prefixes, and no slot holds what no match can reach. Of the leaves that no move uses, the one used longest ago goes
first. The heap of them is lazy: an entry that its page has outgrown is dropped when it is met.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class HostPage:
    """One slot in use. Mutable; its one owner is the `HostTier`."""

    digest: bytes
    slot: int
    parent: HostPage | None  # the page it continues; None for the first of a prefix
    last_use: int
    num_children: int = 0
    num_pins: int = 0  # that read or write it, and prefetches that keep it
    resident: bool = False  # its bytes are there
    stored: bool = False  # in the storage tier, or on its way there; as far as is known
    from_storage: bool = False  # its bytes came from there, and nobody has loaded them yet

    @property
    def lost(self) -> bool:
        """Its bytes are neither there nor on their way."""
        return not self.resident and not self.num_pins

    @property
    def name(self) -> tuple[bytes, bytes | None]:
        """Its digest, and that of the page before."""
        return self.digest, None if self.parent is None else self.parent.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedPage:
    """A slot that a former worker filled (persistence.py)."""

    slot: int
    digest: bytes
    parent: bytes | None  # digest of the page it continues
    last_use: int  # above zero; only the order counts


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCounts:
    """free + cached + in_flight == total."""

    free: int
    cached: int
    in_flight: int
    total: int


class HostTier:
    """Mutable; its one owner is `PageCache`."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages > 0
        self.num_pages = num_pages
        self.num_evicted = 0
        self._pages: dict[bytes, HostPage] = {}
        self._free = list(range(num_pages - 1, -1, -1))  # slot 0 on top: what is never needed never becomes resident
        self._leaves: list[tuple[int, int, HostPage]] = []  # a heap by last use; the second number only breaks ties
        self._num_in_flight = 0
        self._num_uses = 0
        self._num_pushed = 0
        self._num_jobs = 0
        self._changes: list[tuple[bytes, bool]] = []

    def restore(self, saved: Sequence[SavedPage]) -> None:
        """Takes these in, each behind the page it continues. Once, before anything else."""
        assert not self._pages
        for each in saved:
            parent = None if each.parent is None else self._pages[each.parent]
            page = self._pages[each.digest] = HostPage(each.digest, each.slot, parent, each.last_use)
            page.resident = True
            if parent is not None:
                parent.num_children += 1
            self._changes.append((page.digest, True))
        used = {each.slot for each in saved}
        assert len(used) == len(self._pages), "a slot holds one page"
        self._free = [slot for slot in self._free if slot not in used]
        self._num_uses = max((each.last_use for each in saved), default=0)
        for page in self._pages.values():
            self._offer(page)

    def next_job_id(self) -> int:
        """For a move from here or to here (moves.py), whoever asks for it."""
        self._num_jobs += 1
        return self._num_jobs

    def get(self, digest: bytes) -> HostPage | None:
        return self._pages.get(digest)

    def match(self, digests: Iterable[bytes]) -> list[HostPage]:
        """The leading ones that are resident."""
        found: list[HostPage] = []
        for digest in digests:
            page = self._pages.get(digest)
            if page is None or not page.resident:
                break
            found.append(page)
        return found

    def touch(self, pages: Iterable[HostPage]) -> None:
        """These were used now, all at once."""
        self._num_uses += 1
        for page in pages:
            page.last_use = self._num_uses
            self._offer(page)

    def reserve(self, parent: HostPage | None, digest: bytes) -> HostPage | None:
        """A slot to write the page into, evicting if need be; a move holds it until `written`. None: all are in use."""
        page = self._pages.get(digest)
        if page is None:
            if not self._free and not self._evict_sparing(parent):
                return None
            self._num_uses += 1
            page = self._pages[digest] = HostPage(digest, self._free.pop(), parent, self._num_uses)
            if parent is not None:
                parent.num_children += 1
        else:
            assert page.lost, "a page is written once"
        self.pin(page)
        return page

    def written(self, page: HostPage, *, ok: bool) -> None:
        page.resident = ok
        if ok:
            self._changes.append((page.digest, True))
        self.unpin(page)

    def pin(self, page: HostPage) -> None:
        """A move uses it from now on."""
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
        """Drops every page that no move uses and that continues into none in use; returns the slots they had."""
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

    def digests(self) -> list[bytes]:
        """Of every resident page."""
        return [page.digest for page in self._pages.values() if page.resident]

    def drain_changes(self) -> list[tuple[bytes, bool]]:
        """(digest, whether it became resident or ceased to be) since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def _evict_sparing(self, parent: HostPage | None) -> bool:
        """A prefix is not cut off at the end that is about to grow."""
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
            self._changes.append((page.digest, False))
        parent = page.parent
        if parent is not None:
            parent.num_children -= 1
            parent.last_use = max(parent.last_use, page.last_use)  # whoever used the page went through it
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
