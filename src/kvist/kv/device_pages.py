"""The pages of the device pool: the ledger (pages.py) and the tree (radix.py), changed together.

Every change of the tree's pages is also a move in the ledger. The page cache (cache.py) and the write policies
(tiers/write_policy.py) change the tree only through this class, or move the pages themselves.
"""

from __future__ import annotations

from kvist.kv.pages import PageCounts, PageLedger, PageState
from kvist.kv.radix import OwnershipChange, Pin, RadixTree


class DevicePages:
    """Mutable; its one owner is `PageCache`."""

    def __init__(self, num_pages: int, namespace: str) -> None:
        self.ledger = PageLedger(num_pages)
        self.tree = RadixTree(namespace)

    def apply(self, change: OwnershipChange) -> None:
        self.ledger.move(change.taken, PageState.OWNED, PageState.CACHED)
        if change.released:
            self.ledger.move(change.released, PageState.CACHED, PageState.FREE)

    def unpin(self, pin: Pin, *, prepared: bool = False) -> None:
        """Release a pin and free its duplicates. With `prepared`, its pages are evicted next (see radix.py)."""
        self.apply(self.tree.unpin(pin, prepared=prepared))
        self.ledger.move([*pin.duplicates.values()], PageState.OWNED, PageState.FREE)

    def evict(self, num_pages: int) -> list[bytes]:
        """Free the pages to evict first; return their digests. That many pages must be evictable."""
        nodes = [self.tree.evict() for _ in range(num_pages)]
        self.ledger.move([node.page_id for node in nodes], PageState.CACHED, PageState.FREE)
        return [node.digest for node in nodes]

    def counts(self) -> PageCounts:
        count = self.ledger.count
        return PageCounts(
            free=count(PageState.FREE),
            cached=count(PageState.CACHED),
            owned=count(PageState.OWNED),
            in_flight=count(PageState.IN_FLIGHT),
            evictable=self.tree.num_evictable,
            total=self.ledger.num_pages,
        )
