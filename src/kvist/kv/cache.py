"""The page cache: what a scheduler asks for pages. It joins the ledger (pages.py) and the radix tree (radix.py).

A request's life here: `open` pins the longest cached prefix; `grow` gives it pages of its own, evicting unused cached
pages when none is free; `commit` says how much K/V is written, and its full pages enter the tree for others to match;
`close` lets go of everything. While a peer may touch its pages, `begin_transfer` … `end_transfer` keep them IN_FLIGHT.

It moves no bytes, keeps no tokens of its own and knows no requests. A committed page is never written again; the
page being filled is always the lease's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvist.kv.keys import iter_page_keys, page_keys
from kvist.kv.pages import PageCounts, PageLedger, PageState
from kvist.kv.radix import Moves, Pin, RadixTree


@dataclass(slots=True, eq=False)
class PageLease:
    """One request's pages. Mutable; its one owner is the `PageCache` that opened it: others only read it."""

    page_ids: list[int]  # page i holds tokens [i * page_size, (i + 1) * page_size)
    num_cached_tokens: int  # whole pages found in the tree when the lease was opened
    _pin: Pin = field(repr=False)
    _in_flight: list[int] = field(default_factory=list, repr=False)
    _closed: bool = False


class PageCache:
    """Mutable; its one owner is the scheduler. Every call is synchronous and touches no clock."""

    def __init__(self, *, num_pages: int, page_size: int, namespace: str) -> None:
        assert num_pages > 0
        assert page_size > 0
        self._page_size = page_size
        self._ledger = PageLedger(num_pages)
        self._tree = RadixTree(namespace)

    @property
    def page_size(self) -> int:
        return self._page_size

    @property
    def num_pages(self) -> int:
        return self._ledger.num_pages

    def open(self, token_ids: Sequence[int], *, cache_salt: str = "", max_tokens: int) -> PageLease:
        """Pins the longest cached prefix of `token_ids`: whole pages, at most `max_tokens` tokens.

        Who must compute at least the last token passes `len(token_ids) - 1`.
        """
        num_pages = min(len(token_ids), max_tokens) // self._page_size
        pin = self._tree.pin(iter_page_keys(token_ids, self._page_size, num_pages), cache_salt)
        return PageLease(page_ids=pin.page_ids, num_cached_tokens=pin.num_pages * self._page_size, _pin=pin)

    def grow(self, lease: PageLease, num_tokens: int) -> bool:
        """Makes `lease.page_ids` cover `num_tokens`, evicting if need be.

        False if too few pages are free or evictable: then nothing was done.
        """
        num_pages = -(-num_tokens // self._page_size) - len(lease.page_ids)
        if num_pages <= 0:
            return True
        assert not lease._closed
        num_short = num_pages - self._ledger.num_free
        if num_short > 0:
            if num_short > self._tree.num_evictable:
                return False
            self._evict(num_short)
        lease.page_ids.extend(self._ledger.allocate(num_pages))
        return True

    def commit(self, lease: PageLease, token_ids: Sequence[int], num_tokens: int) -> None:
        """K/V of `token_ids[:num_tokens]` is written: its full pages enter the tree, pinned by this lease.

        Called again with more tokens as they come; the lease remembers how far it is. A page that another request
        uses for the same tokens already stays owned by this lease. The pages must not be in flight.
        """
        first, last = lease._pin.num_pages, num_tokens // self._page_size
        if last <= first:  # most calls: no page became full
            return
        assert not lease._closed
        assert num_tokens <= len(token_ids), "committed beyond the tokens"
        assert last <= len(lease.page_ids), "committed beyond the pages"
        assert not lease._in_flight, "end the transfer before the pages are shared"
        keys = page_keys(token_ids, self._page_size, first, last)
        self._apply(self._tree.extend(lease._pin, keys, lease.page_ids[first:last]))

    def close(self, lease: PageLease) -> None:
        """Unpins what is shared and frees what the lease owns. No page of it may be in flight. Once only."""
        assert not lease._closed, "a lease is closed once"
        assert not lease._in_flight, "a peer may still touch these pages: end the transfer first"
        lease._closed = True
        self._apply(self._tree.unpin(lease._pin))
        self._ledger.move([*lease._pin.duplicates.values()], PageState.OWNED, PageState.FREE)
        self._ledger.move(lease.page_ids[lease._pin.num_pages :], PageState.OWNED, PageState.FREE)
        lease.page_ids = []  # a new list: a plan may still hold the old one

    def begin_transfer(self, lease: PageLease, first_page: int) -> None:
        """A peer may touch `lease.page_ids[first_page:]` from now on: those not committed become IN_FLIGHT.

        Committed pages need no mark: they are final, and the lease holds them until it closes.
        """
        assert not lease._closed
        in_flight = set(lease._in_flight)
        uncommitted = lease.page_ids[max(first_page, lease._pin.num_pages) :]
        page_ids = [page_id for page_id in uncommitted if page_id not in in_flight]
        self._ledger.move(page_ids, PageState.OWNED, PageState.IN_FLIGHT)
        lease._in_flight.extend(page_ids)

    def end_transfer(self, lease: PageLease) -> None:
        """No peer touches the lease's pages any more: those in flight are its own again."""
        self._ledger.move(lease._in_flight, PageState.IN_FLIGHT, PageState.OWNED)
        lease._in_flight = []

    def probe(self, token_ids: Sequence[int], cache_salt: str = "") -> int:
        """How many tokens `open` would find cached. Changes nothing, not even what is evicted next."""
        keys = iter_page_keys(token_ids, self._page_size, len(token_ids) // self._page_size)
        return len(self._tree.match(keys, cache_salt)) * self._page_size

    def flush(self) -> int:
        """Frees every cached page that no lease uses; returns how many."""
        num_pages = self._tree.num_evictable
        self._evict(num_pages)
        return num_pages

    def counts(self) -> PageCounts:
        count = self._ledger.count
        return PageCounts(
            free=count(PageState.FREE),
            cached=count(PageState.CACHED),
            owned=count(PageState.OWNED),
            in_flight=count(PageState.IN_FLIGHT),
            evictable=self._tree.num_evictable,
            total=self._ledger.num_pages,
        )

    def drain_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Digests of pages that (became cached, ceased to be) since the last call, netted."""
        return self._tree.drain_changes()

    def digests(self) -> list[bytes]:
        """The digest of every cached page, a prefix before what continues it."""
        return [node.digest for node in self._tree.nodes()]

    def _evict(self, num_pages: int) -> None:
        page_ids = [self._tree.evict() for _ in range(num_pages)]
        self._ledger.move(page_ids, PageState.CACHED, PageState.FREE)

    def _apply(self, moves: Moves) -> None:
        self._ledger.move(moves.taken, PageState.OWNED, PageState.CACHED)
        if moves.released:
            self._ledger.move(moves.released, PageState.CACHED, PageState.FREE)
