"""The cached pages of one worker, by its page events: which tiers hold each page. PURE.

A page counts as cached while any tier holds it: a page in the host tier saves the computation as well. Events are
hints: they arrive late, and beyond the limit new pages are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import get_args

from kvist.wire import PageEvents, PageTier

_BITS: dict[PageTier, int] = {tier: 1 << index for index, tier in enumerate(get_args(PageTier))}


class KnownPages:
    """Mutable; owned by its `Worker`."""

    def __init__(self, max_pages: int) -> None:
        self._max_pages = max_pages
        self._tiers: dict[bytes, int] = {}  # by digest, a bit for each tier that holds the page; never 0
        self.is_limited = False  # the worker has more pages than are tracked here

    @property
    def digests(self) -> AbstractSet[bytes]:
        """The pages in any tier. A view, which changes with the next event."""
        return self._tiers.keys()

    def apply(self, events: Iterable[PageEvents]) -> None:
        """Apply one report's events, at most one per tier."""
        for event in events:
            self._remove(event.removed, _BITS[event.tier])
        for event in events:
            self._store(event.stored, _BITS[event.tier])

    def clear(self) -> None:
        self._tiers.clear()
        self.is_limited = False

    def _remove(self, digests: Iterable[bytes], bit: int) -> None:
        for digest in digests:
            left = self._tiers.get(digest, 0) & ~bit
            if left:
                self._tiers[digest] = left
            else:
                self._tiers.pop(digest, None)

    def _store(self, digests: Iterable[bytes], bit: int) -> None:
        for digest in digests:
            held = self._tiers.get(digest, 0)
            if held or len(self._tiers) < self._max_pages:
                self._tiers[digest] = held | bit
            else:
                self.is_limited = True
