"""Pools in any memory of one host: pages travel through a file in host memory, so a CPU worker can stand in for a GPU
worker, and GPUs that cannot open each other's memory can hand over too.

    our pool ──(GPU: pinned buffer)──► pwrite ──► the peer's file ──(GPU: pread, pinned buffer)──► the peer's pool

The file of a pool on a CPU is the pool itself. A pool on a GPU has a file of arrivals (staging.py).

Files are written with pwrite, not through a map: if the host's memory is full, the handoff fails, and no process is
killed. The digest of a page is xxh3_128 on both sides, as on a CPU.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Sequence

import msgspec

from kvist.errors import Unavailable
from kvist.transfer.host_pages import HostPages, Pages, digests_of
from kvist.transfer.same_host import SameHostTransport, wrong_size
from kvist.transfer.staging import ArrivalsFile, StagedPool
from kvist.transfer.transport import TransportContext, TransportKind
from kvist.wire import PoolAddress


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


class StagedDevicePages(StagedPool):
    """The pages of a pool on a GPU, as `jobs.OwnPages`; a peer's pages are its open file."""

    def copy(self, page_ids: Sequence[int], peer: io.FileIO, peer_page_ids: Sequence[int]) -> list[bytes]:
        rows = self.fetch(page_ids)
        for row, peer_page_id in zip(rows, peer_page_ids, strict=True):
            write_page(peer, peer_page_id, row)
        return digests_of(rows)


class HostStagedTransport(SameHostTransport[io.FileIO]):
    """Owns the file of arrivals of a pool on a GPU."""

    def __init__(self, context: TransportContext) -> None:
        pool, address = context.pool, context.address
        self.arrivals: ArrivalsFile | None = None
        pages: StagedHostPages | StagedDevicePages
        if pool.tensor.device.type == "cpu":
            pages = StagedHostPages(pool.bytes)
        else:
            self.arrivals = ArrivalsFile(context.runtime_dir, address.num_pages, address.page_bytes)
            address = msgspec.structs.replace(address, location=str(self.arrivals.path))
            pages = StagedDevicePages(pool.tensor, self.arrivals)
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
        if self.arrivals is not None:
            self.arrivals.close()


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
