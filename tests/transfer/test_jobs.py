"""The limits of the transfer queue, which all backends share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from kvist.plan.transfers import PagesVerified, VerifyPages, WritePages, WritesCompleted, WritesFailed
from kvist.request import HandoffId
from kvist.transfer import TransferReport, jobs
from kvist.transfer.host_pages import HostPages, Pages
from kvist.transfer.jobs import TransferJobs, in_groups
from kvist.wire import PoolAddress

ADDRESS = PoolAddress(transport="test", location="here", num_pages=4, page_bytes=32, layout="l")


class Copier:
    """A worker stepped by the test, with a hook that runs during a copy."""

    def __init__(self, pages_at_once: int = 1) -> None:
        self.target = np.zeros((4, 32), np.uint8)
        self.num_wakeups = 0
        self.pages_at_once = pages_at_once
        self.copied: list[tuple[int, ...]] = []  # by call
        self.while_copying: Callable[[], None] = lambda: None
        self._host = HostPages(np.arange(128, dtype=np.uint8).reshape(4, 32))
        self.jobs = TransferJobs(
            address=ADDRESS, pages=self, copies=in_groups(self), open_peer=self.open_peer, wakeup=self.wakeup
        )

    def copy(self, page_ids: Sequence[int], peer: Pages, peer_page_ids: Sequence[int]) -> list[bytes]:
        self.copied.append(tuple(page_ids))
        digests = self._host.copy(page_ids, peer, peer_page_ids)
        self.while_copying()
        return digests

    def digests(self, page_ids: Sequence[int]) -> list[bytes]:
        return self._host.digests(page_ids)

    def work(self) -> list[TransferReport]:
        while self.jobs.work_one(wait=False):
            pass
        return self.jobs.poll()

    def open_peer(self, address: PoolAddress) -> Pages:
        assert address == ADDRESS
        return self.target

    def wakeup(self) -> None:
        self.num_wakeups += 1

    def write(self, handoff: str, *page_ids: int) -> None:
        job = WritePages(handoff_id=HandoffId(handoff), pool=ADDRESS, page_ids=page_ids, peer_page_ids=page_ids)
        self.jobs.write(job)


def test_a_full_queue_fails_only_the_handoff_that_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_QUEUED_WRITES", 2)
    copier = Copier()
    copier.write("a", 0)
    copier.write("b", 1)
    copier.write("b", 2)
    done, failed = copier.work()
    assert isinstance(done, WritesCompleted)
    assert done.handoff_id == "a"
    assert isinstance(failed, WritesFailed)
    assert failed.handoff_id == "b"
    assert "queue is full" in failed.message
    assert not copier.target[1:].any(), "a failed handoff writes no more pages, not even queued ones"


def test_every_transfer_report_wakes_the_loop() -> None:
    copier = Copier()
    copier.write("a", 0)
    copier.jobs.stop(HandoffId("b"))
    assert len(copier.work()) == copier.num_wakeups == 2


@pytest.mark.parametrize("pages_at_once", [1, 2])
def test_a_stop_during_a_write_ends_it_after_the_group_and_reports_the_pages_written(pages_at_once: int) -> None:
    copier = Copier(pages_at_once)
    copier.while_copying = lambda: copier.jobs.stop(HandoffId("a"))
    copier.write("a", 0, 1, 2)
    [report] = copier.work()
    assert isinstance(report, WritesCompleted)
    assert report.num_pages == pages_at_once
    assert copier.target[pages_at_once - 1].any()
    assert not copier.target[pages_at_once:].any()


def test_a_close_during_a_write_ends_it_after_the_group_without_a_report() -> None:
    copier = Copier(2)
    copier.while_copying = copier.jobs.close
    copier.write("a", 0, 1, 2)
    assert copier.work() == []
    assert copier.copied == [(0, 1)]


def test_group_size_changes_neither_the_order_nor_the_checksum() -> None:
    alone, grouped = Copier(1), Copier(3)
    for copier in (alone, grouped):
        copier.write("a", 3, 1, 0, 2)
        copier.write("a", 0)
    assert alone.work() == grouped.work()
    assert grouped.copied == [(3, 1, 0), (2,), (0,)]


def test_a_small_handoff_waits_for_one_job_of_a_large_one() -> None:
    copier = Copier()
    for page_id in range(4):
        copier.write("large", page_id)
    copier.write("small", 2)
    reports = copier.work()
    assert [report.handoff_id for report in reports] == ["large", "small", "large", "large", "large"]
    assert copier.copied == [(0,), (2,), (1,), (2,), (3,)]


def test_a_large_job_is_written_in_several_turns_and_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Copier()
    whole.write("large", 0, 1, 2, 3)
    monkeypatch.setattr(jobs, "TURN_BYTES", 2 * ADDRESS.page_bytes)
    copier = Copier()
    copier.write("large", 0, 1, 2, 3)
    copier.write("small", 2)
    small, large = copier.work()
    assert small.handoff_id == "small"
    assert [large] == whole.work(), "turns change no checksum"
    assert copier.copied == [(0,), (1,), (2,), (2,), (3,)]


def test_a_write_added_during_a_verification_waits_for_one_turn_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    order = VerifyPages(handoff_id=HandoffId("large"), page_ids=(0, 1, 2), transport="test")
    whole = Copier()
    whole.jobs.verify(order)
    monkeypatch.setattr(jobs, "TURN_BYTES", ADDRESS.page_bytes)
    copier = Copier()
    copier.jobs.verify(order)
    assert copier.jobs.work_one(wait=False)
    copier.write("small", 3)
    small, large = copier.work()
    assert small.handoff_id == "small"
    assert [large] == whole.work()


def test_a_stop_frees_the_places_of_its_writes_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_QUEUED_WRITES", 3)
    copier = Copier()
    for number in range(3):
        copier.write(f"a{number}", 0)
        copier.write(f"a{number}", 1)
        copier.write("b", 2)
        copier.jobs.stop(HandoffId(f"a{number}"))
        assert [type(report) for report in copier.work()] == [WritesCompleted, WritesCompleted]


def test_unreadable_pages_get_a_checksum_that_matches_no_writer() -> None:
    copier = Copier()
    copier.digests = None  # type: ignore[method-assign, assignment]
    copier.jobs.verify(VerifyPages(handoff_id=HandoffId("a"), page_ids=(0,), transport="test"))
    assert copier.work() == [PagesVerified(handoff_id=HandoffId("a"), checksum="")]


def test_the_oldest_handoffs_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_HANDOFFS", 2)
    copier = Copier()
    for handoff in "abc":
        copier.write(handoff, 0)
    copier.work()
    assert len(copier.jobs._handoffs) == 2
