"""Keeps one worker's pages in the index equal to the worker's own, by its page events. PURE.

    start ──► LISTING ──last piece──► FOLLOWING ──gap | other sums | over its share──► due ──► LISTING

A new feed lists the worker's pages, a few pieces at a time (`ListPages`). A message that is lost leaves a gap in the
sequence; anything else that goes wrong shows in the sums. In both cases the pages are listed again, and until that is
complete the index serves with what it knows.

A worker whose sums are never right is listed at growing intervals, up to `MAX_WAIT_S`: that costs the gateway little,
and the other workers nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvist.page_index.prefix_index import PrefixIndex
from kvist.request import WorkerId
from kvist.wire import ListPages, PageEvents

NUM_PIECES = 8  # asked for at once: what an engine sends in one iteration
SILENT_S = 1.0  # then the same pieces are asked for again
FIRST_WAIT_S, MAX_WAIT_S = 1.0, 64.0


class Reason(enum.Enum):
    """Why the pages are listed."""

    JOINED = "joined"
    GAP = "gap"
    SUMS = "sums"
    SHARE = "share"


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPages:
    """The gateway's knowledge of the cached pages of one worker's process."""

    num_pages: int = 0  # in the index, counted once in each tier
    num_cut: int = 0  # left out since the pages were listed last
    num_listings: Mapping[str, int] = field(default_factory=dict)  # by `Reason`


class PageFeed:
    """Mutable; owned by its `Worker`."""

    def __init__(self, index: PrefixIndex, worker_id: WorkerId) -> None:
        """The worker has been added to the index."""
        self._index = index
        self._worker_id = worker_id
        self._next_sequence: int | None = None
        self._wanted: int | None = None  # the next piece, while the pages are listed
        self._num_asked = 0  # pieces asked for that have not come
        self._asked_at_s = 0.0  # or the last piece came
        self._due: Reason | None = Reason.JOINED  # the pages are to be listed again
        self._due_at_s = float("-inf")
        self._wait_s = 0.0  # before the next listing; 0 once the sums were right
        self.num_listings = dict.fromkeys(Reason, 0)

    @property
    def num_pages(self) -> int:
        """The worker's pages in the index, counted once in each tier."""
        return self._index.num_pages(self._worker_id)

    @property
    def num_cut(self) -> int:
        """Pages that the index left out, since the pages were listed last."""
        return self._index.num_cut(self._worker_id)

    def known(self) -> KnownPages:
        by_reason = {reason.value: count for reason, count in self.num_listings.items()}
        return KnownPages(num_pages=self.num_pages, num_cut=self.num_cut, num_listings=by_reason)

    @property
    def is_listing(self) -> bool:
        return self._wanted is not None

    def on_events(self, events: PageEvents, now_s: float) -> ListPages | None:
        """Apply a message. Return the request that it makes due, if any. Each message is applied in about 1 ms."""
        if self._next_sequence is not None and events.sequence < self._next_sequence:
            return None  # a repeated message, or one that was overtaken: the gap has been noticed
        if self._next_sequence is not None and events.sequence > self._next_sequence:
            self._make_due(Reason.GAP, now_s)
            self._wanted = None  # what has been listed lacks the changes that are lost
        self._next_sequence = events.sequence + 1
        for changes in events.changes:
            self._index.discard(self._worker_id, changes.tier, changes.removed)
            self._index.store(self._worker_id, changes.tier, changes.stored)
        if events.store is not None:
            self._index.on_store_hints(self._worker_id, found=events.store.found, missing=events.store.missing)
        for listed in events.listed:
            if listed.first_piece == self._wanted:
                self._index.store(self._worker_id, listed.tier, listed.digests)
                self._asked_at_s = now_s
                self._num_asked -= 1
                self._wanted = listed.next_piece
                if listed.next_piece is None:
                    self._index.end_listing(self._worker_id)
        if events.sums and not self.is_listing and self._due is None:
            self._check(events, now_s)
        return self.request(now_s)

    def request(self, now_s: float) -> ListPages | None:
        """Return the request that is due now, if any. Called after each message, and about once a second."""
        if self._due is None and not self.is_listing and self._index.exceeds_share(self._worker_id):
            self._make_due(Reason.SHARE, now_s)
        if self._due is not None and now_s >= self._due_at_s:
            self.num_listings[self._due] += 1
            self._due = None
            self._wait_s = min(max(2 * self._wait_s, FIRST_WAIT_S), MAX_WAIT_S)
            self._index.begin_listing(self._worker_id)
            self._wanted, self._num_asked = 0, 0
        if self._wanted is None or (self._num_asked > 0 and now_s < self._asked_at_s + SILENT_S):
            return None
        self._num_asked, self._asked_at_s = NUM_PIECES, now_s
        return ListPages(first_piece=self._wanted, num_pieces=NUM_PIECES)

    def _make_due(self, reason: Reason, now_s: float) -> None:
        if self._due is None:
            self._due, self._due_at_s = reason, now_s + self._wait_s

    def _check(self, events: PageEvents, now_s: float) -> None:
        if self.num_cut:
            return  # the index cannot have all of them
        if self._index.sums(self._worker_id) == events.sums:
            self._wait_s = 0.0
        else:
            self._make_due(Reason.SUMS, now_s)
