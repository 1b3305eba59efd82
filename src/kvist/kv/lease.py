"""What one request has of the page cache (cache.py): its pages, and how many of its tokens came from which tier."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvist.kv.radix import Pin


@dataclass(slots=True, eq=False)
class PageLease:
    """One request's pages. Mutable; its one owner is the `PageCache` that opened it: others only read it."""

    page_ids: list[int]  # page i holds tokens [i * page_size, (i + 1) * page_size)
    num_cached_tokens: int  # whole pages found in the tree when the lease was opened
    _pin: Pin = field(repr=False)
    num_ceiling_tokens: int = 0  # what a cache that forgets nothing would have had; since `start_load`
    num_loaded_tokens: int = 0  # that `start_load` has loaded from the host tier, beside
    num_fetched_tokens: int = 0  # those that had come there from the storage tier for it
    _in_flight: list[int] = field(default_factory=list, repr=False)
    _num_backups: int = 0  # under way, of pages that its pin reads
    _closed: bool = False
    _num_pinned_for_backup: int | None = None  # write_back's own lease: pages that it alone keeps from being evicted
