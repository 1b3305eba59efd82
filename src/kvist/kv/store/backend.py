"""The door of the storage tier, `PageStore`: whole pages by digest (kv/keys.py), for one namespace (kv/layout.py).

Life cycle: `open_store` → `exists`, `put`, `get` from worker threads, never from the engine's loop → `close`.

What every store owes its caller:

- a page that `get` returns is byte for byte the page that was put under that key in that namespace, or it is a miss;
- trouble with one page, a full store or a lost disk is a miss or a page not stored, and a counter: never an exception;
- what was used longest ago goes first, and of the pages of one call the last goes first: callers pass a prefix from
  its head on, and a prefix without its head is of no use;
- a call never evicts pages that it has just stored or found: of more pages than fit, the first stay;
- the cap holds, but for one page a writing thread.

It does not know tokens, requests or tiers, starts no threads and waits at most five seconds for another process; a
disk that hangs, hangs the calling thread.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSpec:
    namespace: str  # see kv.layout.namespace
    page_bytes: int
    capacity_bytes: int  # of the whole store, other namespaces included
    path: Path | None = None  # the folder, for a store that has one
    secret_path: Path | None = None  # the file with its secret; None: in the folder itself


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """Pages since this store was opened, by this process; `stored_bytes` alone is everybody's."""

    stored_bytes: int
    errors: Mapping[str, int]  # by the name of the errno
    num_hits: int = 0  # read and verified; hits + misses = pages asked for
    num_misses: int = 0  # the first page of a call that was not there, and those behind it
    num_broken: int = 0  # of the misses: header, size, owner or seal was wrong, and the page was removed
    num_written: int = 0
    num_refused: int = 0  # no room could be made for the page
    num_evicted: int = 0


class PageStore(Protocol):
    """Every method may be called by several threads at once. A page is `page_bytes` contiguous bytes; a row of a numpy
    array is passed as `row.data`."""

    def exists(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are there. A hint: the page may be evicted, or turn out broken, before `get`."""

    def get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> int:
        """Reads page `keys[i]` into `into[i]` up to the first miss. Returns how many leading pages are complete and
        verified; what is in the buffers behind them is undefined."""

    def put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        """Stores what is not there yet, up to the first page that cannot be. Returns how many leading pages are
        stored now."""

    def stats(self) -> StoreStats: ...

    def close(self) -> None:
        """Nothing is stored any more. What is there stays, where the store outlives its processes."""


class Tally:
    """The counts behind `StoreStats`. Mutable; one a store, added to by its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()

    def add(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)

    def error(self, error: OSError) -> None:
        with self._lock:
            self._errors[errno.errorcode.get(error.errno or 0, "unknown")] += 1

    @contextlib.contextmanager
    def tolerating(self) -> Iterator[None]:
        """A file that is not there is nobody's fault; any other `OSError` is counted."""
        try:
            yield
        except FileNotFoundError:
            pass
        except OSError as error:
            self.error(error)

    def stats(self, stored_bytes: int) -> StoreStats:
        with self._lock:
            return StoreStats(stored_bytes=stored_bytes, errors=dict(self._errors), **self._counts)
