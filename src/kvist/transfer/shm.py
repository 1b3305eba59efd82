"""The transport between engines of one host: the peer's pool is a file in memory that we map and write into.

One worker thread copies whole pages (the copy and the hash run outside the GIL, beside the next forward). Maps of
peers are kept, at most `MAX_PEER_MAPS`, and dropped when the peer is found dead, which gives its memory back.

Trust: a pool must lie in our own runtime folder, which only this user can write to, be locked by its living creator
(kv/device.py) and have exactly the size its address claims. So a peer can make us write into another engine's pages
only by naming that engine's pool, which any process of this user could do anyway.
"""

from __future__ import annotations

import mmap
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvist.errors import Unavailable
from kvist.request import EpochId, HandoffId
from kvist.scheduler.plan import VerifyPages, WritePages
from kvist.transfer import TransferReport
from kvist.transfer.checksum import Pages
from kvist.transfer.epoch import EpochWatch, try_lock
from kvist.transfer.jobs import LocalPool, TransferJobs
from kvist.wire import PoolAddress

SHM = "shm"
MAX_PEER_MAPS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _PeerMap:
    """Owns the descriptor; the array alone keeps the memory mapped, for as long as somebody copies into it."""

    pages: Pages
    descriptor: int

    def owner_is_gone(self) -> bool:
        """It removed the file (a clean end), or the kernel took its lock away (any end)."""
        return os.fstat(self.descriptor).st_nlink == 0 or try_lock(self.descriptor, exclusive=False)


class ShmTransport:
    def __init__(self, *, local: LocalPool, runtime_dir: Path, wakeup: Callable[[], None]) -> None:
        assert local.address.transport == SHM
        self._runtime_dir = runtime_dir.resolve()
        self._watch = EpochWatch(self._runtime_dir)
        self._maps: OrderedDict[Path, _PeerMap] = OrderedDict()  # least recently written to first
        self._maps_lock = threading.Lock()
        self._jobs = TransferJobs(local, self._open_peer, wakeup)
        self._thread = threading.Thread(target=self._work, name="kvist-transfer", daemon=True)
        self._thread.start()

    def write(self, job: WritePages) -> None:
        self._jobs.write(job)

    def verify(self, job: VerifyPages) -> None:
        self._jobs.verify(job)

    def stop(self, handoff_id: HandoffId) -> None:
        self._jobs.stop(handoff_id)

    def poll(self) -> list[TransferReport]:
        return self._jobs.poll()

    def peer_is_dead(self, epoch: EpochId) -> bool:
        dead = self._watch.is_dead(epoch)
        if dead:
            with self._maps_lock:
                self._drop_maps_of_the_dead()
        return dead

    def close(self) -> None:
        self._jobs.close()
        self._thread.join()  # at most one page copy, or one handoff's checksum
        self._watch.close()
        with self._maps_lock:
            for path in list(self._maps):
                self._drop(path)

    def _work(self) -> None:
        while self._jobs.work_one(wait=True):
            pass

    # ------------------------------------------------------------ peer pools; on the worker thread

    def _open_peer(self, address: PoolAddress) -> Pages:
        path = Path(address.location)
        if path.parent != self._runtime_dir:
            raise Unavailable(
                f"the peer's pool {path} is not in our runtime folder {self._runtime_dir}: "
                "start both workers on one host with the same --runtime-dir"
            )
        with self._maps_lock:
            peer = self._maps.get(path)
            if peer is None:
                peer = _map_pool(path, address)
                while len(self._maps) >= MAX_PEER_MAPS:
                    self._drop(next(iter(self._maps)))
                self._maps[path] = peer
            self._maps.move_to_end(path)
            if peer.owner_is_gone():
                self._drop(path)
                raise Unavailable(f"the peer is gone: nobody holds the lock of its pool {path}")
        if peer.pages.shape != (address.num_pages, address.page_bytes):
            raise _wrong_size(path, peer.pages.size, address)
        return peer.pages

    def _drop(self, path: Path) -> None:
        os.close(self._maps.pop(path).descriptor)

    def _drop_maps_of_the_dead(self) -> None:
        for path in [path for path, peer in self._maps.items() if peer.owner_is_gone()]:
            self._drop(path)


def _map_pool(path: Path, address: PoolAddress) -> _PeerMap:
    num_bytes = address.num_pages * address.page_bytes
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError as error:
        raise Unavailable(f"the peer is gone: its pool {path} cannot be opened ({error.strerror})") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != num_bytes:
            raise _wrong_size(path, status.st_size, address)  # writing past a file's end kills the process
        mapped = mmap.mmap(descriptor, num_bytes)
    except (OSError, ValueError) as error:
        os.close(descriptor)
        raise Unavailable(f"the peer's pool {path} cannot be mapped: {error}") from error
    except Unavailable:
        os.close(descriptor)
        raise
    pages = np.frombuffer(mapped, dtype=np.uint8).reshape(address.num_pages, address.page_bytes)
    return _PeerMap(pages=pages, descriptor=descriptor)


def _wrong_size(path: Path, num_bytes: int, address: PoolAddress) -> Unavailable:
    claimed = f"{address.num_pages} pages of {address.page_bytes} bytes"
    return Unavailable(f"the peer's pool {path} has {num_bytes} bytes, which is not the {claimed} it claims")
