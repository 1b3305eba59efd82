"""The size limit of a file store and its eviction order, shared by every process that has the folder open.

There is no index on the disk: the folder lists the files (`_scan`), and the mtime of a file is its last use. A lock
file beside them contains one number, the bytes in use. A writer, one at a time under the lock, adds the bytes that it
is about to write; above the limit it first deletes the least recently used files until its bytes fit. A killed writer
leaves the number a little too high, and the next scan corrects it. A scan may miss a page that is about to be written:
the limit may be exceeded by one page per writer.

    reserve ──the bytes fit──► write the file
       └─above the limit─► evict, oldest first ──► write the file
              └─no known oldest file is left─► scan, evict, write the file

Files written or used since the last scan are newer than all files of that scan. A process therefore evicts the files of
its last scan, in order, and scans again when none is left. A scan reads the status of every file, and serves as many
evictions as it found files. Each pass of evictions reads the status of at most `_MAX_STATS_PER_RESERVE` files. Files
with other names are never changed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import heapq
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from kvist.clock import unix_time_ns
from kvist.own_files import open_own, own_folder
from kvist.store.backend import Tally

PAGE_SUFFIX, UNFINISHED_SUFFIX = ".page", ".new"
_OUR_NAMES = (  # namespace / first byte of the key / page, or a page being written
    re.compile("[0-9a-f]{32}"),
    re.compile("[0-9a-f]{2}"),
    re.compile(rf"[0-9a-f]{{64}}(\{PAGE_SUFFIX}|\.[0-9a-f]{{8}}\{UNFINISHED_SUFFIX})"),
)
_LOCK_NAME = "in-use.lock"
_NUMBER_BYTES = 8
_WAIT_S, _OPEN_WAIT_S, _PAUSE_S = 5.0, 60.0, 0.002  # for the lock: its holder may be scanning, or stopped
_MAX_KNOWN = 1 << 16  # files remembered for eviction, about 20 MB
_MAX_STATS_PER_RESERVE = 1024  # files whose status is read before a file is written
_ABANDONED_NS = 60 * 10**9  # no page takes a minute to write: an older unfinished file has a dead writer


class DiskBudget:
    """The bytes in use and the eviction order. Mutable; used by all threads of one store. The methods raise `OSError`
    if the folder or its lock cannot be used."""

    def __init__(self, root: Path, capacity_bytes: int, tally: Tally, *, scans: bool = True) -> None:
        """`scans`: count the files now; False if another process that has the folder open has counted them."""
        self._root = root
        self._lock_path = str(root / _LOCK_NAME)
        self._capacity_bytes = capacity_bytes
        self._limit_bytes = capacity_bytes  # lower while the disk is full
        self._tally = tally
        self._lock = threading.Lock()
        self._num_timeouts = 0
        self._oldest: list[tuple[int, str]] = []  # heap of (mtime_ns at the scan, path)
        self._newest_known_ns = 0  # files newer than this may be unknown
        if not scans:
            return
        with self.exclusive(_OPEN_WAIT_S) as fd:
            in_use = self._scan(_load(fd))
            _save(fd, in_use)
        before = in_use + 1
        while capacity_bytes < in_use < before:  # the limit of an earlier process may have been higher
            with self.exclusive(_OPEN_WAIT_S) as fd:
                before, in_use = in_use, self._evict(_load(fd), 0, set())
                if in_use >= before:  # no known file is left
                    in_use = self._evict(self._scan(in_use), 0, set())
                _save(fd, in_use)

    def reserve(self, num_bytes: int, keep: set[str]) -> bool:
        """Count `num_bytes` as used, evicting files that are not in `keep`. Return False if too little was evicted."""
        with self.exclusive() as fd:
            in_use = self._evict(_load(fd), num_bytes, keep)
            if in_use + num_bytes > self._limit_bytes:
                in_use = self._evict(self._scan(in_use), num_bytes, keep)
            fits = in_use + num_bytes <= self._limit_bytes
            _save(fd, in_use + num_bytes * fits)
            return fits

    def release(self, num_bytes: int, *, is_disk_full: bool) -> None:
        """Undo a reservation whose file was not written. If the disk is full, lower the limit below the bytes in use
        until the next scan: otherwise nothing would be evicted, and no new page could be stored."""
        with self.exclusive() as fd:
            in_use = max(0, _load(fd) - num_bytes)
            _save(fd, in_use)
            if is_disk_full:
                self._limit_bytes = in_use * 15 // 16

    def in_use_bytes(self) -> int:
        """Return the current number, without waiting for the lock."""
        fd = open_own(self._lock_path, os.O_RDONLY)
        try:
            return _load(fd)
        finally:
            os.close(fd)

    def _evict(self, in_use: int, num_bytes: int, keep: set[str]) -> int:
        """Delete the oldest known files to make room; return the bytes still in use."""
        for _ in range(_MAX_STATS_PER_RESERVE):
            if in_use + num_bytes <= self._limit_bytes:
                break
            if not self._oldest or self._oldest[0][0] > self._newest_known_ns:
                break
            mtime_ns, path = heapq.heappop(self._oldest)
            with self._tally.tolerating():  # another process may have deleted the file
                status = os.stat(path)
                if status.st_mtime_ns > mtime_ns:  # used since the scan
                    heapq.heappush(self._oldest, (status.st_mtime_ns, path))
                elif path not in keep:  # the next scan finds files in `keep` again
                    os.unlink(path)
                    in_use = max(0, in_use - status.st_size)
                    self._tally.add(num_evicted=1)
        return in_use

    # ------------------------------------------------------------ the scan

    def _scan(self, recorded_bytes: int) -> int:
        """Find the oldest files; return the bytes of all files. After an error, return at least `recorded_bytes`."""
        abandoned_ns, num_bytes, errors = unix_time_ns() - _ABANDONED_NS, 0, self._tally.stats(0).errors

        def pages() -> Iterator[tuple[int, str]]:
            nonlocal num_bytes
            for entry in self._files():
                with self._tally.tolerating():
                    status = entry.stat(follow_symlinks=False)
                    if entry.name.endswith(UNFINISHED_SUFFIX) and status.st_mtime_ns < abandoned_ns:
                        os.unlink(entry)
                        continue
                    num_bytes += status.st_size
                    if entry.name.endswith(PAGE_SUFFIX):
                        yield status.st_mtime_ns, entry.path

        self._oldest = heapq.nsmallest(_MAX_KNOWN, pages())  # sorted, and so a heap
        self._newest_known_ns = self._oldest[-1][0] if self._oldest else 0
        self._limit_bytes = self._capacity_bytes
        return num_bytes if self._tally.stats(0).errors == errors else max(num_bytes, recorded_bytes)

    def _files(self) -> Iterable[os.DirEntry[str]]:
        """Yield the store's files of every namespace, folder by folder."""
        entries: Iterable[os.DirEntry[str]] = self._entries(_OUR_NAMES[0], self._root)
        for pattern in _OUR_NAMES[1:]:
            entries = chain.from_iterable(map(partial(self._entries, pattern), entries))
        return entries

    def _entries(self, pattern: re.Pattern[str], folder: os.PathLike[str]) -> list[os.DirEntry[str]]:
        with self._tally.tolerating(), os.scandir(folder) as entries:
            return [entry for entry in entries if pattern.fullmatch(entry.name)]
        return []

    # ------------------------------------------------------------ the lock file

    @contextlib.contextmanager
    def exclusive(self, wait_s: float = _WAIT_S) -> Iterator[int]:
        """Hold the lock file: no other thread or process counts or evicts meanwhile. The file is opened each time,
        because the folder may have been removed and created again."""
        num_timeouts = self._num_timeouts
        with self._lock:
            # If a thread ahead of this one timed out, this thread has waited as long: it tries only once.
            num_tries = round(wait_s / _PAUSE_S) if self._num_timeouts == num_timeouts else 1
            fd = open_with_folder(self._lock_path, os.O_RDWR | os.O_CREAT)
            try:
                for _ in range(num_tries):
                    with contextlib.suppress(BlockingIOError):
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    time.sleep(_PAUSE_S)
                else:
                    self._num_timeouts += 1
                    raise TimeoutError(errno.ETIMEDOUT, "another process holds the lock", self._lock_path)
                yield fd
            finally:
                os.close(fd)


def open_with_folder(path: str, flags: int) -> int:
    """Open a file for this user alone, and create its folder if missing."""
    try:
        return open_own(path, flags)
    except FileNotFoundError:
        own_folder(os.path.dirname(path))
        return open_own(path, flags)


def _load(fd: int) -> int:
    return int.from_bytes(os.pread(fd, _NUMBER_BYTES, 0), "little")


def _save(fd: int, num_bytes: int) -> None:
    os.pwrite(fd, num_bytes.to_bytes(_NUMBER_BYTES, "little"), 0)
