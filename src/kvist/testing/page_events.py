"""Page events for tests: made in one line, and replayed as a gateway replays them."""

from __future__ import annotations

from collections.abc import Iterable

from kvist.wire import PageEvents, PageTier


def page_event(*stored: bytes, removed: tuple[bytes, ...] = (), tier: PageTier = "device") -> PageEvents:
    return PageEvents(tier=tier, stored=stored, removed=removed)


def pages_in(events: Iterable[PageEvents]) -> set[tuple[PageTier, bytes]]:
    """Return the pages that the events store, each with its tier."""
    return {(event.tier, digest) for event in events for digest in event.stored}


def digests_in(events: Iterable[PageEvents]) -> set[bytes]:
    """Return the pages that the events store in any tier."""
    return {digest for _, digest in pages_in(events)}


class ReplayedPages:
    """The pages of each tier by the events so far. Fails if an event is not a net change."""

    def __init__(self) -> None:
        self.pages: set[tuple[PageTier, bytes]] = set()

    def apply(self, events: Iterable[PageEvents]) -> None:
        for event in events:
            stored = {(event.tier, digest) for digest in event.stored}
            removed = {(event.tier, digest) for digest in event.removed}
            assert stored | removed, "an event without a change"
            assert not stored & removed
            assert not stored & self.pages, "a page is stored in its tier already"
            assert removed <= self.pages, "a page is removed from a tier that does not have it"
            self.pages = (self.pages - removed) | stored
