"""The host tier's pages in a folder (`--hicache-persist`), where they outlive the worker, even after a kill.

    <folder>/lock     held (flock) by the worker that uses the folder
             pages    the pool itself, mapped: page i at i * page_bytes
             index    a header, then one record per slot: the page's digests, and the checksums of page and record

    slot overwritten:   clear the record ─► copy the page ─► compute its checksum, write the record ─► report
    start:              check the header ─► check each record ─► check each page ─► return parents before children

After a kill at any point, the record of a slot is therefore missing, incomplete or correct. Nothing is synced to disk:
after a power loss, a page that had not reached the disk fails its checksum and is a miss. Both files are fully
allocated when they are created, so a full disk is an error at the start, and never a fault while serving.

kv/tiers/host.py matches and evicts restored pages. The order of use is not saved; the order of writing is.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import mmap
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash

from kvist.clock import MonotonicClock
from kvist.cores import num_usable_cores
from kvist.errors import ConfigError
from kvist.kv.keys import DIGEST_BYTES
from kvist.kv.tiers.host import SavedPage
from kvist.own_files import open_own, own_folder

_MAGIC, _VERSION = b"kvist-l2", 2
_HEADER = struct.Struct("<8sI4xQ16s24x")  # magic, version, page_bytes, namespace
_RECORD = struct.Struct("<32s32s16sQ")  # digest, parent's digest, page checksum, number; then the record's checksum
_RECORD_BYTES = 96
_NO_PARENT, _NO_RECORD = bytes(DIGEST_BYTES), bytes(_RECORD_BYTES)
_MAX_THREADS = 8  # to verify pages; with more, memory bandwidth is the limit
_NOT_OUR_FILE = (errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO)  # a link, another user's file, a socket

logger = logging.getLogger(__name__)


class PersistentPages:
    """The host pool's memory and its index. `tensor` is [num_pages, page_bytes], uint8.

    The movers call `clear` and `record` from several threads. Two threads access the same slot only after a flush: its
    late `clear` may erase the record of a newer page, which then does not survive a restart. Raises `ConfigError` if
    the folder cannot be used; damaged content is not an error."""

    def __init__(self, folder: Path, *, namespace: str, num_pages: int, page_bytes: int) -> None:
        if not hasattr(os, "posix_fallocate"):  # macOS
            raise ConfigError("--hicache-persist needs Linux: remove the option", param="hicache_persist")
        self._folder = folder
        self._num_pages = num_pages
        self._numbers = itertools.count(1)  # the order of writing; `next` is atomic, an addition is not
        header = _HEADER.pack(_MAGIC, _VERSION, page_bytes, xxhash.xxh3_128_digest(namespace.encode()))
        with contextlib.ExitStack() as closing:
            try:
                own_folder(folder)  # in another user's folder, pages could be forged
                lock_fd = _open(folder / "lock")
                closing.callback(os.close, lock_fd)
                _lock(lock_fd, folder)
                self._make_index_ours(header)
                self._index = _map(folder / "index", _HEADER.size + num_pages * _RECORD_BYTES)
                self._index[: _HEADER.size] = header
                pages = _map(folder / "pages", num_pages * page_bytes)
            except OSError as error:
                reason = "it is not a folder" if isinstance(error, FileExistsError) else error
                raise ConfigError(
                    f"--hicache-persist {folder} cannot keep {num_pages} pages of {page_bytes} bytes: {reason}. Name a "
                    "folder of your own with room for them, or lower --hicache-size",
                    param="hicache_persist",
                ) from error
            self.tensor = torch.frombuffer(pages, dtype=torch.uint8).view(num_pages, page_bytes)
            self._closing = closing.pop_all()

    def clear(self, slots: Sequence[int]) -> None:
        """Erase the records of slots that are about to be overwritten."""
        for slot in slots:
            self._index[self._range(slot)] = _NO_RECORD

    def record(self, slots: Sequence[int], names: Sequence[tuple[bytes, bytes | None]]) -> None:
        """Record complete pages; `names` are (digest, digest of the parent page)."""
        for slot, (digest, parent) in zip(slots, names, strict=True):
            fields = _RECORD.pack(digest, parent or _NO_PARENT, self._page_checksum(slot), next(self._numbers))
            self._index[self._range(slot)] = fields + _checksum_of_record(fields, slot)

    def restore(self, report: Callable[[int, int], None] = lambda _num_done, _num_pages: None) -> list[SavedPage]:
        """Return the undamaged pages, parents before children. Call once, before any `record`. `report` gets the
        number of pages verified so far, and of all pages."""
        clock = MonotonicClock()
        start_s = clock.now_s()
        found: dict[bytes, SavedPage] = {}
        num_bad, gib = 0, self.tensor.shape[1] / 2**30
        slots = [slot for slot in range(self._num_pages) if self._index[self._range(slot)] != _NO_RECORD]
        with ThreadPoolExecutor(min(_MAX_THREADS, num_usable_cores())) as threads:
            for num_done, page in enumerate(threads.map(self._verified, slots), start=1):
                report(num_done, len(slots))
                if page is None:
                    num_bad += 1
                else:
                    found[page.digest] = page
        self._numbers = itertools.count(1 + max((page.last_use for page in found.values()), default=0))
        restored = _behind_their_parents(found)
        if not slots:
            return restored
        self.clear([*set(slots) - {page.slot for page in restored}])
        logger.info(
            "host tier: %d pages restored from %s; %d dropped that were damaged or half written; %d dropped that were "
            "duplicates or whose prefix is incomplete; %.0f ms per GiB",
            len(restored),
            self._folder,
            num_bad,
            len(slots) - num_bad - len(restored),
            1000 * (clock.now_s() - start_s) / (len(slots) * gib),
        )
        return restored

    def close(self) -> None:
        """Release the folder. No copy may be under way. The memory is unmapped with the last tensor over it."""
        self.tensor = torch.empty((0, 0), dtype=torch.uint8)
        self._closing.close()

    def _range(self, slot: int) -> slice:
        start = _HEADER.size + slot * _RECORD_BYTES
        return slice(start, start + _RECORD_BYTES)

    def _page_checksum(self, slot: int) -> bytes:
        checksum: bytes = xxhash.xxh3_128_digest(self.tensor[slot].numpy().data)
        return checksum

    def _verified(self, slot: int) -> SavedPage | None:
        record = self._index[self._range(slot)]
        fields = record[: _RECORD.size]
        if record[_RECORD.size :] != _checksum_of_record(fields, slot):
            return None
        digest, parent, checksum, number = _RECORD.unpack(fields)
        if checksum != self._page_checksum(slot):
            return None
        return SavedPage(slot=slot, digest=digest, parent=None if parent == _NO_PARENT else parent, last_use=number)

    def _make_index_ours(self, header: bytes) -> None:
        """Empty the index if its header differs: its pages are of another model or layout, or damaged."""
        fd = _open(self._folder / "index")
        try:
            there = os.pread(fd, _HEADER.size, 0)
            if there != header:
                if there:
                    is_ours = there[:12] == header[:12]
                    logger.warning(
                        "host tier: pages in %s are not restored: they were written %s",
                        self._folder,
                        "for another model, layout, page size or tensor-parallel slice"
                        if is_ours
                        else "in another format, or damaged",
                    )
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)


def reusable_bytes(folder: Path) -> int:
    """Return how much host memory the folder's pages use already, which the next worker reuses: all of it on tmpfs, 0
    on a disk, since the system's file cache counts as free memory."""
    with contextlib.suppress(OSError, ValueError):
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
        above = [(len(point), kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
        if max(above)[1] == "tmpfs":
            return 512 * (folder / "pages").stat().st_blocks
    return 0


def _behind_their_parents(found: dict[bytes, SavedPage]) -> list[SavedPage]:
    children: defaultdict[bytes | None, list[SavedPage]] = defaultdict(list)
    for page in found.values():
        children[page.parent].append(page)
    ordered = children[None]
    for page in ordered:  # the list grows during the loop
        ordered += children.pop(page.digest, [])
    return ordered


def _checksum_of_record(fields: bytes, slot: int) -> bytes:
    checksum: bytes = xxhash.xxh3_64_digest(fields, seed=slot)  # a record is valid for its own slot only
    return checksum


def _open(path: Path) -> int:
    """Open a file of this user for reading and writing. If a link or another user's file has this name, replace it."""
    flags = os.O_RDWR | os.O_CREAT
    try:
        return open_own(path, flags)
    except OSError as error:
        if error.errno not in _NOT_OUR_FILE:  # such as a failing disk or too many open files: keep the file
            raise
    logger.warning("host tier: %s is replaced: it is not a regular file that this user may use", path)
    path.unlink(missing_ok=True)
    return open_own(path, flags | os.O_EXCL)


def _map(path: Path, num_bytes: int) -> mmap.mmap:
    """Map the file with exactly `num_bytes` bytes, all of them allocated on the disk or in memory."""
    fd = _open(path)
    try:
        former_bytes = os.fstat(fd).st_size
        try:
            os.posix_fallocate(fd, 0, num_bytes)
        except OSError:
            os.ftruncate(fd, former_bytes)  # a full tmpfs would affect every process of the host
            raise
        os.ftruncate(fd, num_bytes)
        return mmap.mmap(fd, num_bytes)
    finally:
        os.close(fd)


def _lock(fd: int, folder: Path) -> None:
    import fcntl  # missing on some systems, where a worker cannot start anyway (transfer/epoch.py)

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"--hicache-persist {folder} is used by another worker: give each worker a folder of its own",
            param="hicache_persist",
        ) from error
