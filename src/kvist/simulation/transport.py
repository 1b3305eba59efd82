"""The transport of a simulated engine: checks of every copy, and faults."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Protocol

from kvist.kv.cache import PageCache
from kvist.kv.pages import PageState
from kvist.plan.events import Event
from kvist.plan.transfers import PagesVerified, StopWrites, VerifyPages, WritePages, WritesCompleted, WritesFailed
from kvist.request import HandoffId
from kvist.simulation.device import Page, SimDevice, checksum

DIGEST_BYTES = 16  # of one page


class Pool(Protocol):
    """The pages of one engine (engine.py)."""

    cache: PageCache
    device: SimDevice
    in_flight_pages: dict[int, HandoffId]  # by page: the handoff that it was granted to


@dataclass
class _Writes:
    jobs: deque[tuple[int, int, Page]] = field(default_factory=deque)  # our page, peer page, content when requested
    job_ends: deque[int] = field(default_factory=deque)  # number of written pages at which a report is due
    written: list[Page] = field(default_factory=list)
    pool: str = ""
    num_asked: int = 0
    stopped: bool = False
    failed: bool = False


class SimTransport:
    """Copies one page at a time, in the requested order, as promised by `transfer/__init__.py`. Mutable; the engine's.

    A test sets `fail_next` and `corrupt_next` for the next copy, and `sends_digests` for the digest of each page."""

    def __init__(self, own: Pool, peer_of: Callable[[str], Pool | None]) -> None:
        """`peer_of` returns the pool at an address, or None if its engine is dead."""
        self._own = own
        self._peer_of = peer_of
        self._writes: dict[HandoffId, _Writes] = {}
        self._verifies: deque[VerifyPages] = deque()
        self._reports: list[Event] = []
        self.corrupt_next = False
        self.fail_next = False
        self.sends_digests = True

    def take(self, job: WritePages | VerifyPages | StopWrites) -> None:
        if isinstance(job, VerifyPages):
            self._verifies.append(job)
            return
        writes = self._writes.setdefault(job.handoff_id, _Writes())
        if isinstance(job, StopWrites):
            writes.stopped = True
            writes.jobs.clear()
            self._reports = [
                report
                for report in self._reports
                if not (isinstance(report, WritesCompleted) and report.handoff_id == job.handoff_id)
            ]
            self._reports.append(self._completed(job.handoff_id))
            return
        assert not writes.stopped, "a write is requested after the stop"
        if writes.failed:
            return  # WritesFailed is reported already
        assert len(job.page_ids) == len(job.peer_page_ids)
        assert len(set(job.page_ids)) == len(job.page_ids)
        writes.pool = job.pool.location
        for page_id, peer_page_id in zip(job.page_ids, job.peer_page_ids, strict=True):
            writes.jobs.append((page_id, peer_page_id, list(self._own.device.pages[page_id])))
        writes.num_asked += len(job.page_ids)
        writes.job_ends.append(writes.num_asked)

    @property
    def busy(self) -> bool:
        return bool(self._verifies) or any(writes.jobs for writes in self._writes.values())

    def advance(self) -> None:
        """Copy one page, and verify one grant."""
        if self._verifies:
            job = self._verifies.popleft()
            self._reports.append(self._verified(job))
        for handoff_id, writes in self._writes.items():
            if writes.jobs:
                if self.fail_next:
                    self.fail_next = False
                    writes.failed = True
                    writes.jobs.clear()
                    self._reports.append(WritesFailed(handoff_id=handoff_id, message="the link is down"))
                    return
                self._copy_one(handoff_id, writes)
                return

    def _copy_one(self, handoff_id: HandoffId, writes: _Writes) -> None:
        page_id, peer_page_id, expected = writes.jobs.popleft()
        content = list(self._own.device.pages[page_id])
        assert content == expected, f"source page {page_id} changed while handoff {handoff_id} had a pending copy of it"
        assert self._own.cache.page_state(page_id) is not PageState.FREE, f"source page {page_id} was freed"
        peer = self._peer_of(writes.pool)
        if peer is not None:  # else the peer is dead, and its pool is gone
            owner = peer.in_flight_pages.get(peer_page_id)
            state = peer.cache.page_state(peer_page_id)
            assert state is PageState.IN_FLIGHT, f"{handoff_id} writes page {peer_page_id}, which is {state.name}"
            assert owner == handoff_id, f"{handoff_id} writes page {peer_page_id}, granted to {owner}"
            damaged = self.corrupt_next
            self.corrupt_next = False
            peer.device.pages[peer_page_id] = [(0, 0)] * len(content) if damaged else content
        writes.written.append(content)
        if len(writes.written) == writes.job_ends[0]:
            writes.job_ends.popleft()
            self._reports.append(self._completed(handoff_id))

    def _verified(self, job: VerifyPages) -> PagesVerified:
        for page_id in job.page_ids:  # a transport may write the pages now (transfer/host_staged.py)
            assert self._own.cache.page_state(page_id) is PageState.IN_FLIGHT, f"page {page_id} is verified too late"
            assert self._own.in_flight_pages[page_id] == job.handoff_id, f"page {page_id} has a newer grant"
        pages = [self._own.device.pages[page_id] for page_id in job.page_ids]
        sent = [job.page_digests[at : at + DIGEST_BYTES] for at in range(0, len(job.page_digests), DIGEST_BYTES)]
        intact = takewhile(lambda pair: pair[0] == _digest(pair[1]), zip(sent, pages, strict=False))
        return PagesVerified(handoff_id=job.handoff_id, checksum=checksum(pages), num_intact=len(list(intact)))

    def _completed(self, handoff_id: HandoffId) -> WritesCompleted:
        written = self._writes[handoff_id].written
        return WritesCompleted(
            handoff_id=handoff_id,
            num_pages=len(written),
            checksum=checksum(written),
            page_digests=b"".join(map(_digest, written)) if self.sends_digests else b"",
        )

    def poll(self) -> list[Event]:
        reports, self._reports = self._reports, []
        return reports


def _digest(page: Page) -> bytes:
    return checksum([page]).encode()
