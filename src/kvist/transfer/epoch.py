"""The epoch of an engine process: one run of the process. Other processes of the host can find out that it is over.

Each engine holds a lock (flock) on `<runtime_dir>/epoch-<id>.lock`, from before its id is published until the kernel
releases the lock, which happens only after the last thread of the process has ended. A process that can take the lock
therefore knows that the owner can no longer read or write any page.

The file is locked under another name and then renamed, so while its owner runs it is never visible without the lock.
While other engines of the folder run, the file stays for at least `KEEP_DEAD_S` after the end, so that a late peer can
still distinguish "dead" from "unknown"; then `sweep`, which every engine runs at its start, removes the file.
memory/runtime_dir.py removes the pool file of a dead engine at once, and epoch files when no engine runs.

Locks work on one host only. A transport between hosts revokes a peer's access instead (mooncake.py).
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
MAX_WATCHED = 256  # lock files kept open; the least recently checked is closed first
_FOUND_DEAD = stat.S_IXUSR  # mode bit of the file: `sweep` found this epoch dead, at the file's mtime
_EPOCH_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # from a peer, and part of a path


def new_epoch() -> EpochId:
    return EpochId(secrets.token_hex(8))


def lock_path(runtime_dir: Path, epoch: EpochId) -> Path:
    return runtime_dir / f"epoch-{epoch}.lock"


def try_lock(descriptor: int, *, exclusive: bool) -> bool:
    """Try to lock a file. `exclusive=False` tests for the owner: any number of processes may test at once, and all fail
    while the owner runs."""
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
    """The lock of an engine's epoch. Made before the pool, and closed after all other parts."""

    def __init__(self, runtime_dir: Path, epoch: EpochId) -> None:
        assert _EPOCH_ID.fullmatch(epoch), f"not an epoch id: {epoch!r}"
        self.epoch = epoch
        path = lock_path(runtime_dir, epoch)
        unpublished = runtime_dir / f".{path.name}.new"
        self._descriptor: int | None = os.open(unpublished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        locked = try_lock(self._descriptor, exclusive=True)
        assert locked, "the file is not published yet"
        os.rename(unpublished, path)

    def close(self) -> None:
        """End the epoch. The file stays, so that peers can see the end."""
        if self._descriptor is None:
            return
        os.close(self._descriptor)
        self._descriptor = None


class EpochWatch:
    """Checks whether other epochs are over. Keeps their files open, so that the removal of a file has no effect.

    Mutable, used by one thread.
    """

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self._seen: OrderedDict[EpochId, int | None] = OrderedDict()  # open lock file; None: dead

    def is_dead(self, epoch: EpochId) -> bool:
        """Return whether `epoch` is over. False for an unknown epoch, which may be on another host."""
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

    def is_here(self, epoch: EpochId) -> bool:
        """Return whether the epoch is or was one of this runtime folder, so that its end can be proved."""
        self.is_dead(epoch)
        return epoch in self._seen

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
    """Yield the lock file of each epoch of this folder, and whether the epoch is over."""
    watch = EpochWatch(runtime_dir)
    try:
        for path in sorted(runtime_dir.glob("epoch-*.lock")):
            yield path, watch.is_dead(EpochId(path.stem.removeprefix("epoch-")))
    finally:
        watch.close()


def num_live_epochs(runtime_dir: Path) -> int:
    """Return how many engines of this runtime folder are running."""
    return sum(not is_dead for _, is_dead in _epochs(runtime_dir))


def sweep(runtime_dir: Path) -> None:
    """Remove the lock files of epochs that ended more than `KEEP_DEAD_S` ago."""
    for path, is_dead in _epochs(runtime_dir):
        if not is_dead:
            continue
        with contextlib.suppress(FileNotFoundError):  # another engine may be sweeping too
            if path.stat().st_mode & _FOUND_DEAD == 0:
                path.chmod(0o600 | _FOUND_DEAD)
                os.utime(path)  # first found dead: the wait starts now
            elif unix_time_s() - path.stat().st_mtime > KEEP_DEAD_S:
                path.unlink()
