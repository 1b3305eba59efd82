"""The secret of a store, by which a worker distinguishes pages of its own cluster from forged pages.

Without `--hicache-storage-secret-file` the secret is a file in the store's own folder, filled with random bytes by the
first worker that opens the folder. Other users cannot read the file. If others can write to the disk itself (a network
mount), all workers that share the store need the same secret file from another place. Workers with different secrets
can use one folder at the same time, and share no page.
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
_CONTEXT = "kvist 2026-11-29 pages of a shared store"  # BLAKE3's context string: distinguishes uses of one secret


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
    """Return the folder's own secret, created if missing. The caller holds the folder's lock. Raises `OSError`."""
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
    if len(secret) < _MIN_BYTES:  # incomplete after a power loss: pages stored with this secret are lost
        path.unlink()
        return secret_of(root)
    return secret


def has_secret(root: Path) -> bool:
    return os.path.lexists(root / _NAME)


def keep_secret(root: Path, secret: bytes) -> None:
    """Write the secret again if the folder was removed and created again, so that workers that open the folder later
    can use the pages stored from now on. The caller holds the folder's lock."""
    if not has_secret(root):
        write_new(root / _NAME, secret + b"\n")


def page_key(secret: bytes, namespace: str) -> bytes:
    """Derive the key for the pages of one namespace: 32 bytes."""
    key = blake3(secret, derive_key_context=_CONTEXT).digest()
    return blake3(namespace.encode(), key=key).digest()
