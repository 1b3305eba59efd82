"""When a page is copied from the device pool to the host tier: one class for each write policy. Pure.

    write_through            as soon as the page is full, and again on a hit if the copy was skipped
    write_through_selective  on the second hit
    write_back               when the page is about to be evicted

The page cache (cache.py) calls its policy when pages become full, when they are hit, and before an eviction. The policy
starts the copies (copies.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Protocol

from kvist.kv.device_tier import DeviceTier
from kvist.kv.lease import PageLease
from kvist.kv.radix import PageNode
from kvist.kv.tiers.copies import HostCopies

HITS_TO_BACK_UP = 2  # write_through_selective
LOW_WATER_SHARE = 8  # write_back: copies start when fewer than 1 page in LOW_WATER_SHARE is free or prepared


class WritePolicy(Protocol):
    """Starts the backups of one page cache. `nodes` are pages of the lease's path, in prefix order."""

    @property
    def num_pinned(self) -> int:
        """The number of pages pinned only by the policy's own copies: evictable when these copies have ended."""

    def on_full(self, lease: PageLease, nodes: Sequence[PageNode]) -> None:
        """Handle pages that became full."""

    def on_hit(self, lease: PageLease, nodes: Sequence[PageNode]) -> None:
        """Handle pages that an admitted request found in the tree."""

    def make_evictable(self, num_pages: int) -> bool:
        """Return whether the device pool can evict `num_pages` now; if not, start the missing copies."""

    def start_due(self) -> None:
        """Start copies that no request needs yet. Called once in each step."""

    def release(self, lease: PageLease) -> None:
        """Unpin a lease that is closed and has no backup under way."""


class _EarlyCopies:
    """The common part of the policies that copy long before an eviction, so that no eviction waits for a copy."""

    num_pinned = 0

    def __init__(self, device: DeviceTier, copies: HostCopies) -> None:
        self._device = device
        self._copies = copies

    def make_evictable(self, num_pages: int) -> bool:
        return num_pages <= self._device.tree.num_evictable

    def start_due(self) -> None:
        pass

    def release(self, lease: PageLease) -> None:
        self._device.unpin(lease.pin)


class WriteThrough(_EarlyCopies):
    def on_full(self, lease: PageLease, nodes: Sequence[PageNode]) -> None:
        self._copies.back_up(lease, nodes)

    def on_hit(self, lease: PageLease, nodes: Sequence[PageNode]) -> None:
        self._copies.back_up(lease, nodes)


class WriteThroughSelective(_EarlyCopies):
    def on_full(self, lease: PageLease, nodes: Sequence[PageNode]) -> None:
        pass

    def on_hit(self, lease: PageLease, nodes: Sequence[PageNode]) -> None:
        # A page has at most as many hits as its parent.
        self._copies.back_up(lease, [*takewhile(lambda node: node.num_hits >= HITS_TO_BACK_UP, nodes)])


class WriteBack:
    """Copies the path to a page that is about to be evicted, with a pin of its own.

    After the copy the pages are prepared: they are evicted first, without a further wait. A page that cannot be copied
    (no free host slot, or the copy failed) counts as prepared too, and is lost when it is evicted, so no request waits
    for the same page twice. Copies start early, so that `make_evictable` seldom returns False."""

    def __init__(self, device: DeviceTier, copies: HostCopies) -> None:
        self._device = device
        self._copies = copies
        self._own: dict[PageLease, int] = {}  # the policy's own leases → the number of pages that only this lease pins
        self._num_pinned = 0  # in `_own`
        self._low_water = device.ledger.num_pages // LOW_WATER_SHARE + 1

    @property
    def num_pinned(self) -> int:
        return self._num_pinned

    def on_full(self, lease: PageLease, nodes: Sequence[PageNode]) -> None:
        pass

    def on_hit(self, lease: PageLease, nodes: Sequence[PageNode]) -> None:
        pass

    def start_due(self) -> None:
        self.make_evictable(self._low_water - self._device.ledger.num_free)

    def make_evictable(self, num_pages: int) -> bool:
        tree, host = self._device.tree, self._copies.host
        while tree.num_prepared + self._num_pinned < num_pages and (node := tree.oldest_idle()) is not None:
            known = host.get(node.digest)
            if known is not None and known.resident:
                tree.mark_prepared(node)
            elif self._copies.has_room_for_backup:
                self._copy_path(node)
            else:
                break
        return num_pages <= tree.num_prepared

    def _copy_path(self, leaf: PageNode) -> None:
        """Copy the pages of the path that the host tier lacks, first page first: the host tier has whole prefixes
        only."""
        pin, num_pinned = self._device.tree.pin_path(leaf)
        lease = PageLease(page_ids=[], num_cached_tokens=0, pin=pin)
        lease.close()
        self._own[lease] = num_pinned
        self._num_pinned += num_pinned
        nodes = self._device.tree.tail(pin, pin.num_pages)
        for node in nodes:
            node.num_hits = 0  # if a hit is counted during the copy, the page is in use again
        if not self._copies.back_up(lease, nodes, exceeds_limit=True):  # no free host slot
            self.release(lease)

    def release(self, lease: PageLease) -> None:
        self._device.unpin(lease.pin, prepared=lease in self._own)
        self._num_pinned -= self._own.pop(lease, 0)


WRITE_POLICIES: dict[str, Callable[[DeviceTier, HostCopies], WritePolicy]] = {
    "write_through": WriteThrough,
    "write_through_selective": WriteThroughSelective,
    "write_back": WriteBack,
}
