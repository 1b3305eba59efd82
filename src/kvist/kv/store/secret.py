"""The secret of a store: who has it can tell a page that one of us wrote from one that somebody else put there.

Without a file named for it (`--hicache-storage-secret-file`) it lies in the store's own folder, drawn by the first who
opens that: safe from other users, since nobody else may read it there. Where others may write to the disk itself (a
network mount), name a file elsewhere, the same for all workers that share the store. Workers with different secrets use
one folder side by side and never meet.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from blake3 import blake3

from kvist.errors import ConfigError
from kvist.own_files import open_own, write_new

_NAME = "secret"
_MIN_BYTES, _MAX_BYTES = 16, 4096
_CONTEXT = "kvist 2026-11-29 pages of a shared store"  # BLAKE3's separation of what one secret is used for


def read_secret(path: Path) -> bytes:
    """Of a file that the operator named, and whose owner is his business (a mounted secret has another one). Raises
    `ConfigError`."""
    try:
        with path.open("rb") as file:
            secret = file.read(_MAX_BYTES + 1).strip()
    except OSError as error:
        raise ConfigError(
            f"--hicache-storage-secret-file {path} cannot be read: {error.strerror}",
            param="hicache_storage_secret_file",
        ) from error
    if not _MIN_BYTES <= len(secret) <= _MAX_BYTES:
        raise ConfigError(
            f"--hicache-storage-secret-file {path} has {len(secret)} bytes; it needs {_MIN_BYTES} to {_MAX_BYTES}: "
            f"make one with `openssl rand -hex 32 > {path}`",
            param="hicache_storage_secret_file",
        )
    return secret


def secret_of(root: Path) -> bytes:
    """The folder's own; drawn if it has none. The caller holds the folder's lock. Raises `OSError`."""
    path = root / _NAME
    try:
        fd = open_own(path, os.O_RDONLY)
    except FileNotFoundError:
        secret = secrets.token_hex(32).encode()
        write_new(path, secret + b"\n")
        return secret
    try:
        secret = os.read(fd, _MAX_BYTES).strip()
    finally:
        os.close(fd)
    if len(secret) < _MIN_BYTES:  # of a power loss: what was stored under it is lost, and gives way in time
        path.unlink()
        return secret_of(root)
    return secret


def has_secret(root: Path) -> bool:
    return os.path.lexists(root / _NAME)


def keep_secret(root: Path, secret: bytes) -> None:
    """The folder was removed and made again: those who open it next shall share what is stored from now on. The caller
    holds the folder's lock."""
    if not has_secret(root):
        write_new(root / _NAME, secret + b"\n")


def page_key(secret: bytes, namespace: str) -> bytes:
    """For the pages of one namespace, 32 bytes."""
    key = blake3(secret, derive_key_context=_CONTEXT).digest()
    return blake3(namespace.encode(), key=key).digest()
