"""Reads the cluster key: from the setting, from the file named by a setting, or from the user's own key file.

The user's own file is created at first use, so that processes of one user on one machine can connect to each other
without an option, but not to processes of other users. A key file is accepted if it is a regular file, belongs to this
user (or to root, as secrets in containers do), and no other user can read it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
import tempfile
from dataclasses import replace
from pathlib import Path

from kvist.channel.security import MAKE_A_KEY, ChannelConfig
from kvist.errors import ConfigError

MIN_KEY_CHARS = 16
_MAX_FILE_BYTES = 4096


logger = logging.getLogger(__name__)


def with_cluster_key(config: ChannelConfig, *, serves_alone: bool = False) -> ChannelConfig:
    """Return the config with its key. Raises `ConfigError`, with the remedy, for a missing or untrusted key.

    A process that `serves_alone` needs no key file: if the file cannot be written, the process uses a random key."""
    if config.cluster_key is not None and config.cluster_key_file is not None:
        raise ConfigError(
            "--cluster-key and --cluster-key-file are both set: use one of them", param="cluster_key_file"
        )
    if config.cluster_key is not None:
        key = _checked(config.cluster_key, "--cluster-key")
    elif config.cluster_key_file is not None:
        key = _read(Path(config.cluster_key_file).expanduser())
    else:
        try:
            key = _own_key()
        except OSError as error:
            if not serves_alone:
                raise ConfigError(
                    f"cannot write the cluster key to your configuration folder: {error}. Make a key file elsewhere "
                    f"and give it to every process of the cluster: {MAKE_A_KEY}, then --cluster-key-file FILE",
                    param="cluster_key_file",
                ) from error
            logger.info("routers cannot use this worker: %s, and --cluster-key-file is not set", error)
            key = secrets.token_hex(32)
    return replace(config, cluster_key=key, cluster_key_file=None)


def with_private_key(config: ChannelConfig) -> ChannelConfig:
    """Return the config with its key, as `with_cluster_key` does; without a setting, with a new random key."""
    if config.cluster_key is None and config.cluster_key_file is None:
        return replace(config, cluster_key=secrets.token_hex(32))
    return with_cluster_key(config)


def _own_key_file() -> Path:
    folder = os.environ.get("XDG_CONFIG_HOME")
    try:
        return (Path(folder) if folder else Path.home() / ".config") / "kvist" / "cluster.key"
    except RuntimeError as error:
        raise FileNotFoundError("this user has no home folder") from error


def _own_key() -> str:
    """Return the key of the user's own file, which is created if missing. Raises `OSError` if that is impossible."""
    path = _own_key_file()
    if not path.exists():
        _make(path)
    return _read(path)


def _make(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, unpublished = tempfile.mkstemp(dir=path.parent, prefix=".cluster.key.")  # mode 0600
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32) + "\n")
        with contextlib.suppress(FileExistsError):  # another process was first: use its key
            os.link(unpublished, path)
    finally:
        os.unlink(unpublished)


def _read(path: Path) -> str:
    where = f"the cluster key file {path}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        hint = f"; make one: {MAKE_A_KEY}" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"{where} cannot be read: {error.strerror}{hint}", param="cluster_key_file") from error
    try:
        fault = _fault_of(os.fstat(descriptor), path)
        content = b"" if fault else os.read(descriptor, _MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if fault:
        raise ConfigError(f"{where} {fault}", param="cluster_key_file")
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{where} has over {_MAX_FILE_BYTES} bytes and is not a key file", param="cluster_key_file")
    return _checked(content.decode("utf-8", "replace"), where)


def _fault_of(found: os.stat_result, path: Path) -> str | None:
    if not stat.S_ISREG(found.st_mode):
        return "is not a regular file"
    if found.st_uid not in (os.geteuid(), 0):
        return "belongs to another user, who may know the key: use a file of your own"
    if found.st_mode & 0o077:
        return f"is readable by other users: run chmod 600 {path}"
    return None


def _checked(key: str, where: str) -> str:
    key = key.strip()
    if len(key) < MIN_KEY_CHARS:
        raise ConfigError(
            f"{where} has {len(key)} characters and could be guessed; at least {MIN_KEY_CHARS} are required. "
            f"Make a key: {MAKE_A_KEY}",
            param="cluster_key",
        )
    return key
