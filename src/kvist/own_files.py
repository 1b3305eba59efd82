"""Files and folders that are ours alone: what others could have put there is neither read nor written.

`own_folder` and `open_own` raise `OSError` before a byte is read or written: for a link, for what belongs to another
user, for what others may write, for a file with a second name, and for what is no plain file. A folder is made with
mode 0700 and a file with 0600. They need a POSIX system; on others nothing is checked.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_SAFE_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a link; a pipe that nobody writes to


def cache_folder() -> Path:
    """Of this user, for Kvist. Not made here."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")).absolute() / "kvist"


def own_folder(path: str | os.PathLike[str]) -> None:
    """Makes the folder where there is none."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "it is not a folder", os.fspath(path))
    _refuse_others(status, path, "chmod 700 it, or name a folder below it that can be made")


def open_own(path: str | os.PathLike[str], flags: int) -> int:
    """The descriptor of a plain file."""
    fd = os.open(path, flags | _SAFE_FLAGS, 0o600)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise PermissionError(errno.EPERM, "it is not a plain file", os.fspath(path))
        if status.st_nlink > 1:
            raise PermissionError(errno.EPERM, "the file has another name, too", os.fspath(path))
        _refuse_others(status, path, "chmod 600 it")
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_own_file(status: os.stat_result) -> bool:
    """Of an `lstat` or `fstat`: a plain file that nobody else may write."""
    return stat.S_ISREG(status.st_mode) and not _is_foreign(status) and not status.st_mode & _OTHERS_WRITE


def write_new(path: Path, content: bytes) -> None:
    """Readers see the whole file or none. Raises `OSError`; leaves nothing unfinished behind then."""
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
        raise PermissionError(errno.EPERM, f"other users may write there: {remedy}", os.fspath(path))
