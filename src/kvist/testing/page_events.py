"""Changes of cached pages for tests: made in one line, replayed, and listed as a gateway lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvist.plan.plan import ChangedPages
from kvist.wire import DIGEST_BYTES, ListedPages, PageTier, TierChanges


def changed_pages(*stored: bytes, removed: tuple[bytes, ...] = (), tier: PageTier = "device") -> ChangedPages:
    return ChangedPages(tier=tier, stored=stored, removed=removed)


def short(digest: bytes) -> bytes:
    """Return the digest as in page events; a test's digest may have any length."""
    return digest[:DIGEST_BYTES].ljust(DIGEST_BYTES, b"\0")


def joined(*digests: bytes) -> bytes:
    """Return the digests as one field of a message."""
    return b"".join(map(short, digests))


def split(digests: bytes) -> list[bytes]:
    """Return the digests in one field of a message."""
    return [digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)]


def tier_changes(*stored: bytes, removed: tuple[bytes, ...] = (), tier: PageTier = "device") -> TierChanges:
    return TierChanges(tier=tier, stored=joined(*stored), removed=joined(*removed))


def listed_pages(list_pages: Callable[[int], ListedPages]) -> set[tuple[PageTier, bytes]]:
    """Return all pages in the list, each with its tier, read piece by piece."""
    found: set[tuple[PageTier, bytes]] = set()
    piece: int | None = 0
    while piece is not None:
        listed = list_pages(piece)
        assert listed.first_piece == piece
        new = {(listed.tier, digest) for digest in split(listed.digests)}
        assert len(new) * DIGEST_BYTES == len(listed.digests), "a page is twice in a piece"
        assert not new & found, "a page is in two pieces"
        found |= new
        piece = listed.next_piece
    return found


class ReplayedPages:
    """The pages of each tier by the changes so far, as `short` digests. Fails if a change is not net."""

    def __init__(self) -> None:
        self.pages: set[tuple[PageTier, bytes]] = set()

    def apply(self, changes: Iterable[ChangedPages]) -> None:
        for changed in changes:
            stored = {(changed.tier, short(digest)) for digest in changed.stored}
            removed = {(changed.tier, short(digest)) for digest in changed.removed}
            assert stored | removed, "a value without a change"
            assert not stored & removed
            assert not stored & self.pages, "a page is stored in its tier already"
            assert removed <= self.pages, "a page is removed from a tier that does not have it"
            self.pages = (self.pages - removed) | stored


def listed_digests(list_pages: Callable[[int], ListedPages]) -> set[bytes]:
    """Return the pages in the list, in any tier, as `short` digests."""
    return {digest for _, digest in listed_pages(list_pages)}
