"""A store in this process's memory: engines share the store by sharing the object.

monkeypatch.setitem(STORES, "memory", MEMORY_STORE)   # then `--hicache-storage-backend memory` is a store
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvist.config import option
from kvist.door import Given, backend_with
from kvist.errors import ConfigError
from kvist.store.backend import PageStore, StoreContext, StoreStats, Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStoreOptions:
    size: float = option(1.0, "size of the store", unit="GB")

    def __str__(self) -> str:
        return f"a memory store of at most {self.size:g} GB"

    @property
    def location(self) -> str:
        return "memory"

    def resolved(self) -> MemoryStoreOptions:
        return self

    def with_request(self, requested: Given, roots: Sequence[str]) -> MemoryStoreOptions:  # noqa: ARG002 (no folder)
        return MemoryStoreOptions(**{"size": self.size, **requested})  # type: ignore[arg-type]


class MemoryStore:
    """`is_registered` stands for a transport that needs registered memory: every page must be in that memory."""

    max_readers: int | None = None
    max_writers: int | None = None
    max_read_processes = 0

    def __init__(self, context: StoreContext, *, capacity_bytes: int = 1 << 30) -> None:
        if capacity_bytes < context.page_bytes:
            raise ConfigError("the memory store is smaller than one page: raise its size", param="size")
        self._page_bytes = context.page_bytes
        self._memory = context.host_memory
        self.is_registered = True
        self._max_pages = capacity_bytes // context.page_bytes
        self._lock = threading.Lock()
        self._pages: OrderedDict[bytes, bytes] = OrderedDict()  # least recently used first
        self._tally = Tally()

    def exists(self, keys: Sequence[bytes]) -> int:
        with self._lock:
            return next((index for index, key in enumerate(keys) if key not in self._pages), len(keys))

    def get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> int:
        self._check_memory(into)
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
        self._check_memory(pages)
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

    def probe(self) -> None: ...

    def stats(self) -> StoreStats:
        return self._tally.stats(len(self._pages) * self._page_bytes)

    def close(self) -> None:
        with self._lock:
            self._max_pages = 0
            self._pages.clear()
        self.is_registered = False

    def _check_memory(self, pages: Sequence[memoryview]) -> None:
        if self._memory is None:
            return
        assert self.is_registered, "a call after the memory was released"
        for page in pages:
            offset = np.frombuffer(page, np.uint8).ctypes.data - self._memory.address
            assert 0 <= offset <= self._memory.num_bytes - page.nbytes, "a page outside the host pool"

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


def _open(options: MemoryStoreOptions, context: StoreContext) -> PageStore:
    return MemoryStore(context, capacity_bytes=round(options.size * 10**9))


MEMORY_STORE = backend_with(MemoryStoreOptions, _open, text="in memory, for tests")
