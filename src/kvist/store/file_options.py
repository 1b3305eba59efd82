"""The options of a file store: its folder and its size. Also checks which folders an HTTP client may name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvist.config import option
from kvist.door import Given
from kvist.errors import ConfigError, RequestError
from kvist.own_files import cache_folder

DEFAULT_GB = 64.0
_GB, _MAX_GB = 10**9, 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStoreOptions:
    """Raises `ConfigError` for an impossible value."""

    path: str | None = option(
        None, "folder of the file store; created if missing", unset="kvist/pages in the user's cache folder"
    )
    size: float = option(DEFAULT_GB, "maximum total size of the pages in the store", unit="GB", minimum=0.001)

    def __post_init__(self) -> None:
        if self.path == "":
            raise ConfigError("the path of the file store is empty: name a folder, or omit the option", param="path")
        if self.path is not None and not self.path.isprintable():
            raise ConfigError(f"{self.path!r} is not the path of a folder", param="path")
        if not 0 < self.size < _MAX_GB:
            raise ConfigError(
                f"a store of {self.size:g} GB is not possible: the size must be at least one page, and less than "
                f"{_MAX_GB} GB",
                param="size",
            )

    def __str__(self) -> str:
        return f"a file store in {self.folder} of at most {self.size:g} GB"

    @property
    def folder(self) -> Path:
        """The folder, with links resolved."""
        if self.path is None:
            return cache_folder() / "pages"
        return Path(os.path.realpath(os.path.expanduser(self.path)))

    @property
    def location(self) -> str:
        return str(self.folder)

    @property
    def capacity_bytes(self) -> int:
        return round(self.size * _GB)

    def resolved(self) -> FileStoreOptions:
        return dataclasses.replace(self, path=str(self.folder))

    def with_request(self, requested: Given, roots: Sequence[str]) -> FileStoreOptions:
        """Return these options, changed by those of an HTTP client, and resolved. The client may name the folders in
        `roots`, or without `roots` the folder of these options, and folders below. Raises `RequestError` for any other
        folder. Opens no folder."""
        options = FileStoreOptions(**{"path": self.path, "size": self.size, **requested})  # type: ignore[arg-type]
        if requested.get("path") is None:
            return options.resolved()
        folder = requested_folder(str(options.path), roots or (str(self.folder),))
        return dataclasses.replace(options, path=str(folder))


def requested_folder(requested: str, roots: Sequence[str]) -> Path:
    """Return the folder named by an HTTP client, with links resolved; opens no file. Raises `RequestError` unless the
    folder is below one of the allowed folders, both as written and after links are resolved."""
    if not os.path.isabs(requested):
        raise RequestError(f"{requested!r} is not an absolute path: start the path with /", param="path")
    full_roots = [os.path.abspath(os.path.expanduser(root)) for root in roots]
    real_roots = [os.path.realpath(root) for root in full_roots]
    written = Path(os.path.normpath(requested))
    if any(map(written.is_relative_to, full_roots + real_roots)):
        folder = Path(os.path.realpath(requested))
        if any(map(folder.is_relative_to, real_roots)):
            return folder
    raise RequestError(
        f"{requested!r} is not below {' or '.join(full_roots)}: start the worker with a folder above it as "
        "--hicache-storage-roots",
        param="path",
    )
