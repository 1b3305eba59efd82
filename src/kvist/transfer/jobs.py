"""The common part of every transport: a bounded queue of jobs, one running checksum per handoff, reports in order.

Handoffs take turns (turns.py): a turn is one job, or `TURN_BYTES` of a larger one.

    engine loop: write / verify / stop ──► jobs ──► worker: work_one() ──► reports ──► engine loop: poll

A transport owns the worker (a thread, or in tests the caller of `poll`), and provides our pages (`OwnPages`) and a
function that opens the pages at a peer's address.

    OPEN ──stop──► STOPPED         STOPPED and FAILED handoffs write no more pages
      └──error──► FAILED

A handoff is forgotten after `MAX_HANDOFFS` newer handoffs, far more than an engine can have open. If a handoff were
forgotten too early, its checksum would start again, and the receiver would refuse the pages.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from kvist.errors import KvistError, Unavailable
from kvist.plan.transfers import (
    PagesVerified,
    StopWrites,
    TransferReport,
    VerifyPages,
    WritePages,
    WritesCompleted,
    WritesFailed,
)
from kvist.request import HandoffId
from kvist.transfer.checksum import RunningChecksum, fold, num_equal, shortened
from kvist.transfer.turns import Turns
from kvist.wire import PoolAddress

MAX_QUEUED_WRITES = 4096
MAX_HANDOFFS = 8192
TURN_BYTES = 256 << 20  # more than a usual chunk of a prompt

logger = logging.getLogger(__name__)


PeerT = TypeVar("PeerT")
_PeerT = TypeVar("_PeerT", contravariant=True)


class SummedPages(Protocol):
    """This engine's pages. Called by the worker only."""

    def digests(self, page_ids: Sequence[int]) -> list[bytes]: ...


class OwnPages(SummedPages, Protocol[_PeerT]):
    """This engine's pages, and how to copy a group of them to a peer's pages. Called by the worker only."""

    pages_at_once: int  # copied between two checks for a stop

    def copy(self, page_ids: Sequence[int], peer: _PeerT, peer_page_ids: Sequence[int]) -> list[bytes]:
        """Copy pages and return their digests. Every byte has been written when the call returns."""


Copies = Callable[[WritePages, PeerT], Generator[list[bytes], None, None]]
"""(job, peer's pages) -> the digests of each group of pages, when the group has been written. The next group may be
under way by then; none is when the generator has been closed."""


def in_groups(pages: OwnPages[PeerT]) -> Copies[PeerT]:
    """Copy one group after the other."""

    def copies(job: WritePages, peer: PeerT) -> Generator[list[bytes], None, None]:
        for start in range(0, len(job.page_ids), pages.pages_at_once):
            group = slice(start, start + pages.pages_at_once)
            yield pages.copy(job.page_ids[group], peer, job.peer_page_ids[group])

    return copies


class _State(enum.Enum):
    OPEN = "open"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(slots=True)
class _Handoff:
    """Mutable. The loop (stop) and the worker (failure) change `state` under the lock; only the worker changes the
    rest."""

    state: _State = _State.OPEN
    num_pages: int = 0
    checksum: RunningChecksum = field(default_factory=RunningChecksum)
    page_digests: bytearray = field(default_factory=bytearray)  # shortened; empty in local memory


@dataclass(slots=True, eq=False)
class _Job:
    """A job in the queue. Mutable; the worker's."""

    order: WritePages | VerifyPages | StopWrites | WritesFailed
    num_done: int = 0  # pages, in earlier turns
    digests: list[bytes] = field(default_factory=list)  # of the pages verified so far


class TransferJobs(Generic[PeerT]):
    """`open_peer` runs on the worker: it returns the peer's pages, writable and as large as the address says, or raises
    a `KvistError`."""

    def __init__(
        self,
        *,
        address: PoolAddress,  # our own
        pages: SummedPages,
        copies: Copies[PeerT],
        open_peer: Callable[[PoolAddress], PeerT],
        wakeup: Callable[[], None],
        sends_digests: bool = False,
    ) -> None:
        """`sends_digests`: the pages leave local memory, and the receiver needs to find a page that has changed."""
        self._sends_digests = sends_digests
        self._address = address
        self._pages = pages
        self._copies = copies
        self._open_peer = open_peer
        self._wakeup = wakeup
        self._lock = threading.Lock()
        self._work_ready = threading.Condition(self._lock)
        self._jobs: Turns[_Job] = Turns()
        self._pages_a_turn = max(1, TURN_BYTES // address.page_bytes)
        self._reports: deque[TransferReport] = deque()
        self._handoffs: OrderedDict[HandoffId, _Handoff] = OrderedDict()
        self._num_queued_writes = 0  # not finished
        self._closed = False

    # ------------------------------------------------------------ called by the engine loop

    @property
    def address(self) -> PoolAddress:
        return self._address

    def write(self, job: WritePages) -> None:
        assert len(job.page_ids) == len(job.peer_page_ids), "one destination per page"
        self._assert_local(job.page_ids)
        with self._lock:
            handoff = self._handoff(job.handoff_id)
            if handoff.state is not _State.OPEN:
                return  # the report of its failure or its stop was made or is queued
            if self._num_queued_writes < MAX_QUEUED_WRITES:
                self._num_queued_writes += 1
                self._add(job)
                return
            handoff.state = _State.FAILED
            message = f"the transfer queue is full ({MAX_QUEUED_WRITES} writes): copies to the peer are too slow"
            # Report through the queue: the worker may still be copying a page of this handoff.
            self._add(WritesFailed(handoff_id=job.handoff_id, message=message))

    def verify(self, job: VerifyPages) -> None:
        self._assert_local(job.page_ids)
        with self._lock:
            self._add(job)  # bounded by the pages that the scheduler can grant

    def stop(self, handoff_id: HandoffId) -> None:
        with self._lock:
            self._handoff(handoff_id).state = _State.STOPPED
            # An earlier completion that was not polled yet must not be mistaken for the report of this stop.
            self._reports = deque(
                report
                for report in self._reports
                if not (isinstance(report, WritesCompleted) and report.handoff_id == handoff_id)
            )
            writes = self._jobs.remove(handoff_id, lambda job: isinstance(job.order, WritePages))
            self._num_queued_writes -= len(writes)
            self._add(StopWrites(handoff_id=handoff_id))

    def poll(self) -> list[TransferReport]:
        with self._lock:
            reports = list(self._reports)
            self._reports.clear()
        return reports

    def close(self) -> None:
        """Make `work_one` return False; a running copy ends after its current group of pages."""
        with self._lock:
            self._closed = True
            self._jobs.clear()
            self._work_ready.notify_all()

    # ------------------------------------------------------------ called by the worker

    def work_one(self, *, wait: bool) -> bool:
        """Carry out one turn of a job. Return False when no job is queued (or, with `wait`, when the transport is
        closed)."""
        with self._lock:
            while wait and not self._jobs and not self._closed:
                self._work_ready.wait()
            if not self._jobs or self._closed:
                return False
            handoff_id, job = self._jobs.next()
        is_done = self._carry_out(job)
        with self._lock:
            if self._jobs.end_turn(handoff_id, job, is_done=is_done) and isinstance(job.order, WritePages):
                self._num_queued_writes -= 1
        return True

    def _carry_out(self, job: _Job) -> bool:
        """Carry out the next turn of a job; return whether it was the last one."""
        match job.order:
            case WritePages():
                return self._write(job, job.order)
            case VerifyPages():
                return self._verify(job, job.order)
            case WritesFailed():
                self._report(job.order)
            case StopWrites(handoff_id=handoff_id):
                with self._lock:
                    handoff = self._handoff(handoff_id)
                self._report(self._completed(handoff_id, handoff))
        return True

    def _write(self, job: _Job, order: WritePages) -> bool:
        with self._lock:
            handoff = self._handoff(order.handoff_id)
        if handoff.state is not _State.OPEN:
            return True
        turn = slice(job.num_done, job.num_done + self._pages_a_turn)
        part = replace(order, page_ids=order.page_ids[turn], peer_page_ids=order.peer_page_ids[turn])
        try:
            peer = self._open_checked(part.pool, order.peer_page_ids if turn.start == 0 else part.peer_page_ids)
            if handoff.state is not _State.OPEN or self._closed:
                return True
            with contextlib.closing(self._copies(part, peer)) as copies:
                for digests in copies:
                    handoff.checksum.add(digests)
                    if self._sends_digests:
                        handoff.page_digests += shortened(digests)
                    handoff.num_pages += len(digests)
                    if handoff.state is not _State.OPEN or self._closed:
                        return True  # the queued StopWrites reports the pages written
        except Exception as error:  # the thread must survive a failed handoff
            if not isinstance(error, KvistError):
                logger.exception("copying the pages of handoff %s failed", order.handoff_id)
            self._fail(order.handoff_id, handoff, str(error) or type(error).__name__)
            return True
        job.num_done += len(part.page_ids)
        if job.num_done < len(order.page_ids):
            return False
        with self._lock:
            if handoff.state is _State.OPEN:
                self._reports.append(self._completed(order.handoff_id, handoff))
        self._wakeup()
        return True

    def _verify(self, job: _Job, order: VerifyPages) -> bool:
        part = order.page_ids[job.num_done : job.num_done + self._pages_a_turn]
        try:
            job.digests += self._pages.digests(part)
        except Exception:
            logger.exception("computing the checksum of handoff %s failed", order.handoff_id)
            # no checksum: equals no writer's
            self._report(PagesVerified(handoff_id=order.handoff_id, checksum=""))
            return True
        job.num_done += len(part)
        if job.num_done < len(order.page_ids):
            return False
        self._report(_compared(order, job.digests))
        return True

    def _open_checked(self, address: PoolAddress, page_ids: tuple[int, ...]) -> PeerT:
        """Open the peer's pages, after checking its address and the page ids. Raises `Unavailable` before any write."""
        ours = self._address
        if address.transport != ours.transport:
            raise Unavailable(
                f"the peer's pool uses the transport {address.transport!r}, this is {ours.transport!r}: offer the same "
                "one with --disaggregation-transfer-backend on both workers"
            )
        if address.layout != ours.layout or address.page_bytes != ours.page_bytes:
            raise Unavailable(
                f"the peer's page layout is {address.layout} ({address.page_bytes} bytes), ours is {ours.layout} "
                f"({ours.page_bytes} bytes): start both workers with the same model, dtype and page size"
            )
        outside = [page_id for page_id in page_ids if not 0 <= page_id < address.num_pages]
        if outside:
            raise Unavailable(f"page {outside[0]} is not in the peer's pool of {address.num_pages} pages")
        return self._open_peer(address)

    def _fail(self, handoff_id: HandoffId, handoff: _Handoff, message: str) -> None:
        with self._lock:
            if handoff.state is not _State.OPEN:
                return  # stopped meanwhile: the report of the stop must be the last one
            handoff.state = _State.FAILED
            self._reports.append(WritesFailed(handoff_id=handoff_id, message=message))
        self._wakeup()

    # ------------------------------------------------------------ both

    def _add(self, order: WritePages | VerifyPages | StopWrites | WritesFailed) -> None:
        self._jobs.add(order.handoff_id, _Job(order))
        self._work_ready.notify()

    def _report(self, report: TransferReport) -> None:
        with self._lock:
            self._reports.append(report)
        self._wakeup()

    def _handoff(self, handoff_id: HandoffId) -> _Handoff:
        handoff = self._handoffs.get(handoff_id)
        if handoff is None:
            while len(self._handoffs) >= MAX_HANDOFFS:
                self._handoffs.popitem(last=False)
            handoff = self._handoffs[handoff_id] = _Handoff()
        self._handoffs.move_to_end(handoff_id)
        return handoff

    @staticmethod
    def _completed(handoff_id: HandoffId, handoff: _Handoff) -> WritesCompleted:
        return WritesCompleted(
            handoff_id=handoff_id,
            num_pages=handoff.num_pages,
            checksum=handoff.checksum.hexdigest(),
            page_digests=bytes(handoff.page_digests),
        )

    def _assert_local(self, page_ids: tuple[int, ...]) -> None:
        num_pages = self._address.num_pages
        assert all(0 <= page_id < num_pages for page_id in page_ids), f"a page id is outside our {num_pages} pages"


def _compared(order: VerifyPages, digests: list[bytes]) -> PagesVerified:
    """Return the report on pages with these digests."""
    checksum, num_intact = fold(digests), 0
    if order.checksum and checksum != order.checksum:
        num_intact = num_equal(shortened(digests), order.page_digests)
        which = f"page {num_intact} of {len(digests)}" if order.page_digests else f"one of {len(digests)} pages"
        logger.warning("%s of handoff %s has arrived changed (%s)", which, order.handoff_id, order.transport)
    return PagesVerified(handoff_id=order.handoff_id, checksum=checksum, num_intact=num_intact)
