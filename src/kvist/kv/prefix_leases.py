"""The ledger of leased prefixes: cached pages that a client has pinned for a limited time. Pure.

    take ──► leased, until `ends_at_s` ──renew──► leased, until later
                  └── end | end of its time | give_up: unpinned, cached as before, evicted like all others

A leased page stays in the device pool. Leases hold at most `max_pages` pages together, and those of one owner at most
`max_owner_pages`; a page in several leases counts once. An owner is a name, such as that of an API key. Leases with the
owner "" have none, and share only the limit of all.

The ledger reads no clock: its user calls `end` when the time of a lease is over (scheduler/leases.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvist.kv.cache import PageCache
from kvist.kv.lease import PageLease

Key = TypeVar("Key")

MAX_LEASES = 1024  # a lease costs memory even if all its pages are in others


@dataclass(slots=True, eq=False, kw_only=True)
class PrefixLease:
    """Mutable; its one owner is the ledger."""

    lease_id: str
    owner: str
    ends_at_s: float
    digests: Sequence[bytes]  # of its pages, in prefix order
    pages: PageLease


class PrefixLeases:
    """Mutable; its one owner is the scheduler."""

    def __init__(self, cache: PageCache, *, max_pages: int, max_owner_pages: int) -> None:
        self._cache = cache
        self.max_pages = max_pages
        self.max_owner_pages = min(max_pages, max_owner_pages)
        self._leases: dict[str, PrefixLease] = {}
        self._num_leases_of: Counter[bytes] = Counter()  # by digest of a leased page
        self._num_owner_leases_of: Counter[tuple[str, bytes]] = Counter()  # by owner and digest
        self._num_owner_pages: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[PrefixLease]:
        return iter(self._leases.values())

    @property
    def num_pages(self) -> int:
        """The number of different leased pages."""
        return len(self._num_leases_of)

    def num_owner_pages(self, owner: str) -> int:
        return self._num_owner_pages[owner]

    def get(self, lease_id: str, owner: str) -> PrefixLease | None:
        """Return a lease of this owner."""
        lease = self._leases.get(lease_id)
        return lease if lease is not None and lease.owner == owner else None

    def find(self, lease_id: str) -> PrefixLease | None:
        return self._leases.get(lease_id)

    def limit_for(self, owner: str) -> int:
        """Return the most pages of one lease of this owner."""
        return self.max_owner_pages if owner else self.max_pages

    def has_room(self, owner: str, digests: Sequence[bytes]) -> bool:
        """Return whether these pages can be leased now."""
        num_new = sum(digest not in self._num_leases_of for digest in digests)
        num_new_of_owner = sum((owner, digest) not in self._num_owner_leases_of for digest in digests)
        return (
            len(self._leases) < MAX_LEASES
            and self.num_pages + num_new <= self.max_pages
            and self._num_owner_pages[owner] + num_new_of_owner <= self.limit_for(owner)
        )

    def take(
        self, lease_id: str, owner: str, token_ids: Sequence[int], *, cache_salt: str, ends_at_s: float
    ) -> PrefixLease | None:
        """Lease the cached pages of a prefix. Return None if there is no room, or if another lease has the id."""
        if lease_id in self._leases:
            return None
        pages = self._cache.open(token_ids, cache_salt=cache_salt, max_tokens=len(token_ids))
        digests = self._cache.digests_of(pages)
        if not self.has_room(owner, digests):
            self._cache.close(pages)
            return None
        lease = PrefixLease(lease_id=lease_id, owner=owner, ends_at_s=ends_at_s, digests=digests, pages=pages)
        self._leases[lease_id] = lease
        self._num_leases_of.update(digests)
        num_before = len(self._num_owner_leases_of)
        self._num_owner_leases_of.update((owner, digest) for digest in digests)
        self._num_owner_pages[owner] += len(self._num_owner_leases_of) - num_before
        return lease

    def end(self, lease: PrefixLease) -> None:
        """Unpin the pages of a lease."""
        del self._leases[lease.lease_id]
        num_before = len(self._num_owner_leases_of)
        for digest in lease.digests:
            _take_one(self._num_leases_of, digest)
            _take_one(self._num_owner_leases_of, (lease.owner, digest))
        self._num_owner_pages[lease.owner] += len(self._num_owner_leases_of) - num_before
        if not self._num_owner_pages[lease.owner]:
            del self._num_owner_pages[lease.owner]
        self._cache.close(lease.pages)

    def soonest(self) -> PrefixLease | None:
        """Return the lease that ends first."""
        return min(self._leases.values(), key=lambda lease: lease.ends_at_s, default=None)

    def num_leased_in(self, pages: PageLease) -> int:
        """Return how many cached pages of a request are leased."""
        return sum(digest in self._num_leases_of for digest in self._cache.digests_of(pages))


def _take_one(counts: Counter[Key], key: Key) -> None:
    """Lower a count, and forget it at zero."""
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
