"""An engine that cannot hand its pages over says so for each handoff."""

from __future__ import annotations

from pathlib import Path

from kvist.request import EpochId, HandoffId
from kvist.scheduler.events import WritesCompleted, WritesFailed
from kvist.scheduler.plan import WritePages
from kvist.transfer.epoch import EpochLock
from kvist.transfer.none import NoTransport
from kvist.wire import PoolAddress

POOL = PoolAddress(transport="shm", location="/x", num_pages=1, page_bytes=1, layout="l")


def test_writes_fail_with_the_reason_and_a_stop_is_answered(tmp_path: Path) -> None:
    woken: list[bool] = []
    transport = NoTransport(reason="pages are on cuda", runtime_dir=tmp_path, wakeup=lambda: woken.append(True))
    handoff = HandoffId("h")
    transport.write(WritePages(handoff_id=handoff, pool=POOL, page_ids=(0,), peer_page_ids=(0,)))
    transport.stop(handoff)
    failed, stopped = transport.poll()
    assert failed == WritesFailed(handoff_id=handoff, message="pages are on cuda")
    assert isinstance(stopped, WritesCompleted)
    assert stopped.num_pages == 0
    assert len(woken) == 2
    assert transport.poll() == []
    transport.close()


def test_it_sees_deaths_as_every_transport_does(tmp_path: Path) -> None:
    lock = EpochLock(tmp_path, EpochId("e"))
    transport = NoTransport(reason="", runtime_dir=tmp_path, wakeup=lambda: None)
    assert not transport.peer_is_dead(EpochId("e"))
    lock.close()
    assert transport.peer_is_dead(EpochId("e"))
    transport.close()
