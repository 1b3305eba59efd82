"""The interface of the storage tier, `PageStore`: whole pages by digest (kv/keys.py), in one namespace (kv/layout.py).

Life cycle: a row of `STORES` opens the store → `exists`, `put`, `get` from worker threads, never from the engine loop →
`close`, when the last call has returned. A store that needs registered memory registers `StoreContext.host_memory` when
it is opened, before the first `get`, and unregisters the memory in `close`. The host pool exists longer than the store,
even if a call hangs.

Every store guarantees to its caller:

- `get` returns byte for byte the page that was put under that key in that namespace, or a miss;
- a damaged page, a full store or a failed disk leads to a miss or to a page that is not stored, and is counted; it
  never leads to an exception. `StoreUnreachable` says that no call can succeed now; any other exception is a bug. Both
  open the circuit breaker. Opening a store raises `StoreError` or `ConfigError`; errors of other libraries are
  translated, with `param` set to the option to change;
- the least recently used page is evicted first, and of the pages of one call the last page: callers pass the pages of a
  prefix in order, and later pages are useless without the earlier ones;
- a call never evicts pages that the same call has stored or found: if not all pages fit, the first pages stay;
- a size limit that the store itself keeps is exceeded by at most one page per writing thread.

Calls count leading pages, since a page after a missing page is useless. A store that answers for each key counts up to
the first failure; pages stored after it are found by later calls.

A store does not know tokens, requests or tiers, and starts no threads. A call waits at most five seconds for another
process; opening may take longer. A disk that hangs blocks the calling thread.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvist.door import Given
from kvist.pool_status import WatchedPool


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """The memory of the host pool, which contains every page of `get` and `put`."""

    address: int
    num_bytes: int
    fd: int | None = None  # a file descriptor of the memory, which other processes can map; None: there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreContext:
    """The settings of a store that come from its engine; the others are the store's own options."""

    namespace: str  # see kv.layout.namespace
    page_bytes: int
    host_memory: HostMemory | None = None  # None: there is no pool; pages may be anywhere
    advertised_host: str = "127.0.0.1"  # the address of this host for other hosts
    secret_path: Path | None = None  # the file with the store's secret; None: the store has a secret of its own
    only_reads: bool = False  # a reader process: another process has opened the store, and only `get` is called here


class StoreOptions(Protocol):
    """A store's own options: a frozen dataclass of `kvist.config.option`s. `str(options)` describes the store in
    messages; equal resolved options mean the same store."""

    @property
    def location(self) -> str:
        """Where the pages are: equal for processes that share them, even if other options differ."""

    def resolved(self) -> StoreOptions:
        """Return the same options without links, `~` and defaults that depend on the process."""

    def with_request(self, requested: Given, roots: Sequence[str]) -> StoreOptions:
        """Return these options, which come from the flags, changed by those of an HTTP client, and resolved. `roots`:
        the folders that a client may name. Raises `RequestError` if no client may attach this store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """Counts of pages since this process opened the store; only `stored_bytes` includes other processes' pages."""

    stored_bytes: int
    errors: Mapping[str, int]  # by a short name: the errno's name, or the code of the store's own library
    num_hits: int = 0  # read and verified; hits + misses = pages requested
    num_misses: int = 0  # the first missing page of a call, and all pages after it
    num_broken: int = 0  # misses because of a wrong header, size, owner or seal; the pages were removed
    num_written: int = 0
    num_refused: int = 0  # not stored, because too few pages could be evicted
    num_evicted: int = 0
    watched_pool: Callable[[], WatchedPool] | None = None  # the state now of the pool behind the store; never waits


class PageStore(Protocol):
    """A store of pages. Several threads may call the methods at once. A page is `page_bytes` contiguous bytes; the
    caller passes `row.data` for a row of a numpy array."""

    max_readers: int | None
    """More threads than this that call `get` make the store no faster; None: no such limit."""

    max_writers: int | None
    """The same for `put`."""

    max_read_processes: int
    """More processes than this that read for this one (page_readers/) make the store no faster; 0: the store can be
    read only here."""

    def exists(self, keys: Sequence[bytes]) -> int:
        """Return how many leading keys are stored. Only a hint: before `get`, a page may be evicted or found
        damaged."""

    def get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> int:
        """Read page `keys[i]` into `into[i]` up to the first miss. Return how many leading pages are complete and
        verified; the content of the buffers after them is undefined."""

    def put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        """Store the missing pages, up to the first page that cannot be stored. Return how many leading pages are stored
        now."""

    def probe(self) -> None:
        """Return if the store answers: `get` and `put` may succeed now. Raises `StoreUnreachable` if it does not."""

    def stats(self) -> StoreStats: ...

    def close(self) -> None:
        """Stop storing, and release the host memory. No call is under way. Stored pages stay if the store exists longer
        than its processes."""


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

    def stats(self, stored_bytes: int, watched_pool: Callable[[], WatchedPool] | None = None) -> StoreStats:
        with self._lock:
            return StoreStats(
                stored_bytes=stored_bytes, errors=dict(self._errors), watched_pool=watched_pool, **self._counts
            )
