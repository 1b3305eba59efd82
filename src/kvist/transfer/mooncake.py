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
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from kvist.errors import EngineError, Unavailable
from kvist.memory.device_pool import DevicePool
from kvist.memory.page_window import HEAD_BYTES, PageWindow
from kvist.plan.transfers import WritePages
from kvist.request import EpochId, HandoffId
from kvist.transfer.host_pages import HostPages
from kvist.transfer.jobs import MAX_HANDOFFS, TransferJobs
from kvist.transfer.mooncake_engine import MooncakeEngine, MooncakeOptions, mooncake_engine, obstacle
from kvist.transfer.transport import TransportContext, TransportKind
from kvist.wire import Closed, Grant, PoolAddress

NAME = "mooncake"
BATCH_BYTES = 64 << 20  # copied between two checks for a stop
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


class SentPages:
    """Our pages, as `jobs.OwnPages`; used by the transport's thread."""

    def __init__(
        self, pool: DevicePool, engine: MooncakeEngine, on_failed: Callable[[RemotePages, float], None]
    ) -> None:
        """`on_failed` gets the seconds that a failed write took."""
        self._host_pages = HostPages(pool.bytes)
        self._engine = engine
        self._on_failed = on_failed
        self._summing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvist-mooncake-sum")
        self._page_bytes = pool.layout.page_bytes
        self._first_page = pool.tensor.data_ptr()
        self.pages_at_once = max(1, BATCH_BYTES // self._page_bytes)

    def copy(self, page_ids: Sequence[int], peer: RemotePages, peer_page_ids: Sequence[int]) -> list[bytes]:
        summed = self._summing.submit(self.digests, page_ids)  # meanwhile, without Python's lock
        start_s = time.monotonic()
        if not self._engine.write(peer.session, *self._pieces(page_ids, peer, peer_page_ids)):
            self._on_failed(peer, time.monotonic() - start_s)
            raise Unavailable(f"the peer has ended, or the network to it at {peer.session} is broken: a write failed")
        return summed.result()

    def close(self) -> None:
        self._summing.shutdown()

    def digests(self, page_ids: Sequence[int]) -> list[bytes]:
        return self._host_pages.digests(page_ids)

    def _pieces(
        self, page_ids: Sequence[int], peer: RemotePages, peer_page_ids: Sequence[int]
    ) -> tuple[list[int], list[int], list[int]]:
        """Return where each piece is, where it goes, and its size. Pages that are neighbours at both ends are one."""
        ours: list[int] = []
        theirs: list[int] = []
        sizes: list[int] = []
        for page_id, peer_page_id in zip(page_ids, peer_page_ids, strict=True):
            here = self._first_page + page_id * self._page_bytes
            there = peer.first_page + peer_page_id * self._page_bytes
            if ours and here == ours[-1] + sizes[-1] and there == theirs[-1] + sizes[-1]:
                sizes[-1] += self._page_bytes
                continue
            ours.append(here)
            theirs.append(there)
            sizes.append(self._page_bytes)
        return ours, theirs, sizes


class Windows:
    """The windows of our pool: one per peer. Mutable; used by the loop's thread."""

    def __init__(self, pool: DevicePool, engine: MooncakeEngine, address: PoolAddress) -> None:
        self._path = Path(pool.address.location)
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
    def __init__(self, context: TransportContext, engine: MooncakeEngine) -> None:
        address = msgspec.structs.replace(context.address, location=engine.session)
        self._sent_pages = SentPages(context.pool, engine, self._note_failure)
        super().__init__(address=address, pages=self._sent_pages, open_peer=self._pages_of, wakeup=context.wakeup)
        self._engine = engine
        self._watch = context.watch
        self._windows = Windows(context.pool, engine, address)
        self._head = np.zeros(HEAD_BYTES, np.uint8)  # of a peer's window, as read
        self._registered = (context.pool.tensor.data_ptr(), self._head.ctypes.data)
        engine.register(self._registered[0], context.pool.bytes.nbytes)
        engine.register(self._registered[1], HEAD_BYTES)
        self._known: OrderedDict[str, tuple[PoolAddress, RemotePages]] = OrderedDict()  # by location
        self._silent_s: dict[str, float] = {}  # by session: when a write to it waited in vain
        self._writing: HandoffId | None = None
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
        self._sent_pages.close()
        self._windows.close_all()
        for address in self._registered:
            self._engine.unregister(address)

    # ------------------------------------------------------------ on the worker thread

    def _work(self) -> None:
        while self.work_one(wait=True):
            pass

    def _carry_out_write(self, job: WritePages) -> None:
        self._writing = job.handoff_id
        super()._carry_out_write(job)

    def _note_failure(self, peer: RemotePages, waited_s: float) -> None:
        """Remember that bytes of this handoff may still arrive, before any report on it is made."""
        assert self._writing is not None
        self._unsettled[self._writing] = None
        while len(self._unsettled) > MAX_HANDOFFS:
            self._unsettled.popitem(last=False)
        self._known.pop(peer.location, None)
        if waited_s > _PAUSE_S / 2:
            self._silent_s[peer.session] = time.monotonic()

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
        if not self._engine.read(session, self._registered[1], window, HEAD_BYTES):
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


def _false_claim(address: PoolAddress) -> Unavailable:
    claimed = f"{address.num_pages} pages of {address.page_bytes} bytes"
    return Unavailable(f"the peer's pool at {address.location} is not what its address claims ({claimed})")


def mooncake_kind(options: MooncakeOptions) -> TransportKind:
    return TransportKind(
        device_pairs=frozenset({("cpu", "cpu")}),
        build=lambda context: MooncakeTransport(
            context, mooncake_engine(options, options.host or context.advertised_host)
        ),
        same_host=False,
        obstacle=lambda _pool: obstacle(options),
        only_by_name="its ports accept writes from every host that reaches them",
    )
