"""The index of all workers' cached pages: digest → the workers that hold the page, by tier. PURE.

Each worker has a number, and an entry has one bit for each number and tier (digest_table.py). `match` walks once over a
prompt's digests and keeps the set of workers that hold every page so far.

A worker's pages are replaced without a gap: `begin_listing` gives the worker a second number, which takes the listed
pages and all later changes, while the pages of both numbers count as held; `end_listing` drops the first number.
Dropped numbers are cleared in slices (`work`), and given out again after that.

A store has a number too: its pages count for every worker that uses the store. They are hints, since a shared store
evicts pages without a report: a page is entered when some worker has stored or found it, and removed when some
worker has missed it. They are kept in two generations, each with half of the store's share. When the newer one is full,
the older one is dropped; a page that is used enters the newer one again.

Bounds: a worker has at most the pages that its spec allows in each tier, and at most its share of `max_pages`; pages
beyond are left out and counted (`num_cut`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvist.page_index.digest_table import Bits, DigestTable, Keys
from kvist.page_index.page_runs import NUMBERS_PER_COLUMN, TIERS, HeldPages, PageRuns
from kvist.request import WorkerId
from kvist.wire import DIGEST_BYTES, PageTier, TierSum

Rows = npt.NDArray[np.uint64]  # [num_pages, 2]: the digests

_STORE_COLUMN: PageTier = "device"  # the column of a store's number
_FEW = 8  # pages that are looked up faster one by one
_MASK = (1 << 64) - 1


@dataclass(slots=True)
class _TierPages:
    """The pages of one number in one tier. Mutable; owned by its `_Listing`."""

    num_pages: int = 0
    xor: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(2, dtype=np.uint64))


@dataclass(slots=True)
class _Listing:
    """A number, and the pages stored under it. Mutable; owned by its `_Member`."""

    number: int
    num_pages: int = 0  # in all tiers
    tiers: dict[PageTier, _TierPages] = field(default_factory=lambda: {tier: _TierPages() for tier in TIERS})
    num_cut: int = 0  # pages beyond the bounds, which are not in the index

    def count(self, tier: PageTier, rows: Rows, changed: npt.NDArray[np.bool_], sign: int) -> None:
        """Add or remove the `changed` ones of these pages."""
        num_changed = int(np.count_nonzero(changed))
        if num_changed:
            pages = self.tiers[tier]
            self.num_pages += sign * num_changed
            pages.num_pages += sign * num_changed
            pages.xor ^= np.bitwise_xor.reduce(rows if num_changed == len(rows) else rows[changed])


@dataclass(slots=True)
class _Member:
    """A worker of the index. Mutable; owned by the `PrefixIndex`."""

    max_pages: Mapping[PageTier, int]
    shown: _Listing
    location: str = ""  # of its store; empty: none
    next: _Listing | None = None  # between `begin_listing` and `end_listing`

    def listings(self) -> list[_Listing]:
        return [self.shown] if self.next is None else [self.shown, self.next]


@dataclass(slots=True)
class _Store:
    """A store of some workers. Mutable; owned by the `PrefixIndex`."""

    newer: _Listing
    older: _Listing | None = None

    def listings(self) -> list[_Listing]:
        return [self.newer] if self.older is None else [self.newer, self.older]


class PrefixIndex:
    """Mutable; owned by the registry. Digests are given as bytes: `DIGEST_BYTES` for each page, joined."""

    def __init__(self, max_pages: int, *, seed: int) -> None:
        """`seed` is secret: clients choose the pages, and must not find two that share an entry."""
        self.max_pages = max_pages
        self._table = DigestTable(len(TIERS))
        self._factors = [np.uint64(seed >> shift & _MASK | 1) for shift in (0, 64)]
        self._members: dict[WorkerId, _Member] = {}
        self._stores: dict[str, _Store] = {}  # by location, of the members
        self._num_listing = 0  # members with a second number
        self._free_numbers = list(range(NUMBERS_PER_COLUMN - 1, -1, -1))
        self._num_numbers = NUMBERS_PER_COLUMN
        self._dropped_numbers: list[int] = []  # free when the table has dropped their bits

    # ---------------------------------------------------------------- members

    def add(self, worker_id: WorkerId, max_pages: Mapping[PageTier, int]) -> None:
        """Add a worker without pages, in the place of one with the same id."""
        self.remove(worker_id)
        self._members[worker_id] = _Member(max_pages, _Listing(self._take_number()))

    def remove(self, worker_id: WorkerId) -> None:
        """Forget a worker and its pages. An unknown id is ignored."""
        member = self._members.pop(worker_id, None)
        if member is not None:
            self._num_listing -= member.next is not None
            for listing in member.listings():
                self._drop(listing)
            self._drop_unused_stores()

    def set_store(self, worker_id: WorkerId, location: str) -> None:
        """Note where the worker's store is; workers with the same location share its pages. Empty: no store."""
        member = self._members[worker_id]
        if location != member.location:
            member.location = location
            if location and location not in self._stores:
                self._stores[location] = _Store(_Listing(self._take_number()))
            self._drop_unused_stores()

    def _drop_unused_stores(self) -> None:
        used = {member.location for member in self._members.values()}
        for location in [each for each in self._stores if each not in used]:
            for listing in self._stores.pop(location).listings():
                self._drop(listing)

    def begin_listing(self, worker_id: WorkerId) -> None:
        """Replace the worker's pages: what is stored from now on is the new set. A second call begins again."""
        member = self._members[worker_id]
        if member.next is not None:
            self._drop(member.next)
        else:
            self._num_listing += 1
        member.next = _Listing(self._take_number())

    def end_listing(self, worker_id: WorkerId) -> None:
        """Drop the pages from before `begin_listing`."""
        member = self._members[worker_id]
        assert member.next is not None
        self._drop(member.shown)
        member.shown, member.next = member.next, None
        self._num_listing -= 1

    # ---------------------------------------------------------------- pages

    def store(self, worker_id: WorkerId, tier: PageTier, digests: bytes) -> int:
        """Add pages. Return how many were left out because of the bounds."""
        member = self._members[worker_id]
        listing = member.next or member.shown
        keys, rows = self._distinct(digests)
        column, bit = self._place_of(listing.number, tier)
        room = self._room(member, listing, tier)
        num_cut = 0
        if len(keys) > room:
            is_new = np.flatnonzero((self._table.bits(keys)[column] & bit) == 0)
            cut = is_new[room:]
            num_cut = len(cut)
            keys, rows = np.delete(keys, cut), np.delete(rows, cut, axis=0)
        listing.count(tier, rows, self._table.set(keys, column, bit), 1)
        listing.num_cut += num_cut
        return num_cut

    def discard(self, worker_id: WorkerId, tier: PageTier, digests: bytes) -> None:
        """Remove pages. Unknown ones are ignored."""
        keys, rows = self._distinct(digests)
        for listing in self._members[worker_id].listings():
            was_set = self._table.clear(keys, *self._place_of(listing.number, tier))
            listing.count(tier, rows, was_set, -1)

    def on_store_hints(self, worker_id: WorkerId, *, found: bytes, missing: bytes) -> None:
        """Add pages that the worker stored or found in its store, and remove pages that it did not find there."""
        store = self._stores.get(self._members[worker_id].location)
        if store is None:
            return
        if missing:
            keys, rows = self._distinct(missing)
            for listing in store.listings():
                was_set = self._table.clear(keys, *self._place_of(listing.number, _STORE_COLUMN))
                listing.count(_STORE_COLUMN, rows, was_set, -1)
        if not found:
            return
        keys, rows = self._distinct(found)
        most = self.share // 2
        if store.newer.num_pages + len(keys) > most:
            if store.older is not None:
                self._drop(store.older)
            store.older, store.newer = store.newer, _Listing(self._take_number())
        num_room = max(0, min(most, self.max_pages - self._table.num_entries))
        keys, rows = keys[:num_room], rows[:num_room]
        column, bit = self._place_of(store.newer.number, _STORE_COLUMN)
        store.newer.count(_STORE_COLUMN, rows, self._table.set(keys, column, bit), 1)

    def num_store_pages(self, worker_id: WorkerId) -> int:
        """Return the number of known pages of the worker's store; a page of both generations counts twice."""
        store = self._stores.get(self._members[worker_id].location)
        return 0 if store is None else sum(listing.num_pages for listing in store.listings())

    def match(self, pieces: Iterable[bytes]) -> dict[WorkerId, HeldPages]:
        """Return the leading pages that each worker holds, of the workers that hold the first one or have it in their
        store.

        `pieces` are the digests of a prompt's pages, in order, in pieces of any size; they are drawn only as long as
        some worker has every page."""
        num_groups = self._num_numbers // NUMBERS_PER_COLUMN
        runs = PageRuns(num_groups)
        readers = self._readers()
        for piece in pieces:
            if len(piece) <= _FEW * DIGEST_BYTES and not self._num_listing:
                goes_on = True
                for key in self._few_keys(piece):
                    bits = self._table.bits_of(key)
                    stored = [0] * num_groups
                    for column, bit, group, workers in readers:
                        if bits[column] & bit:
                            stored[group] |= workers
                    if not (goes_on := runs.add(bits, stored)):
                        break
            else:
                columns = self._table.bits(self._keys_of(_rows(piece)))
                if self._num_listing:
                    self._show_both(columns)
                goes_on = runs.extend(columns, self._stored_bits(columns, readers, num_groups))
            if not goes_on:
                break
        lengths = runs.lengths()
        found = {}
        for worker_id, member in self._members.items():
            held = lengths.get(member.shown.number)
            if held is not None:
                found[worker_id] = held
        return found

    # ---------------------------------------------------------------- state

    @property
    def num_entries(self) -> int:
        return self._table.num_entries

    @property
    def num_bytes(self) -> int:
        return self._table.num_bytes

    def num_pages(self, worker_id: WorkerId) -> int:
        """Return the number of the worker's pages, counted once in each tier."""
        member = self._members.get(worker_id)
        return 0 if member is None else (member.next or member.shown).num_pages

    def num_cut(self, worker_id: WorkerId) -> int:
        """Return how many pages of the current listing were left out."""
        member = self._members[worker_id]
        return (member.next or member.shown).num_cut

    def sums(self, worker_id: WorkerId) -> tuple[TierSum, ...]:
        """Return count and XOR of the worker's pages in each tier, of the new listing if there is one."""
        member = self._members[worker_id]
        tiers = (member.next or member.shown).tiers
        return tuple(
            TierSum(tier=tier, num_pages=pages.num_pages, xor=pages.xor.tobytes()) for tier, pages in tiers.items()
        )

    def exceeds_share(self, worker_id: WorkerId) -> bool:
        """Return whether the worker has more pages than its share, since other workers have joined."""
        return self.num_pages(worker_id) > self.share

    @property
    def share(self) -> int:
        """The most pages that one worker, or one store, may have."""
        return self.max_pages // max(1, len(self._members) + len(self._stores))

    @property
    def has_work(self) -> bool:
        return self._table.has_work

    def work(self, num_slots: int) -> None:
        """Do a slice of the work that is left: on `num_slots` slots of the table."""
        self._table.work(num_slots)
        if self._dropped_numbers and not self._table.is_dropping:
            self._free_numbers += self._dropped_numbers
            self._dropped_numbers = []

    # ---------------------------------------------------------------- numbers and bits

    def _take_number(self) -> int:
        if not self._free_numbers:
            first = self._num_numbers
            self._num_numbers += NUMBERS_PER_COLUMN
            self._free_numbers = list(range(self._num_numbers - 1, first - 1, -1))
            for _ in TIERS:
                self._table.add_column()
        return self._free_numbers.pop()

    def _drop(self, listing: _Listing) -> None:
        for tier in TIERS:
            self._table.drop(*self._place_of(listing.number, tier))
        self._dropped_numbers.append(listing.number)

    def _place_of(self, number: int, tier: PageTier) -> tuple[int, np.uint32]:
        group, place = divmod(number, NUMBERS_PER_COLUMN)
        return group * len(TIERS) + TIERS.index(tier), np.uint32(1 << place)

    def _room(self, member: _Member, listing: _Listing, tier: PageTier) -> int:
        return max(
            0,
            min(
                member.max_pages.get(tier, 0) - listing.tiers[tier].num_pages,
                self.share - listing.num_pages,
                self.max_pages - self._table.num_entries,
            ),
        )

    def _distinct(self, digests: bytes) -> tuple[Keys, Rows]:
        """Return the keys and digests in ascending order of keys, each once."""
        rows = _rows(digests)
        keys = self._keys_of(rows)
        order = np.argsort(keys)
        keys, rows = keys[order], rows[order]
        repeated = keys[1:] == keys[:-1]
        if repeated.any():
            first = np.concatenate(([True], ~repeated))
            keys, rows = keys[first], rows[first]
        return keys, rows

    def _keys_of(self, rows: Rows) -> Keys:
        keys: Keys = rows[:, 0] * self._factors[0] + rows[:, 1] * self._factors[1]
        keys[keys == 0] = 1  # the table's mark of a free slot
        return keys

    def _few_keys(self, digests: bytes) -> Iterator[int]:
        """Yield what `_keys_of` returns."""
        numbers = struct.unpack(f"<{len(digests) // 8}Q", digests)
        first, second = map(int, self._factors)
        for low, high in zip(numbers[::2], numbers[1::2], strict=True):
            yield (low * first + high * second) & _MASK or 1

    def _readers(self) -> list[tuple[int, int, int, int]]:
        """Return (column, bit, group, bits of workers) for each number of a store and each group of workers that use
        the store."""
        if not self._stores:
            return []
        workers: dict[tuple[str, int], int] = {}
        for member in self._members.values():
            if member.location:
                group, place = divmod(member.shown.number, NUMBERS_PER_COLUMN)
                key = member.location, group
                workers[key] = workers.get(key, 0) | 1 << place
        readers = []
        for (location, group), bits in workers.items():
            for listing in self._stores[location].listings():
                column, bit = self._place_of(listing.number, _STORE_COLUMN)
                readers.append((column, int(bit), group, bits))
        return readers

    def _stored_bits(
        self, columns: list[Bits], readers: list[tuple[int, int, int, int]], num_groups: int
    ) -> list[Bits]:
        """Return for each group the bits of the workers that have the pages in their store."""
        stored = [np.zeros(len(columns[0]), dtype=np.uint32) for _ in range(num_groups)]
        for column, bit, group, workers in readers:
            stored[group][(columns[column] & np.uint32(bit)) != 0] |= np.uint32(workers)
        return stored

    def _show_both(self, columns: list[Bits]) -> None:
        """Let the pages of a worker's second number count for the first one too."""
        for member in self._members.values():
            if member.next is None:
                continue
            for tier in TIERS:
                column, bit = self._place_of(member.shown.number, tier)
                next_column, next_bit = self._place_of(member.next.number, tier)
                columns[column][(columns[next_column] & next_bit) != 0] |= bit


def _rows(digests: bytes) -> Rows:
    return np.frombuffer(digests, dtype="<u8").reshape(-1, DIGEST_BYTES // 8)
