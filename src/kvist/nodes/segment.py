"""The calls of Mooncake's library that a store makes, on a thread of their own.

    Segment(plan)
      .open()              joins the pool, and offers the pages of the SSD
      .leave(grace_s)      takes no new pages; those in memory can be read, and written to the SSD, for `grace_s`
      .forget_ssd()        removes the pages of the SSD from the pool, as the master's own doing would lose them

The library checks little, and reads part of its settings from the environment: this file sets them. A call may hang
while the master or a network hangs, so `NativeThread` runs the calls, and its caller has a limit for each.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kvist.errors import EngineError, Timeout, Unavailable
from kvist.mooncake.master_admin import HeldPage
from kvist.mooncake.requirements import Network, load

UNIT_BYTES = 1 << 24  # the library rounds a segment up to a multiple
HEARTBEAT_S = 1  # between two times that pages in memory are written to the SSD
_METADATA = "P2PHANDSHAKE"
_PUT_TRIES, _PUT_PAUSE_S = 5, 0.2
T = TypeVar("T")

logger = logging.getLogger(__name__)


class NativeThread:
    """Runs calls one after another on a daemon thread. `run` may be cancelled or time out; its call goes on."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="mooncake", daemon=True).start()

    async def run(self, call: Callable[[], T], *, timeout_s: float, doing: str) -> T:
        """Return the call's result. Raises its error, and `Timeout` when it takes too long."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                result = call()
            except BaseException as error:
                loop.call_soon_threadsafe(_fail, done, error)
            else:
                loop.call_soon_threadsafe(_succeed, done, result)

        self._calls.put(work)
        try:
            async with asyncio.timeout(timeout_s):
                return await done
        except TimeoutError as error:
            raise Timeout(f"Mooncake has not finished {doing} within {timeout_s:g} s") from error

    def _work(self) -> None:
        while True:
            self._calls.get()()


def _succeed(done: asyncio.Future[T], result: T) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: asyncio.Future[T], error: BaseException) -> None:
    if not done.done():
        done.set_exception(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPlan:
    """The memory and the SSD that a store lends to the pool of one master."""

    name: str  # HOST:PORT, the same after a restart
    network: Network
    master_addr: str  # HOST:PORT
    num_bytes: int
    ssd_path: str | None = None
    ssd_bytes: int = 0
    ssd_buffer_bytes: int = 0


class Segment:
    """The store's part of the pool. Every method blocks, and runs on one thread at a time."""

    def __init__(self, plan: SegmentPlan) -> None:
        self.plan = plan
        self._store: Any = None
        self._ids: list[str] = []
        self._registered: ctypes.Array[ctypes.c_char] = (ctypes.c_char * 0)()  # see `_buffer`
        self.session = ""  # of the engine; known when the segment is open

    def open(self) -> None:
        """Join the pool. Raises `Unavailable`."""
        plan = self.plan
        os.environ.update(
            MOONCAKE_OFFLOAD_STORAGE_BACKEND_DESCRIPTOR="file_per_key_storage_backend",
            MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS=str(HEARTBEAT_S),
            MOONCAKE_OFFLOAD_LOCAL_BUFFER_SIZE_BYTES=str(plan.ssd_buffer_bytes),
            MOONCAKE_OFFLOAD_TOTAL_SIZE_LIMIT_BYTES=str(plan.ssd_bytes),
        )
        store = load("mooncake.store").MooncakeDistributedStore()
        code = store.setup(
            plan.name,
            _METADATA,
            0,  # the segment follows: only one mounted by hand has an id by which it can be removed
            0,
            plan.network.protocol,
            ",".join(plan.network.devices),
            plan.master_addr,
            None,
            plan.ssd_path is not None,
            plan.ssd_path or "",
        )
        if code:
            raise Unavailable(f"Mooncake cannot join the pool of the master at {plan.master_addr} (code {code})")
        self._store = store
        mounted = store.allocate_and_mount_segment(plan.num_bytes, plan.network.protocol, "")
        if mounted["ret"]:
            raise Unavailable(
                f"Mooncake cannot lend {plan.num_bytes / 1e9:g} GB to the pool (code {mounted['ret']}): lower "
                "--segment-size"
            )
        self._ids = list(mounted["segment_ids"])
        self.session = self._find_session()

    def _find_session(self) -> str:
        """Return the name that the master uses for copies in our memory. The library has no call for this name, which
        is the engine's, so a byte is stored: a segment that has just been mounted has room for a byte."""
        key, config = f"kvist-store-{self.plan.name}", load("mooncake.store").ReplicateConfig()
        config.preferred_segment = self.plan.name
        self._store.remove(key, True)
        self._check(self._store.put_from(key, self._buffer(1), 1, config), "storing a byte")
        copies = self._store.get_replica_desc(key)
        self._store.remove(key, True)
        [copy] = [each for each in copies if each.is_memory_replica()]
        session: str = copy.get_memory_descriptor().buffer_descriptor.transport_endpoint
        return session

    def leave(self, grace_s: int) -> None:
        """Take no new pages. For `grace_s` the master lists the segment as GRACEFULLY_UNMOUNTING: its pages can be
        read, and go on to the SSD. Then the memory leaves the pool; 0 means at once."""
        self._check(self._store.unmount_and_free_segment(self._ids, grace_s), "leaving the pool")

    def forget_ssd(self) -> None:
        """Remove the pages of the SSD from the pool, in order: the next run offers them again. A run that only vanishes
        makes the master drop them after its --store-ttl-s, from the next run, too."""
        self._check(self._store.unmount_local_disk_segment(), "removing the SSD from the pool")

    def remove(self, keys: Sequence[str]) -> None:
        """Remove pages from the pool, with all their copies."""
        self._store.batch_remove(list(keys), True)

    # ---- pages that move to other stores (emptying.py)

    def move(self, pages: Sequence[HeldPage]) -> int:
        """Move pages into the memory of other stores, while this one takes none: read them, remove them with all their
        copies, and put them again. A reader in between misses. Return how many have arrived."""
        num_bytes = sum(page.num_bytes for page in pages)
        if not num_bytes:
            return 0
        return self._move_through(pages, self._buffer(num_bytes))

    def _buffer(self, num_bytes: int) -> int:
        """Return the address of registered memory, which is kept for further calls: new memory costs more than the
        copies into the memory. Raises `EngineError`."""
        if num_bytes > len(self._registered):
            if self._registered:
                self._store.unregister_buffer(ctypes.addressof(self._registered))
            self._registered = (ctypes.c_char * num_bytes)()
            if self._store.register_buffer(ctypes.addressof(self._registered), num_bytes):
                self._registered = (ctypes.c_char * 0)()
                raise EngineError(f"Mooncake cannot register {num_bytes} bytes; with RDMA, raise `ulimit -l`")
        return ctypes.addressof(self._registered)

    def _move_through(self, pages: Sequence[HeldPage], start: int) -> int:
        """Move pages through registered memory."""
        ends = list(itertools.accumulate(page.num_bytes for page in pages))
        placed = [(page, start + end - page.num_bytes) for page, end in zip(pages, ends, strict=True)]
        codes = self._store.batch_get_into(*_columns(placed))
        read = [each for each, code in zip(placed, codes, strict=True) if code == each[0].num_bytes]
        # A put of a key that exists changes nothing, and an update without room would remove it. Copies that the
        # master's job moves at this moment cannot be removed, and stay.
        codes = self._store.batch_remove([page.key for page, _ in read], True) if read else []
        left = [each for each, code in zip(read, codes, strict=True) if code == 0]
        num_removed = len(left)
        for attempt in range(_PUT_TRIES):
            if not left:
                break
            if attempt:
                time.sleep(_PUT_PAUSE_S)  # the master evicts other pages meanwhile
            left = self._put(left)
        for page, _ in left:
            logger.warning("the page %s is lost: no other store had room for it", page.key)
        return num_removed - len(left)

    def _put(self, placed: Sequence[tuple[HeldPage, int]]) -> list[tuple[HeldPage, int]]:
        """Put pages with as many copies as they had; return those that were not stored."""
        failed: list[tuple[HeldPage, int]] = []
        for num_copies in {max(1, page.num_copies) for page, _ in placed}:
            group = [each for each in placed if max(1, each[0].num_copies) == num_copies]
            config = load("mooncake.store").ReplicateConfig()
            config.replica_num = num_copies
            codes = self._store.batch_put_from(*_columns(group), config)
            failed += [each for each, code in zip(group, codes, strict=True) if code]
        return failed

    def _check(self, code: int, doing: str) -> None:
        if code:
            raise Unavailable(f"Mooncake reports the code {code} for {doing}")


def _columns(placed: Sequence[tuple[HeldPage, int]]) -> tuple[list[str], list[int], list[int]]:
    """Return keys, addresses and sizes."""
    return [page.key for page, _ in placed], [address for _, address in placed], [page.num_bytes for page, _ in placed]
