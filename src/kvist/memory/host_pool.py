"""The host tier's page pool (L2): one buffer of whole pages in host memory, and its size.

Life cycle: `plan_host_pages` decides the number of pages, and refuses a pool that does not fit; `HostPool` allocates
the buffer before the engine is ready, and pins it for a GPU, so that copies run while the model computes; `close`
unpins the buffer after the mover has stopped. All memory is allocated at the start: too little memory is an error at
that time, and cannot kill the engine later. The memory has a file descriptor but no name: processes to which the engine
gives the descriptor read pages into the pool (page_readers/), and no other can.

kv/tiers/host.py decides which slot holds which page.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from kvist.cores import num_usable_cores
from kvist.errors import ConfigError
from kvist.memory.persistence import PersistentPages

_GB, _GIB = 10**9, 1 << 30
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU of the process
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, from Linux 5.14 on
_SLICE_BYTES = 1 << 28


def plan_host_pages(
    page_bytes: int,
    *,
    num_device_pages: int,
    ratio: float,
    size_gb: float | None,  # instead of the ratio
    available_bytes: int,
) -> int:
    """Return the number of host pages. Raises `ConfigError` if they do not fit, or if the pool would have no page."""
    num_pages = int(num_device_pages * ratio) if size_gb is None else int(size_gb * _GB) // page_bytes
    flag, value, param = ("--hicache-ratio", ratio, "hicache_ratio")
    if size_gb is not None:
        flag, value, param = ("--hicache-size", size_gb, "hicache_size")
    num_bytes = num_pages * page_bytes
    if num_pages < 1:
        raise ConfigError(f"{flag} {value:g} is smaller than one page of {page_bytes} bytes: raise it", param=param)
    if num_bytes > available_bytes:
        raise ConfigError(
            f"{flag} {value:g}: the host tier needs {num_bytes / _GIB:.2f} GiB ({num_pages} pages of {page_bytes} "
            f"bytes), but {max(0, available_bytes) / _GIB:.2f} GiB of host memory are free: lower {flag}, or "
            "--max-total-tokens",
            param=param,
        )
    return num_pages


class HostPool:
    """`tensor`: [num_pages, page_bytes], uint8, on the host; `fd`: of its memory, which other processes can map. Raises
    `ConfigError` if it cannot be allocated or pinned.

    With `persistent`, the pool uses the memory of `persistent`, which outlives the pool, and `fd` is None: a process
    that outlived the engine could write into the pool of the next one.
    """

    def __init__(
        self, num_pages: int, page_bytes: int, *, pinned: bool, persistent: PersistentPages | None = None
    ) -> None:
        self.persistent = persistent
        self.fd: int | None = None
        if persistent is None:
            self.fd, self.tensor = _shared(num_pages, page_bytes)
        else:
            self.tensor = persistent.tensor
        self._pinned = False
        if persistent is None or pinned:
            _make_resident(self.tensor)
        if pinned:
            _pin(self.tensor)
            self._pinned = True

    def close(self) -> None:
        """Unpin and release the memory. No copy may be under way."""
        if self._pinned:
            _cuda().cudaHostUnregister(self.tensor.data_ptr())
            self._pinned = False
        self.tensor = torch.empty((0, 0), dtype=torch.uint8)
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def _shared(num_pages: int, page_bytes: int) -> tuple[int, Tensor]:
    """Return memory that other processes can map, with its file descriptor. Raises `ConfigError`."""
    fd = -1
    try:
        fd = os.memfd_create("kvist-host-tier")
        os.ftruncate(fd, num_pages * page_bytes)
        memory = mmap.mmap(fd, num_pages * page_bytes)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise ConfigError(
            f"no memory for the host tier: {error}; lower --hicache-size", param="hicache_size"
        ) from error
    return fd, torch.frombuffer(memory, dtype=torch.uint8).view(num_pages, page_bytes)


def _pin(memory: Tensor) -> None:
    """Pin the memory in place. Torch's own pinned memory is rounded up to a power of two, up to twice the size."""
    status = _cuda().cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE)
    if int(status):
        raise ConfigError(
            f"{memory.nbytes / _GIB:.2f} GiB of host memory cannot be pinned (CUDA error {int(status)}): lower "
            "--hicache-ratio or --hicache-size, raise the limit of locked memory, or let --hicache-persist name a "
            "folder in shared memory (/dev/shm)",
            param="hicache_size",
        )


def _make_resident(memory: Tensor) -> None:
    """Make the memory resident without changing its content. Pinning would do the same, but in one thread and with
    small pages of the system, at 3 GB/s. Raises `ConfigError` if the system has too little memory."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    start, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    start -= start % mmap.PAGESIZE

    def populate(first: int) -> int:
        failed = madvise(first, min(_SLICE_BYTES, end - first), _POPULATE_WRITE)
        return ctypes.get_errno() if failed else 0  # EINVAL: an older kernel; memory is allocated on the first write

    madvise(start, end - start, mmap.MADV_HUGEPAGE)
    with ThreadPoolExecutor(min(16, num_usable_cores())) as threads:
        errors = set(threads.map(populate, range(start, end, _SLICE_BYTES)))
    if errors & {errno.ENOMEM, errno.EFAULT}:
        raise ConfigError(
            f"no memory for the host tier: {memory.nbytes / _GIB:.2f} GiB; lower --hicache-size", param="hicache_size"
        )


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
