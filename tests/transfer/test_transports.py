"""The transports of one engine behind one interface: each job goes to the transport that it names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvist.plan.transfers import (
    PagesVerified,
    TransferReport,
    VerifyPages,
    WritePages,
    WritesCompleted,
    WritesFailed,
)
from kvist.request import EpochId, HandoffId
from kvist.testing.clocks import FakeClock
from kvist.testing.specs import make_pool
from kvist.transfer import transports as module
from kvist.transfer.epoch import EpochWatch
from kvist.transfer.transports import Transports
from kvist.wire import PoolAddress

H, OTHER = HandoffId("h"), HandoffId("other")


@dataclass
class Recorded:
    """A transport that records its calls; the test adds its reports."""

    address: PoolAddress
    calls: list[object] = field(default_factory=list)
    reports: list[TransferReport] = field(default_factory=list)
    dead: set[EpochId] = field(default_factory=set)

    def write(self, job: WritePages) -> None:
        self.calls.append(job)

    def verify(self, job: VerifyPages) -> None:
        self.calls.append(job)

    def stop(self, handoff_id: HandoffId) -> None:
        self.calls.append(handoff_id)

    def poll(self) -> list[TransferReport]:
        reports, self.reports = self.reports, []
        return reports

    def peer_is_dead(self, epoch: EpochId) -> bool:
        return epoch in self.dead

    def close(self) -> None:
        self.calls.append("close")


class Engine:
    def __init__(self, runtime_dir: Path, settle_s: float = 0.0) -> None:
        self.one, self.two = (Recorded(make_pool(transport=name)) for name in ("one", "two"))
        self.clock = FakeClock(5.0)
        self.num_wakeups = 0
        self.transports = Transports(
            {"one": self.one, "two": self.two},
            watch=EpochWatch(runtime_dir),
            wakeup=self._wake,
            settle_s=settle_s,
            clock=self.clock,
        )

    def _wake(self) -> None:
        self.num_wakeups += 1


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path)


def write(transport: str, handoff_id: HandoffId = H) -> WritePages:
    pool = make_pool(transport=transport)
    return WritePages(handoff_id=handoff_id, pool=pool, page_ids=(0,), peer_page_ids=(0,))


def test_the_pool_has_one_address_per_transport(engine: Engine) -> None:
    assert [address.transport for address in engine.transports.addresses] == ["one", "two"]


def test_jobs_go_to_the_transport_that_they_name(engine: Engine) -> None:
    verify = VerifyPages(handoff_id=H, page_ids=(1,), transport="one")
    engine.transports.write(write("two"))
    engine.transports.verify(verify)
    assert (engine.one.calls, engine.two.calls) == ([verify], [write("two")])


def test_a_stop_reaches_the_one_transport_that_writes_the_handoff(engine: Engine) -> None:
    engine.transports.write(write("two"))
    engine.transports.write(write("one", OTHER))
    engine.transports.stop(H)
    assert (engine.one.calls, engine.two.calls) == ([write("one", OTHER)], [write("two"), H])


def test_a_stop_of_an_unknown_handoff_is_answered_once(engine: Engine) -> None:
    engine.transports.stop(H)
    assert [*engine.one.calls, *engine.two.calls] == [H]


def test_the_writers_of_old_handoffs_are_forgotten(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HANDOFFS", 2)
    for handoff_id in (H, OTHER, HandoffId("third")):
        engine.transports.write(write("two", handoff_id))
    engine.two.calls.clear()
    engine.transports.stop(H)
    engine.transports.stop(OTHER)
    assert (engine.one.calls, engine.two.calls) == ([H], [OTHER])


def test_reports_of_all_transports_are_polled(engine: Engine) -> None:
    engine.one.reports = [WritesCompleted(handoff_id=H, num_pages=1, checksum="x")]
    engine.two.reports = [PagesVerified(handoff_id=OTHER, checksum="y")]
    assert engine.transports.poll() == [
        WritesCompleted(handoff_id=H, num_pages=1, checksum="x"),
        PagesVerified(handoff_id=OTHER, checksum="y"),
    ]
    assert engine.transports.poll() == []


def test_a_job_for_a_transport_that_is_not_offered_fails_and_wakes_the_loop(engine: Engine) -> None:
    engine.transports.write(write("three"))
    engine.transports.verify(VerifyPages(handoff_id=OTHER, page_ids=(1,), transport="three"))
    failed, verified = engine.transports.poll()
    assert isinstance(failed, WritesFailed)
    assert failed.message == "the peer's pool uses the transport 'three', and this engine offers one, two"
    assert verified == PagesVerified(handoff_id=OTHER, checksum="")
    assert engine.num_wakeups == 2


def test_a_peer_is_dead_only_after_its_last_writes_have_settled(tmp_path: Path) -> None:
    engine, epoch = Engine(tmp_path, settle_s=0.5), EpochId("peer")
    assert not engine.transports.peer_is_dead(epoch)
    engine.clock.advance(9.0)
    engine.two.dead.add(epoch)
    answers = []
    for _ in range(7):
        answers.append(engine.transports.peer_is_dead(epoch))
        engine.clock.advance(0.125)
    assert answers == [False] * 4 + [True] * 3


def test_close_closes_every_transport(engine: Engine) -> None:
    engine.transports.close()
    assert (engine.one.calls, engine.two.calls) == (["close"], ["close"])
