"""Pools in any memory of one host: pages travel through a file in host memory, so a CPU worker can stand in for a GPU
worker, and GPUs that cannot open each other's memory can hand over too.

    our pool ──(GPU: pinned buffer)──► pwrite ──► the peer's file ──(GPU: pread, pinned buffer)──► the peer's pool

The file of a pool on a CPU is the pool itself. A pool on a GPU has an `ArrivalsFile` of the same size, which takes no
memory until pages arrive. A writer puts page i at place i. The receiver copies the page to the GPU when it verifies the
page, and returns the memory of that place. The pages of a handoff that failed keep their places until they are granted
again.

Files are written with pwrite, not through a map: if the host's memory is full, the handoff fails, and no process is
killed. The digest of a page is xxh3_128 on both sides, as on a CPU.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
import xxhash
from torch import Tensor

from kvist.errors import Unavailable
from kvist.memory.runtime_dir import publish_pool
from kvist.transfer.host_pages import HostPages, Pages
from kvist.transfer.same_host import SameHostTransport, wrong_size
from kvist.transfer.transport import TransportContext, TransportKind
from kvist.wire import PoolAddress

GROUP_BYTES = 16 << 20  # copied between two checks for a stop


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


class StagedHostPages:
    """The pages of a pool on a CPU, as `jobs.OwnPages`; a peer's pages are its open file."""

    pages_at_once = 1

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._own = HostPages(pages)

    def copy(self, page_ids: Sequence[int], peer: io.FileIO, peer_page_ids: Sequence[int]) -> list[bytes]:
        for page_id, peer_page_id in zip(page_ids, peer_page_ids, strict=True):
            write_page(peer, peer_page_id, self._pages[page_id])
        return self.digests(page_ids)

    def digests(self, page_ids: Sequence[int]) -> list[bytes]:
        return self._own.digests(page_ids)


class StagedDevicePages:
    """The pages of a pool on a GPU, as `jobs.OwnPages`; a peer's pages are its open file. Used by one thread at a time.
    The stream waits for no other stream, for the reasons in device_pages.py. Tests use a tensor on the CPU."""

    def __init__(self, pool: Tensor, arrivals: ArrivalsFile) -> None:
        """`pool` [num_pages, ...], contiguous."""
        self._pages = pool.view(pool.shape[0], -1).view(torch.uint8)
        self._arrivals = arrivals
        self.pages_at_once = max(1, min(len(pool), GROUP_BYTES // self._pages.shape[1]))
        self._buffer = torch.empty(
            (self.pages_at_once, self._pages.shape[1]), dtype=torch.uint8, pin_memory=pool.is_cuda
        )
        self._stream: torch.cuda.Stream | None = None
        if pool.is_cuda:
            self._stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(pool.device))

    def copy(self, page_ids: Sequence[int], peer: io.FileIO, peer_page_ids: Sequence[int]) -> list[bytes]:
        buffer = self._buffer[: len(page_ids)]
        self._move([(self._pages[page_id], row) for page_id, row in zip(page_ids, buffer, strict=True)])
        host = buffer.numpy()
        for row, peer_page_id in zip(host, peer_page_ids, strict=True):
            write_page(peer, peer_page_id, row)
        return [xxhash.xxh3_128_digest(row.data) for row in host]

    def digests(self, page_ids: Sequence[int]) -> list[bytes]:
        """Copy the pages that have arrived into the pool, and return their digests."""
        found: list[bytes] = []
        for start in range(0, len(page_ids), self.pages_at_once):
            group = page_ids[start : start + self.pages_at_once]
            buffer = self._buffer[: len(group)]
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


class HostStagedTransport(SameHostTransport[io.FileIO]):
    """Owns the file of arrivals of a pool on a GPU."""

    def __init__(self, context: TransportContext) -> None:
        pool, address = context.pool, context.address
        self._arrivals: ArrivalsFile | None = None
        pages: StagedHostPages | StagedDevicePages
        if pool.tensor.device.type == "cpu":
            pages = StagedHostPages(pool.bytes)
        else:
            self._arrivals = ArrivalsFile(context.runtime_dir, address.num_pages, address.page_bytes)
            address = msgspec.structs.replace(address, location=str(self._arrivals.path))
            pages = StagedDevicePages(pool.tensor, self._arrivals)
        super().__init__(
            address=address,
            pages=pages,
            map_pool=open_file,
            runtime_dir=context.runtime_dir,
            watch=context.watch,
            wakeup=context.wakeup,
        )

    def close(self) -> None:
        super().close()
        if self._arrivals is not None:
            self._arrivals.close()


HOST_STAGED = TransportKind(
    device_pairs=frozenset((ours, theirs) for ours in ("cpu", "cuda") for theirs in ("cpu", "cuda")),
    build=HostStagedTransport,
)


def open_file(descriptor: int, address: PoolAddress) -> io.FileIO:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != address.num_pages * address.page_bytes:
        raise wrong_size(address, status.st_size)  # a write beyond the end would make the file longer
    return io.FileIO(os.dup(descriptor), "r+")


def write_page(file: io.FileIO, page_id: int, page: Pages) -> None:
    """Write a page to its place. Raises `Unavailable` if the host has no memory left for it."""
    page_bytes, done = len(page), 0
    while done < page_bytes:
        try:
            done += os.pwrite(file.fileno(), page[done:].data, page_id * page_bytes + done)
        except OSError as error:
            raise Unavailable(
                f"a page cannot be written into the peer's file in the runtime folder: {error.strerror}. Name a folder "
                "on a larger file system with --runtime-dir, or give the container more shared memory "
                "(docker run --shm-size=8g)"
            ) from error
