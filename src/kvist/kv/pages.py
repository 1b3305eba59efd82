"""The ledger of page ownership: the state of each page of the pool. The ledger owns no bytes.

    FREE ──► OWNED ──► CACHED          FREE       unused; its bytes mean nothing
      ▲      │ ▲ │        │            OWNED      one request writes it
      ├──────┘ │ ▼        │            IN_FLIGHT  owned by one request; a peer or a load may write or read it
      │     IN_FLIGHT     │            CACHED     in the radix tree, shared by all requests that match it
      └───────────────────┘

free + cached + owned + in_flight == total, always. A page in flight can only become OWNED again: it is never freed or
shared while a peer or a load may still write it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class PageState(enum.IntEnum):
    FREE = 0
    OWNED = 1
    IN_FLIGHT = 2
    CACHED = 3


TRANSITIONS = frozenset(
    {
        (PageState.FREE, PageState.OWNED),  # a lease grows
        (PageState.OWNED, PageState.FREE),  # a lease closes
        (PageState.OWNED, PageState.CACHED),  # a full page enters the tree
        (PageState.OWNED, PageState.IN_FLIGHT),  # a transfer opens
        (PageState.IN_FLIGHT, PageState.OWNED),  # a transfer ends
        (PageState.CACHED, PageState.FREE),  # eviction
    }
)

_FREE, _OWNED = PageState.FREE, PageState.OWNED  # the look-up of an enum member costs as much as changing a state

# The same table by index: hashing enum members would cost more than the rest of `_set`.
_ALLOWED = [[(source, target) in TRANSITIONS for target in PageState] for source in PageState]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCounts:
    """Pages by state: free + cached + owned + in_flight == total. `evictable`: the cached pages without a pin."""

    free: int
    cached: int
    owned: int
    in_flight: int
    evictable: int
    total: int


class PageLedger:
    """The state of every page. Mutable; its one owner is `PageCache`."""

    def __init__(self, num_pages: int) -> None:
        self._states = bytearray(num_pages)  # PageState of each page
        self._counts = [0] * len(PageState)
        self._counts[PageState.FREE] = num_pages
        # Last in, first out, with page 0 on top: the memory of pages that are never needed never becomes resident. The
        # page freed last is also the page most likely to be in a CPU cache.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_pages(self) -> int:
        return len(self._states)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def count(self, state: PageState) -> int:
        return self._counts[state]

    def state(self, page_id: int) -> PageState:
        return PageState(self._states[page_id])

    def allocate(self, num_pages: int) -> list[int]:
        """Take free pages: FREE → OWNED. The caller has checked that enough are free."""
        assert num_pages <= len(self._free), f"{num_pages} pages requested, {len(self._free)} free"
        page_ids = [self._free.pop() for _ in range(num_pages)]
        self._set(page_ids, _FREE, _OWNED)
        return page_ids

    def move(self, page_ids: Sequence[int], source: PageState, target: PageState) -> None:
        """Change the state of pages from `source` to `target`, a row of the transition table."""
        assert source is not _FREE, "`allocate` takes free pages"
        self._set(page_ids, source, target)
        if target is _FREE:
            self._free.extend(page_ids)

    def _set(self, page_ids: Sequence[int], source: PageState, target: PageState) -> None:
        assert _ALLOWED[source][target], f"no transition {source.name} → {target.name}"
        states = self._states
        for page_id in page_ids:
            assert states[page_id] == source, f"page {page_id} is {self.state(page_id).name}, not {source.name}"
            states[page_id] = target
        self._counts[source] -= len(page_ids)
        self._counts[target] += len(page_ids)
