"""The common part of every transport: a bounded queue of jobs, one running checksum per handoff, reports in order.

    engine loop: write / verify / stop ──► jobs ──► worker: work_one() ──► reports ──► engine loop: poll

A transport owns the worker (a thread, or in tests the caller of `poll`), and provides our pages (`OwnPages`) and a
function that opens the pages at a peer's address.

    OPEN ──stop──► STOPPED         STOPPED and FAILED handoffs write no more pages
      └──error──► FAILED

A handoff is forgotten after `MAX_HANDOFFS` newer handoffs, far more than an engine can have open. If a handoff were
forgotten too early, its checksum would start again, and the receiver would refuse the pages.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from kvist.wire import PoolAddress

MAX_QUEUED_WRITES = 4096
MAX_HANDOFFS = 8192

logger = logging.getLogger(__name__)


PeerT = TypeVar("PeerT")
_PeerT = TypeVar("_PeerT", contravariant=True)


class OwnPages(Protocol[_PeerT]):
    """This engine's pages, and how to copy them to a peer's pages. Called by the worker only."""

    pages_at_once: int  # copied between two checks for a stop

    def copy(self, page_ids: Sequence[int], peer: _PeerT, peer_page_ids: Sequence[int]) -> list[bytes]:
        """Copy pages and return their digests. Every byte has been written when the call returns."""

    def digests(self, page_ids: Sequence[int]) -> list[bytes]: ...


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


class TransferJobs(Generic[PeerT]):
    """`open_peer` runs on the worker: it returns the peer's pages, writable and as large as the address says, or raises
    a `KvistError`."""

    def __init__(
        self,
        *,
        address: PoolAddress,  # our own
        pages: OwnPages[PeerT],
        open_peer: Callable[[PoolAddress], PeerT],
        wakeup: Callable[[], None],
        sends_digests: bool = False,
    ) -> None:
        """`sends_digests`: the pages leave local memory, and the receiver needs to find a page that has changed."""
        self._sends_digests = sends_digests
        self._address = address
        self._pages = pages
        self._open_peer = open_peer
        self._wakeup = wakeup
        self._lock = threading.Lock()
        self._work_ready = threading.Condition(self._lock)
        self._jobs: deque[WritePages | VerifyPages | StopWrites | WritesFailed] = deque()
        self._reports: deque[TransferReport] = deque()
        self._handoffs: OrderedDict[HandoffId, _Handoff] = OrderedDict()
        self._num_queued_writes = 0
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
                self._jobs.append(job)
                self._work_ready.notify()
                return
            handoff.state = _State.FAILED
            message = f"the transfer queue is full ({MAX_QUEUED_WRITES} writes): copies to the peer are too slow"
            # Report through the queue: the worker may still be copying a page of this handoff.
            self._jobs.append(WritesFailed(handoff_id=job.handoff_id, message=message))

    def verify(self, job: VerifyPages) -> None:
        self._assert_local(job.page_ids)
        with self._lock:
            self._jobs.append(job)  # bounded by the pages that the scheduler can grant
            self._work_ready.notify()

    def stop(self, handoff_id: HandoffId) -> None:
        with self._lock:
            self._handoff(handoff_id).state = _State.STOPPED
            # An earlier completion that was not polled yet must not be mistaken for the report of this stop.
            self._reports = deque(
                report
                for report in self._reports
                if not (isinstance(report, WritesCompleted) and report.handoff_id == handoff_id)
            )
            self._jobs.append(StopWrites(handoff_id=handoff_id))
            self._work_ready.notify()

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
        """Run one job. Return False when no job is queued (or, with `wait`, when the transport is closed)."""
        with self._lock:
            while wait and not self._jobs and not self._closed:
                self._work_ready.wait()
            if not self._jobs or self._closed:
                return False
            job = self._jobs.popleft()
            if isinstance(job, WritePages):
                self._num_queued_writes -= 1
        if isinstance(job, WritePages):
            self._carry_out_write(job)
        elif isinstance(job, VerifyPages):
            self._report(self._verified(job))
        elif isinstance(job, WritesFailed):
            self._report(job)
        else:
            with self._lock:
                handoff = self._handoff(job.handoff_id)
            self._report(self._completed(job.handoff_id, handoff))
        return True

    def _carry_out_write(self, job: WritePages) -> None:
        with self._lock:
            handoff = self._handoff(job.handoff_id)
        if handoff.state is not _State.OPEN:
            return
        try:
            peer = self._open_checked(job.pool, job.peer_page_ids)
            for start in range(0, len(job.page_ids), self._pages.pages_at_once):
                if handoff.state is not _State.OPEN or self._closed:
                    return  # the queued StopWrites reports the pages written
                group = slice(start, start + self._pages.pages_at_once)
                digests = self._pages.copy(job.page_ids[group], peer, job.peer_page_ids[group])
                handoff.checksum.add(digests)
                if self._sends_digests:
                    handoff.page_digests += shortened(digests)
                handoff.num_pages += len(digests)
        except Exception as error:  # the thread must survive a failed handoff
            if not isinstance(error, KvistError):
                logger.exception("copying the pages of handoff %s failed", job.handoff_id)
            self._fail(job.handoff_id, handoff, str(error) or type(error).__name__)
            return
        with self._lock:
            if handoff.state is _State.OPEN:
                self._reports.append(self._completed(job.handoff_id, handoff))
        self._wakeup()

    def _verified(self, job: VerifyPages) -> PagesVerified:
        try:
            digests = self._pages.digests(job.page_ids)
        except Exception:
            logger.exception("computing the checksum of handoff %s failed", job.handoff_id)
            return PagesVerified(handoff_id=job.handoff_id, checksum="")  # equals no writer's checksum
        checksum, num_intact = fold(digests), 0
        if job.checksum and checksum != job.checksum:
            num_intact = num_equal(shortened(digests), job.page_digests)
            which = f"page {num_intact} of {len(digests)}" if job.page_digests else f"one of {len(digests)} pages"
            logger.warning("%s of handoff %s has arrived changed (%s)", which, job.handoff_id, job.transport)
        return PagesVerified(handoff_id=job.handoff_id, checksum=checksum, num_intact=num_intact)

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
