"""The secret of a store: with it, a worker distinguishes pages of its own cluster from forged pages.

Without `--hicache-storage-secret-file` the secret is a file in the store's own folder, drawn at random by the first
worker that opens the folder. The file is safe from other users, since only its owner may read it. If others can write
to the disk itself (a network mount), name a file elsewhere, the same for all workers that share the store. Workers with
different secrets can use one folder side by side, and share no page.
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
_CONTEXT = "kvist 2026-11-29 pages of a shared store"  # BLAKE3's context string: separates uses of one secret


def read_secret(path: Path) -> bytes:
    """Read the secret from the operator's file. Its owner is not checked: a mounted secret may belong to another user.
    Raises `ConfigError`."""
    try:
        with path.open("rb") as file:
            secret = file.read(_MAX_BYTES + 1).strip()
    except OSError as error:
        raise ConfigError(
            f"--hicache-storage-secret-file {path} cannot be read: {error.strerror}",
            param="secret_file",
        ) from error
    if not _MIN_BYTES <= len(secret) <= _MAX_BYTES:
        raise ConfigError(
            f"--hicache-storage-secret-file {path} has {len(secret)} bytes; it needs {_MIN_BYTES} to {_MAX_BYTES}: "
            f"make one with `openssl rand -hex 32 > {path}`",
            param="secret_file",
        )
    return secret


def secret_of(root: Path) -> bytes:
    """Return the folder's own secret, drawn if missing. The caller holds the folder's lock. Raises `OSError`."""
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
    if len(secret) < _MIN_BYTES:  # cut short by a power loss: pages stored with it are lost, and will be evicted
        path.unlink()
        return secret_of(root)
    return secret


def has_secret(root: Path) -> bool:
    return os.path.lexists(root / _NAME)


def keep_secret(root: Path, secret: bytes) -> None:
    """Write the secret into a folder that was removed and created again, so that workers that open the folder later
    share the pages stored from now on. The caller holds the folder's lock."""
    if not has_secret(root):
        write_new(root / _NAME, secret + b"\n")


def page_key(secret: bytes, namespace: str) -> bytes:
    """Derive the key for the pages of one namespace: 32 bytes."""
    key = blake3(secret, derive_key_context=_CONTEXT).digest()
    return blake3(namespace.encode(), key=key).digest()
