"""A second map of a pool's file, through which one peer writes, and which can be closed at any moment.

    window.address ─► | head: 1 page of the system | the pool's pages, mapped once more |

A network library writes received bytes through the window's addresses. `close` replaces the map by inaccessible memory
in one system call: a write in progress ends before the call returns or fails with EFAULT, and so does each later write,
however long its bytes were under way. The addresses stay reserved until the process ends, so that no later map can get
them. A process has 128 TiB of addresses: enough to close the windows of a pool of 16 GiB 8,000 times.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import cache
from pathlib import Path
from typing import Any

from kvist.errors import EngineError
from kvist.own_files import open_own

HEAD_BYTES = mmap.PAGESIZE
_NO_ACCESS, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000  # Linux; Python's mmap does not name them
_FAILED = 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


class PageWindow:
    """Mutable: open or closed."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Map the pool's file, behind a head of zeros. Raises `EngineError`."""
        self.num_bytes = HEAD_BYTES + num_bytes
        self.is_open = False
        try:
            self.address = _map(None, self.num_bytes, _NO_ACCESS, _ANONYMOUS, -1)
            _map(self.address, HEAD_BYTES, _READ_WRITE, _ANONYMOUS | _MAP_FIXED, -1)
            descriptor = open_own(path, os.O_RDWR)
            try:
                _map(self.address + HEAD_BYTES, num_bytes, _READ_WRITE, mmap.MAP_SHARED | _MAP_FIXED, descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise EngineError(f"the page pool {path} cannot be mapped once more: {error}") from error
        self.is_open = True

    def set_head(self, head: bytes) -> None:
        assert self.is_open
        assert len(head) <= HEAD_BYTES
        ctypes.memmove(self.address, head, len(head))

    def close(self) -> None:
        """Make all bytes inaccessible. When this returns, no byte of the pool is written through the window."""
        if self.is_open:
            _map(self.address, self.num_bytes, _NO_ACCESS, _ANONYMOUS | _MAP_FIXED, -1)
            self.is_open = False


def _map(address: int | None, num_bytes: int, protection: int, flags: int, descriptor: int) -> int:
    mapped: int = _libc().mmap(address, num_bytes, protection, flags, descriptor, 0)
    if mapped == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return mapped


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    return libc
