"""The transport between hosts, over Mooncake's TransferEngine.

A peer writes through a window of its own on our pool (memory/page_window.py), whose address its Grants carry. The
window is closed when the peer is found dead, or when a peer says that one of its writes failed (`Closed.unsettled`):
the bytes of such a write may still be under way, in buffers of either kernel or on the network, and no other proof that
they have gone exists. Only then may the scheduler reuse the pages. No clock takes part in this, and no promise of the
writer: a writer that was suspended for an hour and then continues writes into a closed window.

    location: SESSION                        in an EngineSpec: a peer cannot write yet
              SESSION/WINDOW/NONCE           in a Grant: one peer can

Before the first write into a window its head is read and compared with the address, so that no byte is written for a
false claim or into the memory of another process.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from kvist.errors import EngineError, Unavailable
from kvist.memory.device_pool import DevicePool
from kvist.memory.page_window import HEAD_BYTES, PageWindow
from kvist.mooncake.engine import MooncakeEngine, Transfer, open_engine
from kvist.mooncake.requirements import obstacle
from kvist.plan.transfers import WritePages
from kvist.request import EpochId, HandoffId
from kvist.transfer.host_pages import HostPages, Pages, digests_of
from kvist.transfer.jobs import MAX_HANDOFFS, TransferJobs
from kvist.transfer.mooncake_options import HANDOFFS, MooncakeOptions
from kvist.transfer.staging import ArrivalsFile, StagedPool
from kvist.transfer.transport import TransportContext, TransportKind
from kvist.wire import Closed, Grant, PoolAddress

NAME = "mooncake"
BATCH_BYTES = 32 << 20  # copied between two checks for a stop
NUM_UNDER_WAY = 2  # batches
MAX_WINDOWS = 256  # peers; the one that was granted pages longest ago loses its window
_PAUSE_S = 1.0  # after a failed write to a peer its other writes fail at once: each would wait for the silent peer
_CARD_BYTES = 32
_LOCATION = re.compile(r"(?P<session>[0-9A-Za-z._:\[\]-]{1,255}:[0-9]{1,5})/(?P<window>[0-9a-f]{1,16})/[0-9a-f]{32}")

logger = logging.getLogger(__name__)


def _card(location: str, num_pages: int, page_bytes: int, layout: str) -> bytes:
    """Return the head of a window, by which a writer recognises it."""
    claim = msgspec.msgpack.encode((location, num_pages, page_bytes, layout))
    return hashlib.blake2b(claim, digest_size=_CARD_BYTES).digest()


@dataclass(frozen=True, slots=True)
class RemotePages:
    """A peer's pages, behind the head of its window."""

    location: str
    session: str
    first_page: int  # address


class OwnRows(Protocol):
    """Our pages, as rows of registered memory; used by the transport's thread."""

    pages_at_once: int  # of one batch

    def rows(self, page_ids: Sequence[int]) -> Sequence[Pages]:
        """Return the pages, each [page_bytes]. They stay unchanged until `NUM_UNDER_WAY` further calls."""

    def digests(self, page_ids: Sequence[int]) -> list[bytes]:
        """Bring the pages that have arrived to where they were granted, and return their digests."""

    def memory(self) -> Pages:
        """Return the memory that contains all rows."""

    def close(self) -> None: ...


class RowsInMemory(HostPages):
    """A pool on a CPU."""

    def __init__(self, pool: DevicePool) -> None:
        super().__init__(pool.bytes)
        self.pages_at_once = max(1, BATCH_BYTES // pool.layout.page_bytes)

    def rows(self, page_ids: Sequence[int]) -> Sequence[Pages]:
        return [self._pages[page_id] for page_id in page_ids]

    def memory(self) -> Pages:
        return self._pages

    def close(self) -> None: ...


class StagedRows(StagedPool):
    """A pool on a GPU. Owns its file of arrivals."""

    def __init__(self, pool: DevicePool, directory: Path) -> None:
        self.arrivals = ArrivalsFile(directory, pool.num_pages, pool.layout.page_bytes)
        super().__init__(pool.tensor, self.arrivals, num_buffers=NUM_UNDER_WAY)

    def rows(self, page_ids: Sequence[int]) -> Sequence[Pages]:
        return list(self.fetch(page_ids))

    def memory(self) -> Pages:
        return self.buffers

    def close(self) -> None:
        self.arrivals.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Pages that are being written."""

    transfer: Transfer
    digests: list[bytes]


class Windows:
    """The windows of our pool: one per peer. Mutable; used by the loop's thread."""

    def __init__(self, path: Path, engine: MooncakeEngine, address: PoolAddress) -> None:
        """`path`: the file that peers write: the pool, or its file of arrivals."""
        self._path = path
        self._engine = engine
        self._address = address
        self._by_peer: OrderedDict[EpochId, tuple[PageWindow, PoolAddress]] = OrderedDict()
        self._granted: OrderedDict[HandoffId, tuple[PageWindow, PoolAddress]] = OrderedDict()

    def of_peer(self, epoch: EpochId) -> PoolAddress:
        return self._window(epoch)[1]

    def of_handoff(self, handoff_id: HandoffId, epoch: EpochId) -> PoolAddress:
        """Return the address for a Grant. A Grant that is sent again has the address of the first one."""
        if handoff_id not in self._granted:
            while len(self._granted) >= MAX_HANDOFFS:
                self._granted.popitem(last=False)
            self._granted[handoff_id] = self._window(epoch)
        return self._granted[handoff_id][1]

    def close_of(self, closed: Closed) -> None:
        """Close the window through which an unsettled handoff was written."""
        granted = self._granted.get(closed.handoff_id) or self._by_peer.get(closed.source_epoch)
        current = self._by_peer.get(closed.source_epoch)
        if current is not None and (granted is None or current[0] is granted[0]):
            del self._by_peer[closed.source_epoch]
        if granted is not None:
            self._close(granted[0])

    def close(self, epoch: EpochId) -> None:
        """Close the window of a peer that is dead."""
        held = self._by_peer.pop(epoch, None)
        if held is not None:
            self._close(held[0])

    def close_all(self) -> None:
        for epoch in list(self._by_peer):
            self.close(epoch)

    def _window(self, epoch: EpochId) -> tuple[PageWindow, PoolAddress]:
        if epoch not in self._by_peer:
            while len(self._by_peer) >= MAX_WINDOWS:
                self.close(next(iter(self._by_peer)))
            self._by_peer[epoch] = self._open()
        self._by_peer.move_to_end(epoch)
        return self._by_peer[epoch]

    def _open(self) -> tuple[PageWindow, PoolAddress]:
        address, nonce = self._address, secrets.token_hex(16)
        window = PageWindow(self._path, address.num_pages * address.page_bytes)
        location = f"{self._engine.session}/{window.address:x}/{nonce}"
        window.set_head(_card(location, address.num_pages, address.page_bytes, address.layout))
        self._engine.register(window.address, window.num_bytes)
        return window, msgspec.structs.replace(address, location=location)

    def _close(self, window: PageWindow) -> None:
        if window.is_open:
            self._engine.unregister(window.address)  # with RDMA this ends the writes of the network card
            window.close()


class MooncakeTransport(TransferJobs[RemotePages]):
    def __init__(self, context: TransportContext, engine: MooncakeEngine, *, staged: bool | None = None) -> None:
        """Owns the share of the engine. `staged`: pages travel through host memory; by default those of a GPU do."""
        pool, address = context.pool, msgspec.structs.replace(context.address, location=engine.session)
        self.arrivals: ArrivalsFile | None = None
        self._own: OwnRows
        if pool.tensor.is_cuda if staged is None else staged:
            staged_rows = StagedRows(pool, context.runtime_dir)
            self._own, self.arrivals = staged_rows, staged_rows.arrivals
        else:
            self._own = RowsInMemory(pool)
        super().__init__(
            address=address,
            pages=self._own,
            copies=self._in_batches,
            open_peer=self._pages_of,
            wakeup=context.wakeup,
            sends_digests=True,
        )
        self.batch_pages = self._own.pages_at_once
        self._engine = engine
        self._watch = context.watch
        path = Path(pool.address.location) if self.arrivals is None else self.arrivals.path
        self._windows = Windows(path, engine, address)
        self._head = np.zeros(HEAD_BYTES, np.uint8)  # of a peer's window, as read
        memory = self._own.memory()
        engine.register(memory.ctypes.data, memory.nbytes)
        engine.register(self._head.ctypes.data, HEAD_BYTES)
        self._known: OrderedDict[str, tuple[PoolAddress, RemotePages]] = OrderedDict()  # by location
        self._silent_s: dict[str, float] = {}  # by session: when a write to it waited in vain
        self._unsettled: OrderedDict[HandoffId, None] = OrderedDict()  # the newest handoffs with a failed write
        self._thread = threading.Thread(target=self._work, name="kvist-mooncake", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ called by the engine loop

    def address_for(self, epoch: EpochId) -> PoolAddress:
        return self._windows.of_peer(epoch)

    def granted(self, grant: Grant) -> Grant:
        try:
            ours = [self._windows.of_handoff(grant.handoff_id, grant.source_epoch)]
        except EngineError as error:
            logger.error("a peer gets no window on our pages: %s", error)
            ours = []
        others = (each for each in grant.target.transports if each.transport != NAME)
        transports = (*others, *ours)  # their order does not matter: the source's is decisive
        return msgspec.structs.replace(grant, target=msgspec.structs.replace(grant.target, transports=transports))

    def is_unsettled(self, handoff_id: HandoffId) -> bool:
        return handoff_id in self._unsettled

    def settle(self, closed: Closed) -> None:
        self._windows.close_of(closed)

    def revoke(self, epoch: EpochId) -> None:
        self._windows.close(epoch)

    def peer_is_dead(self, epoch: EpochId) -> bool:
        return self._watch.is_dead(epoch)

    def close(self) -> None:
        super().close()
        self._thread.join()  # at most one batch, which fails after some seconds of silence
        self._windows.close_all()
        self._engine.close()
        self._own.close()

    # ------------------------------------------------------------ on the worker thread

    def _work(self) -> None:
        while self.work_one(wait=True):
            pass

    def _in_batches(self, job: WritePages, peer: RemotePages) -> Generator[list[bytes], None, None]:
        """While a batch is under way, the next one is begun and its digests are computed."""
        begun: deque[_Batch] = deque()
        try:
            for start in range(0, len(job.page_ids), self.batch_pages):
                group = slice(start, start + self.batch_pages)
                begun.append(self._begin(job.page_ids[group], peer, job.peer_page_ids[group]))
                if len(begun) == NUM_UNDER_WAY:
                    yield self._finish(begun.popleft(), job.handoff_id, peer)
            while begun:
                yield self._finish(begun.popleft(), job.handoff_id, peer)
        except GeneratorExit:  # stopped
            while begun:
                self._finish(begun.popleft(), job.handoff_id, peer)
            raise
        finally:
            for batch in begun:  # after a failure
                batch.transfer.abandon()

    def _begin(self, page_ids: Sequence[int], peer: RemotePages, peer_page_ids: Sequence[int]) -> _Batch:
        rows = self._own.rows(page_ids)
        transfer = self._engine.begin_write(peer.session, *_pieces(rows, peer, peer_page_ids))
        return _Batch(transfer=transfer, digests=digests_of(rows))

    def _finish(self, batch: _Batch, handoff_id: HandoffId, peer: RemotePages) -> list[bytes]:
        start_s = time.monotonic()
        if batch.transfer.wait():
            return batch.digests
        # Bytes of this handoff may still arrive: remember this before any report on it is made.
        self._unsettled[handoff_id] = None
        while len(self._unsettled) > MAX_HANDOFFS:
            self._unsettled.popitem(last=False)
        self._known.pop(peer.location, None)
        if time.monotonic() - start_s > _PAUSE_S / 2:
            self._silent_s[peer.session] = time.monotonic()
        raise Unavailable(f"the peer has ended, or the network to it at {peer.session} is broken: a write failed")

    def _pages_of(self, address: PoolAddress) -> RemotePages:
        known = self._known.get(address.location)
        if known is None:
            pages = self._compared(address)
            while len(self._known) >= MAX_WINDOWS:
                self._known.popitem(last=False)
            known = self._known[address.location] = (address, pages)
        if known[0] != address:
            raise _false_claim(address)
        return known[1]

    def _compared(self, address: PoolAddress) -> RemotePages:
        """Read the head of a window, and compare it with the address. Raises `Unavailable`."""
        parts = _LOCATION.fullmatch(address.location)
        if parts is None:
            raise Unavailable(f"the peer's pool at {address.location!r} has no window for our writes")
        session, window = parts["session"], int(parts["window"], 16)
        self._refuse_silent(session)
        start_s = time.monotonic()
        if not self._engine.read(session, self._head.ctypes.data, window, HEAD_BYTES):
            if time.monotonic() - start_s > _PAUSE_S / 2:
                self._silent_s[session] = time.monotonic()
            raise Unavailable(f"the peer has ended, or cannot be reached at {session}: check the network and firewalls")
        expected = _card(address.location, address.num_pages, address.page_bytes, address.layout)
        if self._head[:_CARD_BYTES].tobytes() != expected:
            raise _false_claim(address)
        return RemotePages(location=address.location, session=session, first_page=window + HEAD_BYTES)

    def _refuse_silent(self, session: str) -> None:
        now_s = time.monotonic()
        self._silent_s = {each: at_s for each, at_s in self._silent_s.items() if now_s - at_s < _PAUSE_S}
        if session in self._silent_s:
            raise Unavailable(f"the peer has ended, or cannot be reached at {session}: it did not answer a moment ago")


def _pieces(
    rows: Sequence[Pages], peer: RemotePages, peer_page_ids: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Return where each piece is, where it goes, and its size. Pages that are neighbours at both ends are one."""
    ours: list[int] = []
    theirs: list[int] = []
    sizes: list[int] = []
    for row, peer_page_id in zip(rows, peer_page_ids, strict=True):
        here, there = row.ctypes.data, peer.first_page + peer_page_id * row.nbytes
        if ours and here == ours[-1] + sizes[-1] and there == theirs[-1] + sizes[-1]:
            sizes[-1] += row.nbytes
            continue
        ours.append(here)
        theirs.append(there)
        sizes.append(row.nbytes)
    return ours, theirs, sizes


def _false_claim(address: PoolAddress) -> Unavailable:
    claimed = f"{address.num_pages} pages of {address.page_bytes} bytes"
    return Unavailable(f"the peer's pool at {address.location} is not what its address claims ({claimed})")


def mooncake_kind(options: MooncakeOptions) -> TransportKind:
    def build(context: TransportContext) -> MooncakeTransport:
        engine = open_engine(options.network(context.advertised_host), HANDOFFS)
        try:
            return MooncakeTransport(context, engine)
        except BaseException:
            engine.close()
            raise

    def obstacle_for(pool: DevicePool) -> str:
        if pool.tensor.is_cuda and options.protocol == "rdma":
            return "RDMA would pin host memory of the size of the GPU's pool: use --transfer-protocol tcp"
        return obstacle(options.network("localhost"), HANDOFFS)

    return TransportKind(
        device_pairs=frozenset((ours, theirs) for ours in ("cpu", "cuda") for theirs in ("cpu", "cuda")),
        build=build,
        same_host=False,
        obstacle=obstacle_for,
        only_by_name="its ports accept writes from every host that reaches them",
    )
