"""The device tier (L1): the ledger (pages.py) and the tree (radix.py), changed together.

If the tree takes or releases pages, their states in the ledger change too. The page cache (cache.py) passes the changes
made by `RadixTree.extend` to `apply`; `unpin` and `evict` change both.
"""

from __future__ import annotations

from kvist.kv.pages import PageCounts, PageLedger, PageState
from kvist.kv.radix import OwnershipChange, Pin, RadixTree


class DeviceTier:
    """Mutable; its one owner is `PageCache`."""

    def __init__(self, num_pages: int, namespace: str) -> None:
        self.ledger = PageLedger(num_pages)
        self.tree = RadixTree(namespace)

    def apply(self, change: OwnershipChange) -> None:
        self.ledger.move(change.taken, PageState.OWNED, PageState.CACHED)
        if change.released:
            self.ledger.move(change.released, PageState.CACHED, PageState.FREE)

    def unpin(self, pin: Pin, *, prepared: bool = False) -> None:
        """Release a pin and free its duplicates. With `prepared`, its pages are evicted next (`RadixTree.unpin`)."""
        self.apply(self.tree.unpin(pin, prepared=prepared))
        self.ledger.move([*pin.duplicates.values()], PageState.OWNED, PageState.FREE)

    def evict(self, num_pages: int) -> list[bytes]:
        """Evict `num_pages` pages in the tree's order; return their digests. At least `num_pages` must be evictable."""
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
