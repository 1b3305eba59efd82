"""The bounds of the transfer queue, where every backend shares them."""

from __future__ import annotations

import numpy as np

from kvist.request import HandoffId
from kvist.scheduler.events import WritesCompleted, WritesFailed
from kvist.scheduler.plan import WritePages
from kvist.transfer import jobs
from kvist.transfer.checksum import Pages
from kvist.transfer.jobs import LocalPool, TransferJobs
from kvist.wire import PoolAddress

ADDRESS = PoolAddress(transport="test", location="here", num_pages=4, page_bytes=32, layout="l")


class Copier:
    """A worker moved by hand."""

    def __init__(self) -> None:
        self.source = np.arange(128, dtype=np.uint8).reshape(4, 32)
        self.target = np.zeros((4, 32), np.uint8)
        self.num_wakeups = 0
        self.jobs = TransferJobs(LocalPool(pages=self.source, address=ADDRESS), self.open_peer, self.wakeup)

    def open_peer(self, address: PoolAddress) -> Pages:
        assert address == ADDRESS
        return self.target

    def wakeup(self) -> None:
        self.num_wakeups += 1

    def write(self, handoff: str, *page_ids: int) -> None:
        job = WritePages(handoff_id=HandoffId(handoff), pool=ADDRESS, page_ids=page_ids, peer_page_ids=page_ids)
        self.jobs.write(job)


def test_a_full_queue_fails_the_handoff_that_found_it_full_and_no_other(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(jobs, "MAX_QUEUED_WRITES", 2)
    copier = Copier()
    copier.write("a", 0)
    copier.write("b", 1)
    copier.write("b", 2)
    while copier.jobs.work_one(wait=False):
        pass
    done, failed = copier.jobs.poll()
    assert isinstance(done, WritesCompleted)
    assert done.handoff_id == "a"
    assert isinstance(failed, WritesFailed)
    assert failed.handoff_id == "b"
    assert "queue is full" in failed.message
    assert not copier.target[1:].any(), "a failed handoff writes nothing any more, not even what was queued"


def test_every_report_wakes_the_loop() -> None:
    copier = Copier()
    copier.write("a", 0)
    copier.jobs.stop(HandoffId("b"))
    while copier.jobs.work_one(wait=False):
        pass
    assert copier.num_wakeups == len(copier.jobs.poll()) == 2


def test_a_stop_in_the_middle_of_a_job_ends_it_at_the_page_and_tells_how_far_it_came(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    copier = Copier()
    copyto = np.copyto

    def copy_and_stop(target: Pages, source: Pages) -> None:
        copyto(target, source)
        copier.jobs.stop(HandoffId("a"))

    monkeypatch.setattr(jobs.np, "copyto", copy_and_stop)
    copier.write("a", 0, 1, 2)
    while copier.jobs.work_one(wait=False):
        pass
    [report] = copier.jobs.poll()
    assert isinstance(report, WritesCompleted)
    assert report.num_pages == 1
    assert not copier.target[1:].any()


def test_the_oldest_handoffs_are_forgotten_first(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(jobs, "MAX_HANDOFFS", 2)
    copier = Copier()
    for handoff in "abc":
        copier.write(handoff, 0)
    while copier.jobs.work_one(wait=False):
        pass
    assert len(copier.jobs._handoffs) == 2
