"""The interface of the storage tier, `PageStore`: whole pages by digest (kv/keys.py), in one namespace (kv/layout.py).

Life cycle: a row of `STORES` opens the store → `exists`, `put`, `get` from worker threads, never from the engine's loop
→ `close`, once the last call has returned. A store whose transport needs registered memory registers
`StoreContext.host_memory` when it is opened, before the first `get`, and unregisters it in `close`: the pool outlives
both, also if a call hangs.

Guarantees of every store to its caller:

- `get` returns byte for byte the page that was put under that key in that namespace, or a miss;
- a damaged page, a full store or a lost disk is a miss or a page not stored, and a counter: never an exception. An
  exception means a bug, and opens the circuit breaker. Opening raises `StoreError` or `ConfigError` only: errors of
  other libraries are translated, with `param` set to the option to change;
- the least recently used page is evicted first, and of the pages of one call the last page first: callers pass a prefix
  from its head on, and a prefix without its head is useless;
- a call never evicts pages that the same call has stored or found: if not all pages fit, the first ones stay;
- the size limit, if the store keeps one itself, holds, except for one page per writing thread.

Calls count leading pages, since the page after a hole is of no use to a match. A store that answers for each key counts
up to the first failure; pages stored behind it are found again later.

A store does not know tokens, requests or tiers, starts no threads, and waits at most five seconds for another process.
A disk that hangs blocks the calling thread.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvist.door import Given


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """The host pool: every page of `get` and `put` lies in it."""

    address: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreContext:
    """The part of a store that its engine sets; the rest is in the store's own options."""

    namespace: str  # see kv.layout.namespace
    page_bytes: int
    host_memory: HostMemory | None = None  # None: no pool; pages may lie anywhere
    secret_path: Path | None = None  # the file with the store's secret; None: the store keeps one itself


class StoreOptions(Protocol):
    """A store's own options: a frozen dataclass of `kvist.config.option`s. `str` describes the store in messages; equal
    options mean the same store."""

    def resolved(self) -> StoreOptions:
        """Return the same options in full: without defaults that depend on the process, links or `~`."""

    def with_request(self, requested: Given, roots: Sequence[str]) -> StoreOptions:
        """Return these options, the flags', with those of an HTTP client, resolved. Raises `RequestError` if no client
        may ask for this store; `roots` are the folders that a client may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """Counts of pages since this process opened the store; only `stored_bytes` includes other processes' pages."""

    stored_bytes: int
    errors: Mapping[str, int]  # by a short name: the errno's name, or the code of the store's own library
    num_hits: int = 0  # read and verified; hits + misses = pages requested
    num_misses: int = 0  # the first missing page of a call, and all pages after it
    num_broken: int = 0  # the part of the misses whose header, size, owner or seal was wrong; removed
    num_written: int = 0
    num_refused: int = 0  # not stored, because too little could be evicted
    num_evicted: int = 0


class PageStore(Protocol):
    """A store of pages. Several threads may call every method at once. A page is `page_bytes` contiguous bytes; a row
    of a numpy array is passed as `row.data`."""

    def exists(self, keys: Sequence[bytes]) -> int:
        """Return how many leading keys are stored. A hint: a page may be evicted, or found damaged, before `get`."""

    def get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> int:
        """Read page `keys[i]` into `into[i]` up to the first miss. Return how many leading pages are complete and
        verified; the content of the buffers after them is undefined."""

    def put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        """Store the missing pages, up to the first page that cannot be stored. Return how many leading pages are stored
        now."""

    def stats(self) -> StoreStats: ...

    def close(self) -> None:
        """Stop storing, and release the host memory; no call is under way. Stored pages stay if the store outlives its
        processes."""


class Tally:
    """The counts behind `StoreStats`. Mutable; one per store, updated by its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()

    def add(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)

    def error(self, error: OSError) -> None:
        self.library_error(errno.errorcode.get(error.errno or 0, "unknown"))

    def library_error(self, name: str) -> None:
        """Count an error by a short name: the code of the store's own library."""
        with self._lock:
            self._errors[name] += 1

    @contextlib.contextmanager
    def tolerating(self) -> Iterator[None]:
        """Suppress `OSError` in the block. A missing file is normal; any other error is counted."""
        try:
            yield
        except FileNotFoundError:
            pass
        except OSError as error:
            self.error(error)

    def stats(self, stored_bytes: int) -> StoreStats:
        with self._lock:
            return StoreStats(stored_bytes=stored_bytes, errors=dict(self._errors), **self._counts)
