"""A store in this process's memory, for tests and simulation: engines share the store by sharing the object."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from kvist.store.backend import StoreSpec, StoreStats, Tally


class MemoryStore:
    def __init__(self, spec: StoreSpec) -> None:
        self._page_bytes = spec.page_bytes
        self._max_pages = spec.capacity_bytes // spec.page_bytes
        self._lock = threading.Lock()
        self._pages: OrderedDict[bytes, bytes] = OrderedDict()  # least recently used first
        self._tally = Tally()

    def exists(self, keys: Sequence[bytes]) -> int:
        with self._lock:
            return next((index for index, key in enumerate(keys) if key not in self._pages), len(keys))

    def get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> int:
        num_hits = 0
        with self._lock:
            for key, page in zip(keys, into, strict=True):
                if key not in self._pages:
                    break
                page[:] = self._pages[key]
                num_hits += 1
            self._use(keys[:num_hits])
        self._tally.add(num_hits=num_hits, num_misses=len(keys) - num_hits)
        return num_hits

    def put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        num_stored, stored = 0, set[bytes]()
        with self._lock:
            for key, page in zip(keys, pages, strict=True):
                if key not in self._pages:
                    if not self._make_room(stored):
                        self._tally.add(num_refused=1)
                        break
                    self._pages[key] = bytes(page)
                    assert len(self._pages[key]) == self._page_bytes
                    self._tally.add(num_written=1)
                num_stored += 1
                stored.add(key)
            self._use(keys[:num_stored])
        return num_stored

    def stats(self) -> StoreStats:
        return self._tally.stats(len(self._pages) * self._page_bytes)

    def close(self) -> None:
        with self._lock:
            self._max_pages = 0
            self._pages.clear()

    def _use(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):  # the head of a prefix is evicted last
            self._pages.move_to_end(key)

    def _make_room(self, keep: set[bytes]) -> bool:
        if len(self._pages) < self._max_pages:
            return True
        victim = next((key for key in self._pages if key not in keep), None)
        if victim is None:
            return False
        del self._pages[victim]
        self._tally.add(num_evicted=1)
        return True
