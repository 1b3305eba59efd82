"""The guarantees of every transport, for every kind of memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet

from kvist.mooncake.requirements import library_obstacle
from kvist.plan.transfers import PagesVerified, VerifyPages, WritePages, WritesCompleted, WritesFailed
from kvist.request import EpochId, HandoffId
from kvist.testing.inproc_transport import INPROC
from kvist.transfer import TRANSPORTS
from kvist.transfer.checksum import shortened
from kvist.transfer.host_pages import Pages
from tests.conformance.gpu_peer import STAGED
from tests.conformance.transport_hosts import (
    DEVICE_PAGES_ON_A_CPU,
    LAYOUT,
    NUM_PAGES,
    STAGED_DEVICE_PAGES,
    CpuHost,
    GpuHost,
    GpuPeers,
    Host,
    InprocHost,
    MixedHost,
    Side,
)

A, B = HandoffId("a"), HandoffId("b")


@pytest.fixture(scope="module")
def gpu_peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuPeers]:
    peers = GpuPeers(tmp_path_factory.mktemp("run").resolve())
    yield peers
    peers.close()


GPU = pytest.mark.gpu


@dataclass(frozen=True)
class Case:
    """A transport of the door, or of the tests; and the memory of its pools."""

    transport: str  # of the source
    peer_transport: str = ""  # of the targets; "": that of the source
    devices: tuple[str, str] = ("cpu", "cpu")  # of the source and of its peers, in other processes if one is a GPU
    over_network: bool = False  # then the peers are in other processes, too

    @property
    def num_gpus(self) -> int:
        return max((int(device[5:]) + 1 for device in self.devices if device.startswith("cuda:")), default=0)


def cases() -> Iterator[ParameterSet]:
    """Yield a case for each transport and each pair of devices that it copies between, on one and on two GPUs."""
    for name in (INPROC, DEVICE_PAGES_ON_A_CPU, STAGED_DEVICE_PAGES):
        yield pytest.param(Case(name), id=name)
    yield pytest.param(Case("host-staged", STAGED_DEVICE_PAGES), id="host-staged-to-device-pages")
    yield pytest.param(Case(STAGED_DEVICE_PAGES, "host-staged"), id="host-staged-from-device-pages")
    for name, row in TRANSPORTS.items():
        kind = row.make({})
        pairs = kind.device_pairs
        if ("cpu", "cpu") in pairs:
            yield pytest.param(Case(name, over_network=not kind.same_host), id=name)
        if ("cpu", "cpu") in pairs and not kind.same_host:
            for devices in (("cpu", STAGED), (STAGED, "cpu")):
                yield pytest.param(Case(name, devices=devices, over_network=True), id=f"{name}-{'-to-'.join(devices)}")
        if ("cuda", "cuda") in pairs:
            for last in (0, 1):
                devices = ("cuda:0", f"cuda:{last}")
                case = Case(name, devices=devices, over_network=not kind.same_host)
                yield pytest.param(case, id=f"{name}-{last + 1}-gpu", marks=GPU)
        for devices in (("cpu", "cuda:0"), ("cuda:0", "cpu")):
            if (devices[0].partition(":")[0], devices[1].partition(":")[0]) in pairs:
                case = Case(name, devices=devices, over_network=not kind.same_host)
                yield pytest.param(case, id=f"{name}-{devices[0]}-to-{devices[1]}", marks=GPU)


@pytest.fixture(params=cases())
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    case: Case = request.param
    made: Host
    if case.transport == INPROC:
        made = InprocHost()
    elif case.num_gpus or case.over_network:
        if case.over_network and (reason := library_obstacle()):
            pytest.skip(reason)
        if torch.cuda.device_count() < case.num_gpus:
            pytest.skip(f"torch sees {torch.cuda.device_count()} GPUs")
        peers: GpuPeers = request.getfixturevalue("gpu_peers")
        source_device, peer_device = case.devices
        made = GpuHost(peers, case.transport, source_device=source_device, peer_device=peer_device)
    elif case.peer_transport:
        made = MixedHost(tmp_path.resolve(), case.transport, case.peer_transport)
    else:
        made = CpuHost(tmp_path.resolve(), case.transport)
    yield made
    made.close()


@pytest.fixture
def source(host: Host) -> Side:
    side = host.side("source")
    side.fill(1)
    return side


@pytest.fixture
def target(host: Host) -> Side:
    return host.side("target")


def write(
    handoff_id: HandoffId, to: Side, page_ids: tuple[int, ...], peer_page_ids: tuple[int, ...] | None = None
) -> WritePages:
    return WritePages(
        handoff_id=handoff_id, pool=to.address, page_ids=page_ids, peer_page_ids=peer_page_ids or page_ids
    )


def verify(at: Side, page_ids: tuple[int, ...]) -> VerifyPages:
    return VerifyPages(handoff_id=A, page_ids=page_ids, transport=at.address.transport)


def untouched(pages: Pages) -> bool:
    return not pages.any()


def test_pages_arrive_byte_for_byte_where_they_were_granted(source: Side, target: Side) -> None:
    source.transport.write(write(A, target, (3, 0, 7), (5, 6, 1)))
    [report] = source.wait_for(1)
    assert report == WritesCompleted(handoff_id=A, num_pages=3, checksum=source.checksum((3, 0, 7)))
    for page_id, peer_page_id in ((3, 5), (0, 6), (7, 1)):
        np.testing.assert_array_equal(target.pages()[peer_page_id], source.pages()[page_id])
    assert untouched(target.pages()[[0, 2, 3, 4, 7, 8, 9, 10, 11]])


def test_the_receiver_computes_the_checksum_that_the_writer_reports(source: Side, target: Side) -> None:
    source.transport.write(write(A, target, (3, 0), (5, 6)))
    source.transport.write(write(A, target, (7,), (1,)))
    sent = source.wait_for(2)[-1]
    target.transport.verify(verify(target, (5, 6, 1)))
    [verified] = target.wait_for(1)
    assert isinstance(sent, WritesCompleted)
    assert verified == PagesVerified(handoff_id=A, checksum=sent.checksum)
    for page_id, peer_page_id in ((3, 5), (0, 6), (7, 1)):
        np.testing.assert_array_equal(target.pages()[peer_page_id], source.pages()[page_id])


def test_a_path_that_leaves_the_host_reports_the_digest_of_each_page(source: Side, target: Side) -> None:
    source.transport.write(write(A, target, (3, 0), (5, 6)))
    source.transport.write(write(A, target, (7,), (1,)))
    source.wait_for(2)
    leaves = not target.address.same_host
    assert source.page_digests == (shortened(source.digests(source.pages()[[3, 0, 7]])) if leaves else b"")


def test_a_changed_byte_or_another_page_order_changes_the_checksum(source: Side, target: Side) -> None:
    source.transport.write(write(A, target, (0, 1)))
    [sent] = source.wait_for(1)
    assert isinstance(sent, WritesCompleted)
    target.transport.verify(verify(target, (1, 0)))
    target.wait_for(1)
    target.flip_a_bit(1)
    target.transport.verify(verify(target, (0, 1)))
    seen = {report.checksum for report in target.wait_for(2) if isinstance(report, PagesVerified)}
    assert len(seen | {sent.checksum}) == 3


def test_the_chunks_of_a_handoff_complete_in_order_with_cumulative_counts(source: Side, target: Side) -> None:
    for start in range(0, 12, 3):
        source.transport.write(write(A, target, tuple(range(start, start + 3))))
    reports = source.wait_for(4)
    expected = [source.checksum(tuple(range(count))) for count in (3, 6, 9, 12)]
    assert reports == [
        WritesCompleted(handoff_id=A, num_pages=3 * (index + 1), checksum=checksum)
        for index, checksum in enumerate(expected)
    ]


def test_concurrent_handoffs_have_separate_checksums(source: Side, target: Side, host: Host) -> None:
    other = host.side("other")
    for page_id in range(6):
        source.transport.write(write(A, target, (page_id,)))
        source.transport.write(write(B, other, (page_id + 6,)))
    last = {report.handoff_id: report for report in source.wait_for(12)}
    assert last[A] == WritesCompleted(handoff_id=A, num_pages=6, checksum=source.checksum(tuple(range(6))))
    assert last[B] == WritesCompleted(handoff_id=B, num_pages=6, checksum=source.checksum(tuple(range(6, 12))))
    assert untouched(target.pages()[6:])
    assert untouched(other.pages()[:6])


def test_stop_reports_what_was_written_and_nothing_is_written_after_it(source: Side, target: Side) -> None:
    source.transport.write(write(A, target, (0, 1)))
    source.wait_for(1)
    source.transport.stop(A)
    source.transport.write(write(A, target, (2, 3)))
    source.transport.write(write(B, target, (4,)))  # when this write is done, a write of A would be done, too
    assert source.wait_for(3)[1:] == [
        WritesCompleted(handoff_id=A, num_pages=2, checksum=source.checksum((0, 1))),
        WritesCompleted(handoff_id=B, num_pages=1, checksum=source.checksum((4,))),
    ]
    assert untouched(target.pages()[2:4])


def test_stop_is_answered_once_though_earlier_completions_were_not_polled(source: Side, target: Side) -> None:
    """If an older completion were taken for the answer, pages that a later job still writes would be freed."""
    source.transport.write(write(A, target, (0,)))
    source.transport.write(write(B, target, (1,)))
    assert source.woken.wait(timeout=60)
    source.transport.stop(A)
    source.wait_for(2)
    source.transport.write(write(B, target, (2,)))
    source.wait_for(3)
    assert [report.handoff_id for report in source.reports].count(A) == 1


def test_stop_of_an_unknown_handoff_is_answered_with_no_pages(source: Side) -> None:
    source.transport.stop(A)
    assert source.wait_for(1) == [WritesCompleted(handoff_id=A, num_pages=0, checksum=source.checksum(()))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "other"}, "same model"),
        ({"page_bytes": LAYOUT.page_bytes * 2}, "same model"),
        ({"num_pages": NUM_PAGES + 1}, "claims"),
        ({"num_pages": 2}, "not in the peer's pool"),
        ({"location": "/nowhere/pool-x.pages"}, "peer"),
        ({"transport": "pigeon"}, "pigeon"),
    ],
)
def test_an_unexpected_peer_pool_is_refused_before_the_first_byte_is_written(
    source: Side, target: Side, change: dict[str, object], message: str
) -> None:
    pool = msgspec.structs.replace(target.address, **change)
    source.transport.write(WritePages(handoff_id=A, pool=pool, page_ids=(0, 3), peer_page_ids=(0, 3)))
    [report] = source.wait_for(1)
    assert isinstance(report, WritesFailed)
    assert message in report.message
    assert untouched(target.pages())


def test_writes_after_a_failure_of_their_handoff_are_skipped(source: Side, target: Side) -> None:
    wrong = msgspec.structs.replace(target.address, layout="other")
    source.transport.write(WritePages(handoff_id=A, pool=wrong, page_ids=(0,), peer_page_ids=(0,)))
    source.transport.write(write(A, target, (1,)))
    source.transport.write(write(B, target, (2,)))
    reports = source.wait_for(2)
    assert [type(report) for report in reports] == [WritesFailed, WritesCompleted]
    assert untouched(target.pages()[1])


def test_a_write_to_a_dead_peer_fails_and_a_peer_is_dead_only_after_its_process_ended(
    source: Side, target: Side
) -> None:
    assert not source.transport.peer_is_dead(target.epoch)
    source.transport.write(write(A, target, (0,)))
    source.wait_for(1)
    target.kill()
    source.transport.write(write(A, target, (1,)))
    report = source.wait_for(2)[1]
    assert isinstance(report, WritesFailed)
    assert "the peer has ended" in report.message
    deadline_s = time.monotonic() + 60
    while not source.transport.peer_is_dead(target.epoch):  # on a GPU its last writes may still arrive
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert source.transport.peer_is_dead(target.epoch)


def test_a_peer_never_seen_is_not_reported_dead(source: Side) -> None:
    assert not source.transport.peer_is_dead(EpochId("never-here"))
    assert not source.transport.peer_is_dead(EpochId("../../etc/passwd"))


def test_nothing_is_written_after_close(source: Side, target: Side) -> None:
    source.transport.close()
    source.transport.write(write(A, target, (0,)))
    assert source.transport.poll() == []
    assert untouched(target.pages())
