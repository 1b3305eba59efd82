"""The transport between engines of one host, for pages in any memory: a peer's pool is mapped and written.

One worker thread copies whole pages while the model runs. At most `MAX_PEER_MAPS` maps of peers are kept. A map is
dropped when its peer is found dead, which frees the peer's memory; a map that is being written is unmapped when its
group of pages was copied.

    shm.py        pools on the CPU: the file is the pool
    cuda_ipc.py   pools on GPUs: the file holds the handle that opens the memory

A pool with parts, one per rank, has a file for each part. All of them are mapped together, and none is used any more
when the process of one rank has ended.

Trust: a pool's file must be in our own runtime folder, to which only this user can write, must be locked by its running
creator (memory/device_pool.py), and must have exactly the size that its address claims. A peer can therefore make us
write into another engine's pages only by the address of that engine's pool, which any process of this user can write.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import msgspec

from kvist.errors import Unavailable
from kvist.own_files import open_own
from kvist.request import EpochId
from kvist.transfer.epoch import EpochWatch, try_lock
from kvist.transfer.jobs import OwnPages, PeerT, TransferJobs, in_groups
from kvist.wire import PoolAddress, PoolPart

MAX_PEER_MAPS = 64

MapPool = Callable[[int, PoolAddress], PeerT]
"""(descriptor of the pool's file, its address) -> its pages. Raises `Unavailable`; `wrong_size` makes the error for a
size other than that of the address. The memory stays mapped for the lifetime of the result."""

JoinParts = Callable[[PoolAddress, Sequence[PeerT]], PeerT]
"""(address, what `MapPool` returned for each of its parts) -> the pages. Raises `Unavailable`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _PeerMap(Generic[PeerT]):
    """Owns the descriptors; `pages` alone keeps the memory mapped."""

    pages: PeerT
    address: PoolAddress
    descriptors: tuple[int, ...]  # of the pool's files: one, or one per part

    def owner_is_gone(self) -> bool:
        return any(_owner_is_gone(descriptor) for descriptor in self.descriptors)


class SameHostTransport(TransferJobs[PeerT]):
    def __init__(
        self,
        *,
        address: PoolAddress,  # our own
        pages: OwnPages[PeerT],
        map_pool: MapPool[PeerT],
        runtime_dir: Path,
        watch: EpochWatch,
        wakeup: Callable[[], None],
        join_parts: JoinParts[PeerT] | None = None,  # None: a pool with parts is refused
    ) -> None:
        super().__init__(address=address, pages=pages, copies=in_groups(pages), open_peer=self._pages_of, wakeup=wakeup)
        self._runtime_dir = runtime_dir.resolve()
        self._map_pool = map_pool
        self._join_parts = join_parts
        self._watch = watch
        self._maps: OrderedDict[Path, _PeerMap[PeerT]] = OrderedDict()  # least recently written to first
        self._maps_lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="kvist-transfer", daemon=True)
        self._thread.start()

    def peer_is_dead(self, epoch: EpochId) -> bool:
        dead = self._watch.is_dead(epoch)
        if dead:
            with self._maps_lock:
                self._drop_dead_maps()
        return dead

    def close(self) -> None:
        super().close()
        self._thread.join()  # at most one group of pages, or one handoff's checksum
        with self._maps_lock:
            for path in list(self._maps):
                self._drop(path)

    def _work(self) -> None:
        while self.work_one(wait=True):
            pass

    # ------------------------------------------------------------ peer pools; on the worker thread

    def _pages_of(self, address: PoolAddress) -> PeerT:
        path = Path(address.location)
        with self._maps_lock:
            self._drop_dead_maps()
            peer = self._maps.get(path)
            if peer is None:
                peer = self._map(address)
                while len(self._maps) >= MAX_PEER_MAPS:
                    self._drop(next(iter(self._maps)))
                self._maps[path] = peer
            self._maps.move_to_end(path)
        if peer.address != address:
            raise wrong_size(address, peer.address.num_pages * peer.address.page_bytes)
        return peer.pages

    def _map(self, address: PoolAddress) -> _PeerMap[PeerT]:
        descriptors: list[int] = []
        try:
            if not address.parts:
                pages = self._map_file(address, descriptors)
            elif self._join_parts is None:
                raise Unavailable(
                    f"the peer's pool {address.location} has a part for each rank; this transport copies whole pages"
                )
            else:
                mapped = [self._map_file(_address_of(part, address), descriptors) for part in address.parts]
                pages = self._join_parts(address, mapped)
            return _PeerMap(pages=pages, address=address, descriptors=tuple(descriptors))
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def _map_file(self, address: PoolAddress, descriptors: list[int]) -> PeerT:
        """Map the file of a pool, or of a part, and append its descriptor, which the caller owns."""
        path = Path(address.location)
        if path.parent != self._runtime_dir:
            raise Unavailable(
                f"the peer's pool {path} is not in our runtime folder {self._runtime_dir}: "
                "start both workers on one host with the same --runtime-dir"
            )
        try:
            descriptors.append(open_own(path, os.O_RDWR))
        except OSError as error:
            raise Unavailable(f"the peer has ended: its pool {path} cannot be opened ({error.strerror})") from error
        if _owner_is_gone(descriptors[-1]):
            raise Unavailable(f"the peer has ended: no process holds the lock of its pool {path}")
        return self._map_pool(descriptors[-1], address)

    def _drop(self, path: Path) -> None:
        for descriptor in self._maps.pop(path).descriptors:
            os.close(descriptor)

    def _drop_dead_maps(self) -> None:
        for path in [path for path, peer in self._maps.items() if peer.owner_is_gone()]:
            self._drop(path)


def _owner_is_gone(descriptor: int) -> bool:
    """Return whether the owner has ended: it removed the file (a clean end), or the kernel released its lock (any
    end)."""
    return os.fstat(descriptor).st_nlink == 0 or try_lock(descriptor, exclusive=False)


def _address_of(part: PoolPart, address: PoolAddress) -> PoolAddress:
    return msgspec.structs.replace(address, location=part.location, page_bytes=part.num_bytes, parts=())


def wrong_size(address: PoolAddress, num_bytes: int) -> Unavailable:
    claimed = f"{address.num_pages} pages of {address.page_bytes} bytes"
    return Unavailable(f"the peer's pool {address.location} has {num_bytes} bytes, but its address claims {claimed}")
