"""The file store: a folder with one file per page, used by any number of processes at once.

    <path>/secret                                                    the store's secret (page_seals/), unless set by a
    flag
           in-use.lock                                               the bytes in use (disk_budget.py)
           <hash>/<first byte of the key>/<key>.page                 header (4 KiB), then the page's bytes
                                          <key>.<random>.new         being written; renamed when complete

The folder `<hash>` is for one namespace and one secret, and every page has a seal (page_seals/): a page written
without the secret is not accepted. Only regular files of this user are read.

A page file appears by a rename, so a reader finds the whole page or none. Two writers of one key write the same bytes,
and the last rename wins. Nothing is synced to disk: after a power loss, an incomplete page has a wrong seal and is a
miss. The header takes 4 KiB, so that the page after it is aligned to the kernel's memory pages: reading into an aligned
buffer is 1.5 times as fast, and the file uses no more disk blocks than with a short header.

After a write error (disk full, permission lost, folder removed) writing is suspended for five seconds; reading
continues. disk_budget.py decides which files are evicted at the size limit.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvist.clock import Clock, MonotonicClock, unix_time_ns
from kvist.errors import ConfigError, StoreError, StoreUnreachable
from kvist.kv.keys import DIGEST_BYTES
from kvist.own_files import is_own_file, own_folder
from kvist.page_seals.seal import PageSeals
from kvist.page_seals.secret import has_secret, keep_secret, read_secret, secret_of
from kvist.store.backend import StoreContext, StoreStats, Tally
from kvist.store.disk_budget import PAGE_SUFFIX, UNFINISHED_SUFFIX, DiskBudget, open_with_folder

_HEADER_BYTES = 4096  # that of PageSeals, then the namespace
_TOUCH_NS = 60 * 10**9  # the mtime of a page in use is updated at most once a minute: an update is a disk write
_STEP_NS = 1000  # each page of a call is dated this much earlier than the page before it
_SUSPEND_S = 5.0

logger = logging.getLogger(__name__)


class FileStore:
    """A `PageStore` in a folder. Raises `ConfigError` if no page fits, `StoreError` if the folder cannot be written."""

    max_readers: int | None = None
    max_writers: int | None = None
    max_read_processes = 64

    def __init__(self, folder: Path, context: StoreContext, *, capacity_bytes: int, clock: Clock | None = None) -> None:
        if capacity_bytes < context.page_bytes:
            raise ConfigError(
                f"a storage tier of {capacity_bytes} bytes is smaller than one page of {context.page_bytes} bytes: "
                "raise its size",
                param="size",
            )
        self._file_bytes = _HEADER_BYTES + context.page_bytes
        self._namespace = context.namespace.encode()
        self._root = folder.absolute()
        self._clock = clock or MonotonicClock()
        self._suspended_until_s = 0.0
        self._tally = Tally()
        secret = None if context.secret_path is None else read_secret(context.secret_path)
        try:
            own_folder(self._root)  # checked before any file in it is opened
            self._budget = DiskBudget(self._root, capacity_bytes, self._tally, scans=not context.only_reads)
            with self._budget.exclusive():
                self._own_secret = None if secret else secret_of(self._root)
            self._seals = PageSeals(context.namespace, context.page_bytes, secret or self._own_secret)
            self._folder = str(self._root / self._seals.space.hex())
            own_folder(self._folder)
            if not context.only_reads:
                tempfile.TemporaryFile(dir=self._folder).close()  # raises if the folder is not writable
        except OSError as error:
            raise StoreError(
                f"cannot open the file store in {folder}: {error}. Name a folder that only this user may write to",
                param="path",
            ) from error

    def exists(self, keys: Sequence[bytes]) -> int:
        for index, key in enumerate(keys):
            if self._stat(self._path(key)) is None:
                return index
        return len(keys)

    def get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> int:
        now_ns, num_hits = unix_time_ns(), 0
        for index, (key, page) in enumerate(zip(keys, into, strict=True)):
            is_whole = self._read(key, page, now_ns - index * _STEP_NS)
            if is_whole is None:
                break
            # Pages after a damaged page are read too, so that all damaged pages of the call are removed.
            num_hits += is_whole and num_hits == index
        self._tally.add(num_hits=num_hits, num_misses=len(keys) - num_hits)
        return num_hits

    def put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        now_ns, num_stored = unix_time_ns(), 0
        stored: set[str] = set()
        for key, page in zip(keys, pages, strict=True):
            used_ns = now_ns - num_stored * _STEP_NS
            path = self._path(key)
            if (status := self._stat(path)) is not None:
                self._touch(path, status, used_ns)
            elif not self._write(key, page, used_ns, keep=stored):
                break
            stored.add(path)
            num_stored += 1
        return num_stored

    def probe(self) -> None:
        try:
            os.lstat(self._folder)
        except FileNotFoundError:
            return  # the next put creates the folder again
        except OSError as error:
            raise StoreUnreachable(f"the file store in {self._root} cannot be read: {error.strerror}") from error

    def stats(self) -> StoreStats:
        stored_bytes = 0
        with self._tally.tolerating():
            stored_bytes = self._budget.in_use_bytes()
        return self._tally.stats(stored_bytes)

    def close(self) -> None:
        self._suspended_until_s = math.inf

    # ------------------------------------------------------------ one page

    def _path(self, key: bytes) -> str:
        assert len(key) == DIGEST_BYTES, "a key is a page digest"
        name = key.hex()
        return f"{self._folder}/{name[:2]}/{name}{PAGE_SUFFIX}"

    def _header(self, key: bytes, page: memoryview) -> bytes:
        return (self._seals.header(key, page) + self._namespace)[:_HEADER_BYTES].ljust(_HEADER_BYTES, b"\0")

    def _stat(self, path: str) -> os.stat_result | None:
        """Return the file's status; None if the file is missing, incomplete or another user's."""
        with self._tally.tolerating():
            status = os.lstat(path)
            return status if self._is_whole(status) else None
        return None

    def _is_whole(self, status: os.stat_result) -> bool:
        return status.st_size == self._file_bytes and is_own_file(status)

    def _read(self, key: bytes, page: memoryview, used_ns: int) -> bool | None:
        """Read and verify a page. False: the page was damaged or another user's, and was removed. None: no such
        page."""
        path, header = self._path(key), bytearray(_HEADER_BYTES)
        with self._tally.tolerating():
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                status = os.fstat(fd)
                num_read = os.readv(fd, [header, page]) if self._is_whole(status) else 0
            finally:
                os.close(fd)
            if num_read == self._file_bytes and header == self._header(key, page):
                self._touch(path, status, used_ns)
                return True
            self._tally.add(num_broken=1)
            os.unlink(path)
            return False
        return None

    def _touch(self, path: str, status: os.stat_result, used_ns: int) -> None:
        if abs(used_ns - status.st_mtime_ns) > _TOUCH_NS:
            with self._tally.tolerating():
                os.utime(path, ns=(used_ns, used_ns), follow_symlinks=False)

    def _write(self, key: bytes, page: memoryview, used_ns: int, keep: set[str]) -> bool:
        if self._clock.now_s() < self._suspended_until_s:
            return False
        try:
            if not self._budget.reserve(self._file_bytes, keep):
                self._tally.add(num_refused=1)
                return False
            try:
                self._keep_secret()
                self._write_file(self._path(key), [self._header(key, page), page], used_ns)
            except OSError as error:
                is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                self._budget.release(self._file_bytes, is_disk_full=is_full)
                raise
        except OSError as error:
            self._tally.error(error)
            self._suspended_until_s = max(self._suspended_until_s, self._clock.now_s() + _SUSPEND_S)
            logger.warning("the file store suspends writing for %g s: %s", _SUSPEND_S, error)
            return False
        self._tally.add(num_written=1)
        return True

    def _keep_secret(self) -> None:
        if self._own_secret is not None and not has_secret(self._root):
            with self._budget.exclusive():
                keep_secret(self._root, self._own_secret)

    def _write_file(self, path: str, content: list[bytes | memoryview], used_ns: int) -> None:
        unfinished = f"{path.removesuffix(PAGE_SUFFIX)}.{secrets.token_hex(4)}{UNFINISHED_SUFFIX}"
        fd = open_with_folder(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            try:
                if os.writev(fd, content) < self._file_bytes:
                    raise OSError(errno.ENOSPC, "the page was not written whole", unfinished)
                os.utime(fd, ns=(used_ns, used_ns))
            finally:
                os.close(fd)
            os.replace(unfinished, path)
        except OSError:
            with self._tally.tolerating():
                os.unlink(unfinished)
            raise
