"""One life of one engine process, and how others on the same host know that it is over.

Each life holds a lock (flock) on `<runtime_dir>/epoch-<id>.lock` from before anybody can learn its id until the
kernel takes it away, which it does only after the last thread of the process has stopped: whoever can take the lock
knows that the process can no longer read or write any page.

The file is published already locked (locked under another name, then renamed), so it is never seen unlocked while
its owner lives. It stays after death for `KEEP_DEAD_S` and more, so that a peer that comes late can still tell "dead"
from "unknown"; `sweep`, which every engine runs when it starts, removes it after that. (The dead life's pool file has
its own lock, and kv/device.py removes it at once.)

Not for other hosts: there a peer's death is known only by its lease (a later transport).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from kvist.clock import unix_time_s
from kvist.errors import ConfigError
from kvist.request import EpochId

KEEP_DEAD_S = 600.0
MAX_WATCHED = 256  # lock files kept open; the least recently asked for is closed first
_FOUND_DEAD = stat.S_IXUSR  # mark on the file: `sweep` found this life dead, at the file's mtime
_EPOCH_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # it becomes part of a path, and it comes from a peer


def new_epoch() -> EpochId:
    return EpochId(secrets.token_hex(8))


def lock_path(runtime_dir: Path, epoch: EpochId) -> Path:
    return runtime_dir / f"epoch-{epoch}.lock"


def try_lock(descriptor: int, *, exclusive: bool) -> bool:
    """Ask with `exclusive=False`: any number may ask at once, and all are refused while the owner lives."""
    try:
        import fcntl  # not on Windows: there a worker cannot share pages with another process
    except ImportError as error:
        raise ConfigError("a worker needs file locks (fcntl), which this system lacks: use Linux or macOS") from error
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class EpochLock:
    """Held for the whole life of an engine. Make it before the pool, close it after everything else."""

    def __init__(self, runtime_dir: Path, epoch: EpochId) -> None:
        assert _EPOCH_ID.fullmatch(epoch), f"not an epoch id: {epoch!r}"
        self.epoch = epoch
        path = lock_path(runtime_dir, epoch)
        unpublished = runtime_dir / f".{path.name}.new"
        self._descriptor: int | None = os.open(unpublished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        locked = try_lock(self._descriptor, exclusive=True)
        assert locked, "nobody knows this file yet"
        os.rename(unpublished, path)

    def close(self) -> None:
        """This life is over; the file stays for `KEEP_DEAD_S`, so that peers can see that it is."""
        if self._descriptor is None:
            return
        os.close(self._descriptor)
        self._descriptor = None


class EpochWatch:
    """Asks whether other lives are over. Keeps the files it has seen open, so that removing them changes nothing.

    Mutable, used by one thread.
    """

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self._seen: OrderedDict[EpochId, int | None] = OrderedDict()  # open lock file; None: dead, for good

    def is_dead(self, epoch: EpochId) -> bool:
        """False for a life never seen here: it may be on another host, and then nothing is certain."""
        if not _EPOCH_ID.fullmatch(epoch):
            return False
        if epoch not in self._seen:
            try:
                descriptor = os.open(lock_path(self._runtime_dir, epoch), os.O_RDONLY | os.O_NOFOLLOW)
            except OSError:
                return False
            self._remember(epoch, descriptor)
        self._seen.move_to_end(epoch)
        known = self._seen[epoch]
        if known is not None and try_lock(known, exclusive=False):
            os.close(known)
            self._seen[epoch] = None
        return self._seen[epoch] is None

    def close(self) -> None:
        for descriptor in self._seen.values():
            if descriptor is not None:
                os.close(descriptor)
        self._seen.clear()

    def _remember(self, epoch: EpochId, descriptor: int) -> None:
        while len(self._seen) >= MAX_WATCHED:
            _, oldest = self._seen.popitem(last=False)
            if oldest is not None:
                os.close(oldest)
        self._seen[epoch] = descriptor


def _epochs(runtime_dir: Path) -> Iterator[tuple[Path, bool]]:
    """The lock file of each life that was here, and whether it is over."""
    watch = EpochWatch(runtime_dir)
    try:
        for path in sorted(runtime_dir.glob("epoch-*.lock")):
            yield path, watch.is_dead(EpochId(path.stem.removeprefix("epoch-")))
    finally:
        watch.close()


def num_live_epochs(runtime_dir: Path) -> int:
    """How many engines of this runtime folder are alive now."""
    return sum(not is_dead for _, is_dead in _epochs(runtime_dir))


def sweep(runtime_dir: Path) -> None:
    """Remove the lock files of lives that ended long ago."""
    for path, is_dead in _epochs(runtime_dir):
        if not is_dead:
            continue
        with contextlib.suppress(FileNotFoundError):  # another engine may be sweeping too
            if path.stat().st_mode & _FOUND_DEAD == 0:
                path.chmod(0o600 | _FOUND_DEAD)
                os.utime(path)  # its death is news: the wait counts from when it was first found dead
            elif unix_time_s() - path.stat().st_mtime > KEEP_DEAD_S:
                path.unlink()
