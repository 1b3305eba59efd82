"""A map for entries of the recent past, bounded in number and in age."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class ExpiringMap(Generic[K, V]):
    """The newest `capacity` entries that are younger than `max_age_s`. Mutable; its one owner is a handoff side."""

    def __init__(self, *, capacity: int, max_age_s: float) -> None:
        self._capacity = capacity
        self._max_age_s = max_age_s
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: K, value: V, now_s: float) -> None:
        self._entries[key] = (now_s, value)
        self._entries.move_to_end(key)
        while self._entries:
            oldest = next(iter(self._entries))
            if len(self._entries) <= self._capacity and self._entries[oldest][0] > now_s - self._max_age_s:
                break
            del self._entries[oldest]

    def get(self, key: K) -> V | None:
        entry = self._entries.get(key)
        return None if entry is None else entry[1]
