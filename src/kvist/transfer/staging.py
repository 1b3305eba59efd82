"""Pages of a pool on a GPU, moved through host memory: the part that all transports through host memory have in common.

    our pool ──(pinned buffer)──► host memory of the peer          `StagedPool.fetch`, and the transport's own writes
    the peer's writes ──► our `ArrivalsFile` ──(pinned buffer)──► our pool                        `StagedPool.digests`

The file of arrivals has the size of the pool, and takes no memory until pages arrive. A writer puts page i at place i.
The receiver copies the page to the GPU when it verifies the page, and returns the memory of that place. The pages of a
handoff that failed keep their places until they are granted again. The digest of a page is xxh3_128, as on a CPU.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from kvist.memory.runtime_dir import publish_pool
from kvist.transfer.host_pages import Pages

GROUP_BYTES = 16 << 20  # in one buffer: copied between two checks for a stop


class ArrivalsFile:
    """The file into which peers write pages for a pool on a GPU. Locked by this process while it is open."""

    def __init__(self, directory: Path, num_pages: int, page_bytes: int) -> None:
        num_bytes = num_pages * page_bytes
        self.path, self._descriptor = publish_pool(directory, lambda descriptor: os.ftruncate(descriptor, num_bytes))
        self._page_bytes = page_bytes
        self._mapped = mmap.mmap(self._descriptor, num_bytes)  # never read or written: only memory is returned by it

    def read(self, page_id: int, into: Pages) -> None:
        """Read the page at a place; zeros if none has arrived there."""
        done = 0
        while done < self._page_bytes:
            done += os.preadv(self._descriptor, [into[done:].data], page_id * self._page_bytes + done)

    def clear(self, page_id: int) -> None:
        """Return the memory of a place to the system; an error (a file system without holes) changes nothing else."""
        start = -(-page_id * self._page_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (page_id + 1) * self._page_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end and hasattr(mmap, "MADV_REMOVE"):
            with contextlib.suppress(OSError):
                self._mapped.madvise(mmap.MADV_REMOVE, start, end - start)

    def close(self) -> None:
        """Remove the file. May be called again."""
        if not self._mapped.closed:
            self._mapped.close()
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)


class StagedPool:
    """The pages of a pool on a GPU. Used by one thread at a time. The stream waits for no other stream, for the reasons
    in device_pages.py. Tests use a tensor on the CPU."""

    def __init__(self, pool: Tensor, arrivals: ArrivalsFile, *, num_buffers: int = 1) -> None:
        """`pool` [num_pages, ...], contiguous."""
        self._pages = pool.view(pool.shape[0], -1).view(torch.uint8)
        self._arrivals = arrivals
        page_bytes = self._pages.shape[1]
        self.pages_at_once = max(1, min(len(pool), GROUP_BYTES // page_bytes))
        shape = (num_buffers, self.pages_at_once, page_bytes)
        self._buffers = torch.empty(shape, dtype=torch.uint8, pin_memory=pool.is_cuda)
        self._num_fetched = 0
        self._stream: torch.cuda.Stream | None = None
        if pool.is_cuda:
            self._stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(pool.device))

    @property
    def buffers(self) -> Pages:
        """The memory of all rows that `fetch` returns."""
        return self._buffers.numpy()

    def fetch(self, page_ids: Sequence[int]) -> Pages:
        """Copy pages from the GPU to the host. The result is valid until the same buffer has its turn again."""
        self._num_fetched += 1
        buffer = self._buffers[self._num_fetched % len(self._buffers)][: len(page_ids)]
        self._move([(self._pages[page_id], row) for page_id, row in zip(page_ids, buffer, strict=True)])
        return buffer.numpy()

    def digests(self, page_ids: Sequence[int]) -> list[bytes]:
        """Copy the pages that have arrived into the pool, and return their digests."""
        found: list[bytes] = []
        for start in range(0, len(page_ids), self.pages_at_once):
            group = page_ids[start : start + self.pages_at_once]
            buffer = self._buffers[0][: len(group)]
            for page_id, row in zip(group, buffer.numpy(), strict=True):
                self._arrivals.read(page_id, row)
                found.append(xxhash.xxh3_128_digest(row.data))
            self._move([(row, self._pages[page_id]) for page_id, row in zip(group, buffer, strict=True)])
            for page_id in group:
                self._arrivals.clear(page_id)
        return found

    def _move(self, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy each (from, to), and wait for the copies."""
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for from_, to in copies:
                to.copy_(from_, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
