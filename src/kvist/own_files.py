"""Private files and folders: files that another user could have placed or changed are neither read nor written.

`own_folder` and `open_own` raise `OSError` before a byte is read or written: for a link, for a file or folder of
another user or writable by others, for a file with a second hard link, and for anything but a regular file. Folders are
created with mode 0700, files with 0600. The checks need a POSIX system; other systems are not checked.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_SAFE_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # no links; never block on a pipe


def cache_folder() -> Path:
    """Return the user's cache folder for Kvist; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")).absolute() / "kvist"


def own_folder(path: str | os.PathLike[str]) -> None:
    """Create the folder if missing, and check it. Raises `OSError`."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "it is not a folder", os.fspath(path))
    _refuse_others(status, path, "run chmod 700 on it, or use a new folder below it")


def open_own(path: str | os.PathLike[str], flags: int) -> int:
    """Open a regular file and return its descriptor. Raises `OSError`."""
    fd = os.open(path, flags | _SAFE_FLAGS, 0o600)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise PermissionError(errno.EPERM, "it is not a regular file", os.fspath(path))
        if status.st_nlink > 1:
            raise PermissionError(errno.EPERM, "the file has a second hard link", os.fspath(path))
        _refuse_others(status, path, "run chmod 600 on it")
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_own_file(status: os.stat_result) -> bool:
    """Return whether an `lstat` or `fstat` result is of a regular file that only this user can write."""
    return stat.S_ISREG(status.st_mode) and not _is_foreign(status) and not status.st_mode & _OTHERS_WRITE


def write_new(path: Path, content: bytes) -> None:
    """Write a file atomically: readers see the whole file or none. Raises `OSError` and leaves no partial file."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        fd = open_own(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            os.write(fd, content)
        finally:
            os.close(fd)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def _is_foreign(status: os.stat_result) -> bool:
    return hasattr(os, "geteuid") and status.st_uid != os.geteuid()


def _refuse_others(status: os.stat_result, path: str | os.PathLike[str], remedy: str) -> None:
    if _is_foreign(status):
        raise PermissionError(errno.EPERM, "it belongs to another user", os.fspath(path))
    if hasattr(os, "geteuid") and status.st_mode & _OTHERS_WRITE:
        raise PermissionError(errno.EPERM, f"other users can write to it: {remedy}", os.fspath(path))
