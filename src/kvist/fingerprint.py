"""Computes the fingerprint of a model: a hash of every byte of its weights and of `config.json`.

Two models with equal name, size and configuration but any different byte have different fingerprints; equal files have
equal fingerprints on every host. Hashing takes 0.13 s of one core per GB in the page cache, otherwise as long as the
disk needs. The digest is therefore cached in the user's cache folder, keyed by the file's path, and is valid while the
file's inode, size and times of change stay the same. Nothing is written to the model's folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
from blake3 import blake3

from kvist.checkpoint import Checkpoint, CheckpointKind
from kvist.clock import MonotonicClock, unix_time_ns
from kvist.cores import num_usable_cores
from kvist.errors import UNDECODABLE, ModelLoadError
from kvist.own_files import cache_folder, open_own, own_folder, write_new

T = TypeVar("T")

_MAX_THREADS = 4
_MAX_RECORD_BYTES = 1 << 16
_SETTLED_NS = 2 * 10**9  # a file may change twice within one tick of the file system's clock

logger = logging.getLogger(__name__)


class _DigestRecord(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int  # also changes when mtime is set back
    digest: str


def model_fingerprint(checkpoint: Checkpoint, *, with_weights: bool = True) -> str:
    """Return 64 hex digits. Without weights, hash the configuration only, if it is a separate file. Raises
    `ModelLoadError`."""
    files = [checkpoint.path]
    digest = blake3(b"")
    try:
        if checkpoint.kind is CheckpointKind.HF:
            digest.update((checkpoint.path / "config.json").read_bytes())
            files = sorted(checkpoint.path.glob("*.safetensors")) if with_weights else []
        for file in files:
            digest.update(b"\0" + cached_digest("content", file, partial(_hash_file, file)).encode())
    except OSError as error:
        raise ModelLoadError(f"cannot read the model in {checkpoint.path}: {error}") from error
    return digest.hexdigest()


def cached_digest(kind: str, file: Path, compute: Callable[[], str]) -> str:
    """Return the cached result of `compute` for the file's content; call `compute` if the file has changed."""
    path = os.path.realpath(file)
    record_path = cache_folder() / "digests" / blake3(f"{kind}\0{path}".encode()).hexdigest(length=16)
    before = _identity(path, "")
    record = _read_record(record_path)
    if record is not None and msgspec.structs.replace(record, digest="") == before:
        return record.digest
    digest = compute()
    if _identity(path, "") == before and unix_time_ns() - max(before.mtime_ns, before.ctime_ns) > _SETTLED_NS:
        with contextlib.suppress(OSError):  # no home folder, or full or read-only: hashed again at the next start
            own_folder(record_path.parent)
            write_new(record_path, msgspec.json.encode(msgspec.structs.replace(before, digest=digest)))
    return digest


class Background(Generic[T]):
    """A value computed by a thread in the background. The thread does not keep the process alive."""

    def __init__(self, compute: Callable[[], T], name: str) -> None:
        self._compute = compute
        self._outcome: list[T] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def result(self) -> T:
        """Wait for the value. Raises the exception of `compute`."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._outcome[0]

    def _run(self) -> None:
        try:
            self._outcome.append(self._compute())
        except Exception as error:  # raised by `result`
            self._error = error


def _hash_file(path: Path) -> str:
    clock = MonotonicClock()
    start_s = clock.now_s()
    digest = blake3(max_threads=min(_MAX_THREADS, num_usable_cores())).update_mmap(path).hexdigest()
    gb, seconds = path.stat().st_size / 1e9, clock.now_s() - start_s
    if seconds > 1:
        logger.info("hashed %s: %.1f GB in %.1f s", path, gb, seconds)
    return digest


def _identity(path: str, digest: str) -> _DigestRecord:
    status = os.stat(path)
    return _DigestRecord(
        path=path,
        inode=status.st_ino,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
        digest=digest,
    )


def _read_record(path: Path) -> _DigestRecord | None:
    with contextlib.suppress(OSError, *UNDECODABLE):
        fd = open_own(path, os.O_RDONLY)
        try:
            return msgspec.json.decode(os.read(fd, _MAX_RECORD_BYTES), type=_DigestRecord)
        finally:
            os.close(fd)
    return None
