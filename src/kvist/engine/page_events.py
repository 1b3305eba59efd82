"""Makes PageEvents: the changes of this engine's cached pages, and lists of all of them, for every gateway.

Changes are sent to all gateways at the same time, `MIN_INTERVAL_S` after the previous ones or later, in pieces of
`MAX_DIGESTS`. A gateway lists all pages by asking for a few pieces at a time (`ListPages`): a slow gateway is not
flooded, and the engine spends a bounded time in each iteration. A piece of a list is sent after all changes up to then:
the piece and the later changes together are the truth about its pages.

With the last piece of a list, and once a second, the sums of all pages go along, by which the gateway checks its own.

Pages seen in the store go along as hints: they are in no list and no sum, and those that no message has room for are
dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import get_args

import numpy as np

from kvist import wire
from kvist.engine.gateways import ConnectedGateway, Gateways
from kvist.plan.plan import ChangedPages, SeenInStore
from kvist.wire import DIGEST_BYTES, MAX_DIGESTS

MIN_INTERVAL_S = 0.05
SUMS_INTERVAL_S = 1.0
_MAX_HINTS = 8 * MAX_DIGESTS  # that wait for a message
_PIECES_AT_ONCE = 8  # of changes, and of lists, in one call: about 1 ms each


class _TierLog:
    """Changes of one tier that are not sent yet, and the sum of all sent ones. Mutable; owned by `PageEventLog`."""

    def __init__(self, tier: wire.PageTier) -> None:
        self._tier: wire.PageTier = tier
        self._stored: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}
        self._full: deque[wire.TierChanges] = deque()
        self._num_pages = 0
        self._xor = np.zeros(DIGEST_BYTES // 8, dtype=np.uint64)

    def __bool__(self) -> bool:
        return bool(self._stored or self._removed or self._full)

    def record(self, changed: ChangedPages) -> None:
        for digest in changed.removed:
            if digest in self._stored:
                del self._stored[digest]
            else:
                self._removed[digest] = None
                if len(self._removed) == MAX_DIGESTS:
                    self._full.append(self._close())
        for digest in changed.stored:
            if digest in self._removed:
                del self._removed[digest]
            else:
                self._stored[digest] = None
                if len(self._stored) == MAX_DIGESTS:
                    self._full.append(self._close())

    def take(self) -> wire.TierChanges | None:
        """Return the oldest changes, one piece at most."""
        if not self:
            return None
        changes = self._full.popleft() if self._full else self._close()
        for digests, sign in ((changes.stored, 1), (changes.removed, -1)):
            rows = np.frombuffer(digests, dtype="<u8").reshape(-1, DIGEST_BYTES // 8)
            self._num_pages += sign * len(rows)
            self._xor ^= np.bitwise_xor.reduce(rows, axis=0)
        return changes

    def sum(self) -> wire.TierSum:
        return wire.TierSum(tier=self._tier, num_pages=self._num_pages, xor=self._xor.tobytes())

    def _close(self) -> wire.TierChanges:
        changes = wire.TierChanges(tier=self._tier, stored=_joined(self._stored), removed=_joined(self._removed))
        self._stored, self._removed = {}, {}
        return changes


class _HintLog:
    """Hints about the store that are not sent yet. Mutable; owned by `PageEventLog`."""

    def __init__(self) -> None:
        self._found: dict[bytes, bool] = {}  # digest → whether the page was found, oldest first

    def __bool__(self) -> bool:
        return bool(self._found)

    def record(self, seen: SeenInStore) -> None:
        for digests, is_found in ((seen.found, True), (seen.missing, False)):
            for digest in digests:
                self._found.pop(digest, None)
                self._found[digest] = is_found
        while len(self._found) > _MAX_HINTS:
            del self._found[next(iter(self._found))]

    def take(self) -> wire.StoreHints | None:
        """Return the oldest hints, as many as one field of a message has room for."""
        if not self._found:
            return None
        some = dict(islice(self._found.items(), MAX_DIGESTS))
        for digest in some:
            del self._found[digest]
        found = _joined({digest: None for digest, is_found in some.items() if is_found})
        return wire.StoreHints(
            found=found, missing=_joined({digest: None for digest, is_found in some.items() if not is_found})
        )


class PageEventLog:
    """Mutable; owned by the engine loop."""

    def __init__(self, *, list_pages: Callable[[int], wire.ListedPages]) -> None:
        """`list_pages` returns a piece of the list of all pages, by its number (`PageCache.list_pages`)."""
        self._list_pages = list_pages
        self._tiers = {tier: _TierLog(tier) for tier in get_args(wire.PageTier)}
        self._hints = _HintLog()
        self._last_changes_s = self._last_sums_s = float("-inf")

    def record(self, changed_pages: Sequence[ChangedPages], seen_in_store: SeenInStore | None = None) -> None:
        if seen_in_store is not None:
            self._hints.record(seen_in_store)
        for changed in changed_pages:
            self._tiers[changed.tier].record(changed)

    def due_at_s(self, gateways: Gateways) -> float:
        readers = [gateway.pages for gateway in gateways if gateway.pages is not None]
        if any(pages.wanted is not None for pages in readers):
            return float("-inf")
        if self._hints or any(self._tiers.values()):
            return self._last_changes_s + MIN_INTERVAL_S
        return self._last_sums_s + SUMS_INTERVAL_S if readers else float("inf")

    def make(self, gateways: Gateways, now_s: float) -> Iterator[tuple[bytes, wire.PageEvents]]:
        """Make the messages that are due. Exhaust the iterator: the changes are in these messages only."""
        if now_s < self.due_at_s(gateways):
            return
        readers = [gateway for gateway in gateways if gateway.pages is not None]
        for changes, hints in self._take_changes(now_s):
            for gateway in readers:
                yield _message(gateway, changes=changes, hints=hints)
        if any(self._tiers.values()):
            return  # a list follows all changes up to then
        num_left = _PIECES_AT_ONCE
        for gateway in readers:
            for listed in self._listed(gateway, num_left):
                num_left -= 1
                sums = self._sums() if listed.next_piece is None else ()
                yield _message(gateway, listed=(listed,), sums=sums)
        if now_s >= self._last_sums_s + SUMS_INTERVAL_S:
            self._last_sums_s = now_s
            for gateway in readers:
                yield _message(gateway, sums=self._sums())

    def _take_changes(self, now_s: float) -> Iterator[tuple[tuple[wire.TierChanges, ...], wire.StoreHints | None]]:
        for _ in range(_PIECES_AT_ONCE):
            changes, hints = tuple(filter(None, (log.take() for log in self._tiers.values()))), self._hints.take()
            if not changes and hints is None:
                return
            self._last_changes_s = now_s
            yield changes, hints

    def _listed(self, gateway: ConnectedGateway, num_pieces: int) -> Iterator[wire.ListedPages]:
        """Yield the pieces that the gateway asked for, `num_pieces` at most; the others are left for the next call."""
        pages = gateway.pages
        assert pages is not None
        for _ in range(num_pieces):
            if pages.wanted is None:
                return
            listed = self._list_pages(pages.wanted.first_piece)
            num_left = pages.wanted.num_pieces - 1
            more = listed.next_piece is not None and num_left > 0
            pages.wanted = wire.ListPages(first_piece=listed.next_piece or 0, num_pieces=num_left) if more else None
            yield listed

    def _sums(self) -> tuple[wire.TierSum, ...]:
        return tuple(log.sum() for log in self._tiers.values())


def _message(
    gateway: ConnectedGateway,
    *,
    changes: tuple[wire.TierChanges, ...] = (),
    listed: tuple[wire.ListedPages, ...] = (),
    sums: tuple[wire.TierSum, ...] = (),
    hints: wire.StoreHints | None = None,
) -> tuple[bytes, wire.PageEvents]:
    assert gateway.pages is not None
    sequence = gateway.pages.next_sequence
    gateway.pages.next_sequence += 1
    events = wire.PageEvents(sequence=sequence, changes=changes, listed=listed, sums=sums, store=hints)
    return gateway.identity, events


def _joined(digests: dict[bytes, None]) -> bytes:
    return b"".join([digest[:DIGEST_BYTES] for digest in digests])
