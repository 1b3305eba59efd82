"""The folder on an SSD where a store keeps its pages, one file each.

One process uses a folder at a time: it holds a lock. While a store serves, a note in the folder names its run, by the
client id under which the master knows it; an orderly stop removes the note. A note found at the start is of a run that
crashed, and the master may still know that run. If the store announced its files meanwhile, the master would drop them
together with the earlier run, so the store waits (store.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvist.errors import UNDECODABLE, ConfigError

_LOCK, _NOTE = "kvist-store.lock", "kvist-store.json"
_PAGES = "file_per_key_dir"  # the library's own folder
_TENANT = "default_"  # before the key, in the name of a file
_FREE_SHARE = 0.9
_GB = 10**9


class RunNote(msgspec.Struct, frozen=True):
    """The run of a store that uses the folder."""

    client_id: str
    segment_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    num_pages: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFile:
    path: str
    key: str  # of the page in the pool
    num_bytes: int
    written_ns: int


class SsdFolder:
    """An open folder. `close` releases the lock, as does the end of the process."""

    def __init__(self, path: Path) -> None:
        """Raises `ConfigError` unless the folder exists, is writable, and is used by no other process."""
        self.path = path
        try:
            self._lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(
                f"--ssd-path {path}: there is no such folder; create it: mkdir -p {path}", param="ssd_path"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"--ssd-path {path}: this process cannot write there ({error.strerror}): give the folder to its user",
                param="ssd_path",
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(
                f"--ssd-path {path}: another store uses this folder; give each store its own", param="ssd_path"
            ) from error

    def close(self) -> None:
        os.close(self._lock)

    def capacity_bytes(self, size_gb: float | None) -> int:
        """Return the maximum size of the pages: as given, or most of the space that is free or theirs already."""
        if size_gb is not None:
            return int(size_gb * _GB)
        return int((shutil.disk_usage(self.path).free + self.contents().num_bytes) * _FREE_SHARE)

    def contents(self) -> Contents:
        """Count the files of pages. Reads folders, not files: about 1 s for a million pages."""
        num_pages = num_bytes = 0
        for _, status in self._files():
            num_bytes += status.st_size
            num_pages += 1
        return Contents(num_pages=num_pages, num_bytes=num_bytes)

    def pages(self) -> list[PageFile]:
        """Return the files of pages, the oldest first."""
        found = []
        for path, status in self._files():
            key = os.path.basename(path).removeprefix(_TENANT)
            found.append(PageFile(path=path, key=key, num_bytes=status.st_size, written_ns=status.st_mtime_ns))
        return sorted(found, key=lambda page: page.written_ns)

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        for folder, _, names in os.walk(self.path / _PAGES):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                    yield path, os.stat(path)

    def note(self) -> RunNote | None:
        """Return the note of a run that did not end in order."""
        try:
            return msgspec.json.decode((self.path / _NOTE).read_bytes(), type=RunNote)
        except (FileNotFoundError, *UNDECODABLE):
            return None

    def write_note(self, note: RunNote) -> None:
        temporary = self.path / f"{_NOTE}.new"
        temporary.write_bytes(msgspec.json.encode(note))
        temporary.replace(self.path / _NOTE)

    def remove_note(self) -> None:
        (self.path / _NOTE).unlink(missing_ok=True)
