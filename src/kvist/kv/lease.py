"""The lease: one request's pages in the page cache (cache.py), and how many of its tokens came from each tier."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvist.kv.radix import Pin


@dataclass(slots=True, eq=False)
class PageLease:
    """One request's pages. Mutable; its one owner is the `PageCache` that opened it: others only read it."""

    page_ids: list[int]  # page i holds tokens [i * page_size, (i + 1) * page_size)
    num_cached_tokens: int  # whole pages found in the tree when the lease was opened
    _pin: Pin = field(repr=False)
    num_ceiling_tokens: int = 0  # tokens that an infinite cache would have hit; set by `start_load`
    num_loaded_tokens: int = 0  # loaded from the host tier, without `num_fetched_tokens`
    num_fetched_tokens: int = 0  # loaded from the host tier after a fetch from the storage tier
    _in_flight: list[int] = field(default_factory=list, repr=False)
    _num_backups: int = 0  # under way, of pages that the pin reads
    _closed: bool = False
    _num_pinned_for_backup: int | None = None  # pages that only this lease pins; None: not a lease of write_back
