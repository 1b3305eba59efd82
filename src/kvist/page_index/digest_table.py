"""A hash table of page digests, in numpy arrays: a digest → bits. PURE.

Keys are 64-bit numbers, and each column has 32 bits for each key. Collisions go to the next free slot (open addressing,
linear probing). Home slots keep the order of the keys, so that a batch in ascending order touches memory in order.

A table that fills up moves to a larger one in slices (`work`): the new memory is touched, which costs time the first
time, then the entries move, and the old memory is given back. On the way, an entry's bits are in exactly one of the
two. A key without bits keeps its slot, for the same key, until the next move leaves it behind.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Bits = npt.NDArray[np.uint32]
Slots = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_LEAST_SLOTS = 1 << 13
_NEARLY_FULL = 0.5  # part of the slots in use that starts a move
_FULL = 0.7  # part of the slots in use at which a store waits for the move
_ROOM = 2.8  # slots for each entry, after a move
_TAIL_SLOTS = 1 << 10  # no key's home, at the end: several times the longest way from a home to a slot
SLOTS_PER_STORED_KEY = 12  # to be worked on between two stores: a move then ends before any store waits for it


class _Slots:
    """Slots, in one array for the keys and one for each column. Mutable; owned by its `DigestTable`.

    The arrays are mapped in the system's small pages: numpy asks for large ones, which may take milliseconds each."""

    def __init__(self, num_slots: int, num_columns: int) -> None:
        self.num_slots = num_slots
        self.num_used = 0
        self._maps: list[tuple[mmap.mmap, int]] = []  # with the bytes of a slot
        self._bits_at: list[memoryview] = []  # the columns again, faster for one slot
        self._num_released = 0
        keys = self._map(8)
        self.keys: Keys = np.frombuffer(keys, dtype=np.uint64)  # 0: a free slot
        self._key_at = memoryview(keys).cast("Q")  # the keys again, faster for one slot
        self.columns: list[Bits] = []
        for _ in range(num_columns):
            self.add_column()

    def add_column(self) -> None:
        column = self._map(4)
        self.columns.append(np.frombuffer(column, dtype=np.uint32))
        self._bits_at.append(memoryview(column).cast("I"))

    def _map(self, slot_bytes: int) -> mmap.mmap:
        mapped = mmap.mmap(-1, self.num_slots * slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._maps.append((mapped, slot_bytes))
        return mapped

    def release(self, num_slots: int) -> None:
        """Give back the memory of the first `num_slots` slots, which have no bits. Keys that begin there, but were
        placed behind `num_slots`, stay in reach: the last slots before `num_slots` are kept."""
        last = (num_slots - _TAIL_SLOTS) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > self._num_released:
            for mapped, slot_bytes in self._maps:
                mapped.madvise(
                    mmap.MADV_DONTNEED, self._num_released * slot_bytes, (last - self._num_released) * slot_bytes
                )
            self._num_released = last

    def touch(self, piece: slice) -> None:
        """Write to fresh memory, so that the system provides it."""
        self.keys[piece] = 0
        for column in self.columns:
            column[piece] = 0

    def find(self, keys: Keys) -> tuple[Slots, Slots]:
        """Return the slots of the keys that are here, and the places of these keys in `keys`."""
        slots = self._homes(keys)
        found = self.keys[slots]
        here = found == keys
        todo = np.flatnonzero(~here & (found != 0))
        while len(todo):
            at = slots[todo] = slots[todo] + 1
            found = self.keys[at]
            is_here = found == keys[todo]
            here[todo[is_here]] = True
            todo = todo[~is_here & (found != 0)]
        places = np.flatnonzero(here)
        return slots[places], places

    def slot_of(self, key: int) -> int | None:
        """Return the slot of a key, or None if the key is not here."""
        at = (key >> 32) * (self.num_slots - _TAIL_SLOTS) >> 32
        while True:
            found = self._key_at[at]
            if found == key:
                return at
            if not found:
                return None
            at += 1

    def bits_at(self, at: int) -> list[int]:
        return [bits[at] for bits in self._bits_at]

    def place(self, keys: Keys) -> Slots:
        """Return the slots of the keys, which are distinct. Enters the keys that are missing."""
        slots = self._homes(keys)
        at, wanted, todo = slots, keys, np.arange(len(keys))
        while len(todo):
            found = self.keys[at]
            is_free = found == 0
            if is_free.any():
                self.keys[at[is_free]] = wanted[is_free]  # of two keys for one slot, the last wins
                found = self.keys[at]
                self.num_used += int(np.count_nonzero(is_free & (found == wanted)))
            todo = todo[found != wanted]
            slots[todo] += 1
            at, wanted = slots[todo], keys[todo]
        return slots

    def are_empty(self, at: Slots | slice) -> Flags:
        """Return for each slot whether it has no bits in any column."""
        held = self.columns[0][at]
        for column in self.columns[1:]:
            held = held | column[at]
        empty: Flags = np.equal(held, 0)
        return empty

    def take_bits(self, at: Slots, source: _Slots, from_: Slots) -> None:
        """Move the bits of the source's slots `from_` here, to the slots `at`."""
        for ours, theirs in zip(self.columns, source.columns, strict=True):
            ours[at] |= theirs[from_]
            theirs[from_] = 0

    def _homes(self, keys: Keys) -> Slots:
        return (((keys >> np.uint64(32)) * np.uint64(self.num_slots - _TAIL_SLOTS)) >> np.uint64(32)).astype(np.int64)


class DigestTable:
    """Mutable; owned by the `PrefixIndex`."""

    def __init__(self, num_columns: int) -> None:
        self._current = _Slots(_LEAST_SLOTS, num_columns)
        self._fresh: _Slots | None = None  # is being touched, and becomes `_current`
        self._num_touched = 0  # slots of `_fresh`
        self._old: _Slots | None = None  # is emptied into `_current`
        self._num_moved = 0  # slots of `_old`
        self._dropped = [np.uint32(0)] * num_columns  # bits that no key keeps, by column
        self._num_swept = 0  # slots of `_current` without any of the dropped bits
        self.num_entries = 0  # keys with bits

    @property
    def num_columns(self) -> int:
        return len(self._dropped)

    @property
    def num_bytes(self) -> int:
        """Size of all arrays, whether touched or not."""
        tables = [*self._arrays(), *filter(None, (self._fresh,))]
        return sum(slots.keys.nbytes + sum(bits.nbytes for bits in slots.columns) for slots in tables)

    def add_column(self) -> None:
        for slots in (*self._arrays(), *filter(None, (self._fresh,))):
            slots.add_column()
        self._dropped.append(np.uint32(0))

    def bits(self, keys: Keys) -> list[Bits]:
        """Return the keys' bits, by column."""
        found: list[Bits] = [np.zeros(len(keys), dtype=np.uint32) for _ in range(self.num_columns)]
        for slots in self._arrays():
            at, places = slots.find(keys)
            if len(places):
                for column, bits in zip(found, slots.columns, strict=True):
                    column[places] |= bits[at]
        return found

    def bits_of(self, key: int) -> list[int]:
        """Return what `bits` returns, for one key."""
        found = [0] * self.num_columns
        for slots in self._arrays():
            at = slots.slot_of(key)
            if at is not None:
                for column, bits in enumerate(slots.bits_at(at)):
                    found[column] |= bits
        return found

    def set(self, keys: Keys, column: int, bit: np.uint32) -> Flags:
        """Set one bit of distinct keys, fastest in ascending order. Return for each whether the bit was clear."""
        self._make_room(len(keys))
        current = self._current
        at = current.place(keys)
        if self._old is not None:
            from_, places = self._old.find(keys)
            current.take_bits(at[places], self._old, from_)
        self.num_entries += int(np.count_nonzero(current.are_empty(at)))
        before = current.columns[column][at]
        current.columns[column][at] = before | bit
        was_clear: Flags = np.equal(before & bit, 0)
        return was_clear

    def clear(self, keys: Keys, column: int, bit: np.uint32) -> Flags:
        """Clear one bit of distinct keys. Return for each whether the bit was set."""
        was_set = np.zeros(len(keys), dtype=bool)
        for slots in self._arrays():
            at, places = slots.find(keys)
            bits = slots.columns[column]
            is_set = (bits[at] & bit) != 0
            at, places = at[is_set], places[is_set]
            bits[at] &= ~bit
            was_set[places] = True
            self.num_entries -= int(np.count_nonzero(slots.are_empty(at)))
        return was_set

    # ---------------------------------------------------------------- slices of work

    def drop(self, column: int, bit: np.uint32) -> None:
        """Clear the bit of every key, by `work`. The bit must not be set again before `is_dropping` is false."""
        self._dropped[column] |= bit
        self._num_swept = 0

    @property
    def is_dropping(self) -> bool:
        return any(self._dropped)

    @property
    def has_work(self) -> bool:
        is_growing = self._old is not None or self._fresh is not None
        return is_growing or self.is_dropping or self._is_nearly_full

    def work(self, num_slots: int) -> None:
        """Touch, move or sweep a slice of `num_slots` slots, if needed."""
        if self._old is not None:
            self._move(self._old, num_slots)
        elif self._fresh is not None:
            self._touch(self._fresh, num_slots)
        elif self._is_nearly_full:
            self._begin_to_grow()
        elif self.is_dropping:
            self._sweep(num_slots)

    @property
    def _is_nearly_full(self) -> bool:
        return self._current.num_used > _NEARLY_FULL * self._current.num_slots

    def _sweep(self, num_slots: int) -> None:
        current = self._current
        piece = slice(self._num_swept, self._num_swept + num_slots)
        num_empty = int(np.count_nonzero(current.are_empty(piece)))
        for bits, dropped in zip(current.columns, self._dropped, strict=True):
            if dropped:
                bits[piece] &= ~dropped
        self.num_entries -= int(np.count_nonzero(current.are_empty(piece))) - num_empty
        self._num_swept += num_slots
        if self._num_swept >= current.num_slots:
            self._dropped = [np.uint32(0)] * self.num_columns

    def _make_room(self, num_keys: int) -> None:
        """Have free slots for `num_keys` more keys, after all work if they are few."""
        current = self._current
        if current.num_used + num_keys <= _FULL * current.num_slots:
            return
        while self._old is not None:
            self._move(self._old, self._old.num_slots)
        self._begin_to_grow(num_keys)
        while self._fresh is not None:
            self._touch(self._fresh, self._fresh.num_slots)

    def _begin_to_grow(self, num_keys: int = 0) -> None:
        num_slots = max(int(_ROOM * (self.num_entries + num_keys)), self._current.num_slots // 2, _LEAST_SLOTS)
        self._fresh, self._num_touched = _Slots(num_slots, self.num_columns), 0

    def _touch(self, fresh: _Slots, num_slots: int) -> None:
        fresh.touch(slice(self._num_touched, self._num_touched + num_slots))
        self._num_touched += num_slots
        if self._num_touched >= fresh.num_slots:
            self._old, self._num_moved = self._current, 0
            self._current, self._fresh = fresh, None
            self._num_swept = 0  # the entries keep their bits on the way: the sweep begins again

    def _move(self, old: _Slots, num_slots: int) -> None:
        piece = slice(self._num_moved, self._num_moved + num_slots)
        from_ = self._num_moved + np.flatnonzero(~old.are_empty(piece))
        self._current.take_bits(self._current.place(old.keys[from_]), old, from_)
        self._num_moved += num_slots
        old.release(min(self._num_moved, old.num_slots))
        if self._num_moved >= old.num_slots:
            self._old = None

    def _arrays(self) -> Iterator[_Slots]:
        yield self._current
        if self._old is not None:
            yield self._old
