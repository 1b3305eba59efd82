"""The lease: one request's pages in the page cache (cache.py), and how many of its tokens came from each tier.

    open ──► page_ids = [in the tree, pinned ... | its own ...] ──close──► its own pages are free
                                      own pages: begin_transfer ──► in flight ──end_transfer──► own

The pin outlives the lease while a backup of the pinned pages is under way. The lease keeps no page states: the ledger
(pages.py) does. Each method returns the page ids whose state changes, and the cache moves them in the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvist.kv.radix import Pin


@dataclass(slots=True, eq=False)
class PageLease:
    """One request's pages. Mutable; its one owner is the `PageCache` that opened it: others only read it."""

    page_ids: list[int]  # page i holds tokens [i * page_size, (i + 1) * page_size)
    num_cached_tokens: int  # whole pages found in the tree when the lease was opened
    pin: Pin = field(repr=False)  # pages [0, pin.num_pages) are in the tree, or duplicates of pages in the tree
    num_ceiling_tokens: int = 0  # tokens that an infinite cache would have hit; set by `start_load`
    num_loaded_tokens: int = 0  # loaded from the host tier, without `num_fetched_tokens`
    num_fetched_tokens: int = 0  # loaded from the host tier after a fetch from the storage tier
    is_closed: bool = False
    _in_flight: list[int] = field(default_factory=list, repr=False)
    _num_backups: int = 0  # under way, of pages that the pin reads

    @property
    def is_in_flight(self) -> bool:
        """Whether a peer or a copy may touch pages of the lease."""
        return bool(self._in_flight)

    def begin_transfer(self, page_ids: list[int]) -> list[int]:
        """Put pages in flight; return the pages that were not in flight before."""
        assert not self.is_closed
        already = set(self._in_flight)
        added = [page_id for page_id in page_ids if page_id not in already]
        self._in_flight.extend(added)
        return added

    def end_transfer(self) -> list[int]:
        """Return the pages that were in flight; none is any more."""
        ended, self._in_flight = self._in_flight, []
        return ended

    def close(self) -> list[int]:
        """End the lease, once, with no page in flight; return its pages outside the tree."""
        assert not self.is_closed, "a lease is closed once"
        assert not self._in_flight, "a peer may still touch these pages: end the transfer first"
        self.is_closed = True
        own = self.page_ids[self.pin.num_pages :]
        self.page_ids = []  # a new list: a plan may still hold the old one
        return own

    def begin_backup(self) -> None:
        self._num_backups += 1

    def end_backup(self) -> None:
        self._num_backups -= 1

    @property
    def is_unused(self) -> bool:
        """Whether neither the request nor a backup needs the pin any more."""
        return self.is_closed and not self._num_backups
