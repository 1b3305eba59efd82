"""The runtime directory: files that the engines of one user on one host share (pool files, epoch locks).

The process that creates a file (its owner) holds an flock on it, from before the file gets its name until the process
ends. A process that can take the lock therefore knows that the owner is dead. `remove_leftovers` removes the files of
dead owners: pools at once, since a pool may be gigabytes; other files when no engine is running that could need them.
Every engine calls it when it starts and when it has ended; its parent process calls it after a kill.

Files in the directory are mapped and trusted: the directory must belong to this user and be closed to others.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvist.clock import MonotonicClock, unix_time_s
from kvist.errors import ConfigError
from kvist.own_files import open_own, own_folder

_SHARED_MEMORY = Path("/dev/shm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
POOL_PREFIX, _POOL_SUFFIX = "pool-", ".pages"
_POOL = re.compile(r"pool-\d+-[0-9a-f]{8}\.pages")
_UNFINISHED = re.compile(r"pool-\d+-[0-9a-f]{8}\.new|\.epoch-[\w-]{1,64}\.lock\.new")
_EPOCH = re.compile(r"epoch-[\w-]{1,64}\.lock")
# The file of tensor-parallel ranks has no lock of its own: rank 0 has a pool.
_RENDEZVOUS = re.compile(r"tp-\d+-[0-9a-f]{8}.*")
_UNFINISHED_S = 60.0  # a file younger than this may not be locked yet
_LOCK_WAIT_S, _PAUSE_S = 60.0, 0.01


def runtime_dir(named: str | None = None) -> Path:
    """Return the directory, created if missing. Raises `ConfigError` if its content could not be trusted."""
    path = _default() if named is None else Path(named).expanduser()
    which = f"--runtime-dir {path}" if named is not None else f"the runtime directory {path}"
    try:
        own_folder(path)
        if named is None and path.is_symlink():  # every user may write to /dev/shm and /tmp
            raise NotADirectoryError(0, "it is a symbolic link")
    except OSError as error:
        raise ConfigError(
            f"{which} cannot be used: {error.strerror}. The directory holds K/V pages of requests: name a directory of "
            "your own with --runtime-dir",
            param="runtime_dir",
        ) from error
    return path.resolve()


def _default() -> Path:
    """Return the default directory, in shared memory if there is any."""
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    on_memory = _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK)
    return (_SHARED_MEMORY if on_memory else Path(tempfile.gettempdir())) / f"kvist-{user}"


def host_id(directory: Path) -> str:
    """Return an id that only processes with the same directory on the same running system share: they can map each
    other's files. Containers of one host have different ids unless they share the directory, at the same path."""
    try:
        running = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        running = platform.node()
    status = os.stat(directory)  # a file system has one device number in all containers of a host
    place = f"{running}/{status.st_dev}/{status.st_ino}/{directory.resolve()}"
    return hashlib.blake2b(place.encode(), digest_size=6).hexdigest()


def free_bytes(directory: Path) -> int:
    """Return the free bytes of the directory's file system."""
    if not hasattr(os, "statvfs"):
        return 1 << 62
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def room_remedy(directory: Path) -> str:
    """Return the remedy for a file system of the directory that is too small."""
    remedy = f"{_mount_point(directory)} is too small: name a directory on a larger file system with --runtime-dir"
    if directory.is_relative_to(_SHARED_MEMORY):
        remedy += ", or give the container more shared memory (docker run --shm-size=8g)"
    return remedy


def _mount_point(directory: Path) -> Path:
    return next(path for path in (directory, *directory.parents) if path.is_mount() or path == path.parent)


def publish_pool(directory: Path, fill: Callable[[int], object]) -> tuple[Path, int]:
    """Create a pool file, locked and filled: (path, descriptor that holds the lock). Raises `OSError`."""
    path = directory / f"{POOL_PREFIX}{os.getpid()}-{secrets.token_hex(4)}{_POOL_SUFFIX}"
    unnamed = path.with_suffix(".new")  # renamed when the file is complete
    fd = open_own(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        _try_lock(fd)
        fill(fd)
        os.rename(unnamed, path)
    except OSError:
        os.close(fd)
        unnamed.unlink(missing_ok=True)
        raise
    return path, fd


@contextlib.contextmanager
def allocation_lock(directory: Path) -> Iterator[None]:
    """Allow one engine at a time to read how much memory is free and to allocate it. After `_LOCK_WAIT_S` the caller
    continues without the lock."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        clock = MonotonicClock()
        give_up_s = clock.now_s() + _LOCK_WAIT_S  # the engine that holds the lock may be stopped (SIGSTOP)
        while not _try_lock(fd) and clock.now_s() < give_up_s:
            time.sleep(_PAUSE_S)
        yield
    finally:
        os.close(fd)


def remove_leftovers(directory: Path) -> int:
    """Remove the files of dead engines; return their number. Several processes may do this at the same time."""
    names = sorted(os.listdir(directory)) if directory.is_dir() else []
    dead, num_alive = list[Path](), 0
    for name in names:
        if _POOL.fullmatch(name) or _EPOCH.fullmatch(name) or _UNFINISHED.fullmatch(name):
            path = directory / name
            match _is_dead(path, old_only=_UNFINISHED.fullmatch(name) is not None):
                case True:
                    dead.append(path)
                case False:
                    num_alive += 1
    if not num_alive:
        dead += [directory / name for name in names if _RENDEZVOUS.fullmatch(name)]
    removed = 0
    for path in dead:
        if num_alive and _EPOCH.fullmatch(path.name):  # a running peer may check whether that epoch has ended
            continue
        with contextlib.suppress(OSError):
            path.unlink()
            removed += 1
    return removed


def _is_dead(path: Path, *, old_only: bool) -> bool | None:
    """Return whether the file's owner is dead; None if the file is gone or does not belong to this user."""
    with contextlib.suppress(OSError):
        fd = open_own(path, os.O_RDWR)
        try:
            if old_only and unix_time_s() - os.fstat(fd).st_mtime < _UNFINISHED_S:
                return False
            return _try_lock(fd, shared=True)  # shared: several processes may check at once
        finally:
            os.close(fd)
    return None


def _try_lock(fd: int, *, shared: bool = False) -> bool:
    try:
        import fcntl  # missing on some systems; no file counts as abandoned there
    except ImportError:
        return False
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
