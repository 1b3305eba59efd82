"""The lease: one request's pages in the page cache (cache.py), and how many of its tokens came from each tier.

    open ──► page_ids = [in the tree, pinned ... | its own ...] ──close──► its own pages are free
                                      own pages: begin_transfer ──► in flight ──end_transfer──► own

The pin outlives the lease while a backup of the pinned pages is under way. The states of pages are in the ledger
(pages.py), not here: `begin_transfer`, `end_transfer` and `close` return the ids of the pages whose state the cache
then changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvist.kv.radix import Pin


@dataclass(slots=True, eq=False)
class PageLease:
    """One request's pages, or the pages of one write-back copy. Mutable; its one owner is the `PageCache`."""

    page_ids: list[int]  # page i holds tokens [i * page_size, (i + 1) * page_size)
    num_cached_tokens: int  # whole pages found in the tree when the lease was opened
    pin: Pin = field(repr=False)  # pages [0, pin.num_pages) are in the tree, or duplicates of pages in the tree
    num_ceiling_tokens: int = 0  # tokens that an infinite cache would have hit; set by `start_load`
    num_loaded_tokens: int = 0  # loaded from the host tier; does not include `num_fetched_tokens`
    num_fetched_tokens: int = 0  # loaded from the host tier after a fetch from the storage tier
    num_early_tokens: int = 0  # a part of both: loaded before the lease was opened, and found in the tree
    is_closed: bool = False
    _in_flight: list[int] = field(default_factory=list, repr=False)
    _num_backups: int = 0  # backups under way that need the pin

    @property
    def is_in_flight(self) -> bool:
        """Whether a peer or a load may access pages of the lease."""
        return bool(self._in_flight)

    def begin_transfer(self, page_ids: list[int]) -> list[int]:
        """Mark pages as in flight; return the pages that were not in flight before."""
        assert not self.is_closed
        already = set(self._in_flight)
        added = [page_id for page_id in page_ids if page_id not in already]
        self._in_flight.extend(added)
        return added

    def end_transfer(self) -> list[int]:
        """End all transfers; return the pages that were in flight."""
        ended, self._in_flight = self._in_flight, []
        return ended

    def close(self) -> list[int]:
        """End the lease; return its pages outside the tree. Called once, with no page in flight."""
        assert not self.is_closed, "a lease is closed once"
        assert not self._in_flight, "a peer may still access these pages: end the transfer first"
        self.is_closed = True
        own = self.page_ids[self.pin.num_pages :]
        self.page_ids = []  # a new list: a plan may still hold the old one
        return own

    @property
    def num_device_tokens(self) -> int:
        """The number of cached tokens found in the device pool that were not loaded for this request."""
        return self.num_cached_tokens - self.num_early_tokens

    def count_loaded(self, num_tokens: int, num_fetched_tokens: int) -> None:
        """Count tokens whose pages were loaded, some of them after a fetch from the storage tier."""
        self.num_fetched_tokens += num_fetched_tokens
        self.num_loaded_tokens += num_tokens - num_fetched_tokens

    def take_over_counts(self, early: PageLease) -> None:
        """Count the tokens that an early load has put into the device pool. The lease `early` pins them."""
        self.num_fetched_tokens, self.num_loaded_tokens = early.num_fetched_tokens, early.num_loaded_tokens
        self.num_early_tokens = early.num_fetched_tokens + early.num_loaded_tokens
        assert self.num_early_tokens <= self.num_cached_tokens, "pages loaded early are pinned until they are matched"

    def begin_backup(self) -> None:
        self._num_backups += 1

    def end_backup(self) -> None:
        self._num_backups -= 1

    @property
    def is_unused(self) -> bool:
        """Whether neither the request nor a backup needs the pin any more."""
        return self.is_closed and not self._num_backups
