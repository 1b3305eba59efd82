"""Access of peers over Mooncake is revoked: no byte of a failed write, or of a dead peer, arrives after that."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from kvist.errors import ConfigError
from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DevicePool
from kvist.plan.transfers import TransferReport, WritePages, WritesCompleted, WritesFailed
from kvist.request import EpochId, HandoffId, RequestId
from kvist.testing.specs import make_peer_spec
from kvist.transfer import Transports, make_transports
from kvist.transfer.epoch import EpochLock, EpochWatch
from kvist.transfer.mooncake import MooncakeTransport, mooncake_kind
from kvist.transfer.mooncake_engine import MooncakeEngine, MooncakeOptions, obstacle
from kvist.transfer.transport import TransportContext
from kvist.wire import Closed, Grant, PoolAddress
from tests.conformance.transport_hosts import GpuPeer

HERE = "127.0.0.1"
LAYOUT = PageLayout(num_kv_heads=2, num_layers=2, page_size=16, head_dim=8, dtype="float32")
NUM_PAGES = 12
TARGET, SOURCE, OTHER = EpochId("target"), EpochId("source"), EpochId("other")
needs_mooncake = pytest.mark.skipif(bool(obstacle(MooncakeOptions())), reason=obstacle(MooncakeOptions()) or "-")


class Engine:
    """One end of a connection, with a TransferEngine of its own."""

    def __init__(self, directory: Path) -> None:
        self.pool = DevicePool.create(LAYOUT, NUM_PAGES, device=torch.device("cpu"), directory=directory)
        self._woken = threading.Event()
        watch = EpochWatch(directory)
        context = TransportContext(
            pool=self.pool,
            address=mooncake_kind(MooncakeOptions()).address("mooncake", self.pool),
            runtime_dir=directory,
            watch=watch,
            wakeup=self._woken.set,
            advertised_host=HERE,
        )
        self.offered = MooncakeTransport(context, MooncakeEngine(MooncakeOptions(), HERE))
        self.transports = Transports({"mooncake": self.offered}, watch=watch, wakeup=self._woken.set)

    def granted(self, handoff_id: str, to: EpochId = SOURCE) -> PoolAddress:
        """Return the address in a Grant for `handoff_id`."""
        grant = Grant(
            handoff_id=HandoffId(handoff_id),
            request_id=RequestId("r"),
            target_epoch=TARGET,
            source_epoch=to,
            target=make_peer_spec(*self.transports.addresses),
            first_page=0,
            page_ids=(0,),
        )
        sent = self.transports.sending(grant)
        assert isinstance(sent, Grant)
        [pool] = sent.pools
        return pool

    def write(self, pool: PoolAddress, handoff_id: str = "a", page_ids: tuple[int, ...] = (0, 1)) -> TransferReport:
        self.transports.write(
            WritePages(handoff_id=HandoffId(handoff_id), pool=pool, page_ids=page_ids, peer_page_ids=page_ids)
        )
        while not (reports := self.transports.poll()):
            assert self._woken.wait(timeout=60)
            self._woken.clear()
        return reports[0]

    def close(self) -> None:
        self.transports.close()
        self.pool.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Engine]]:
    engines: list[Engine] = []

    def start() -> Engine:
        engines.append(Engine(tmp_path.resolve()))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture
def target(start: Callable[[], Engine]) -> Engine:
    return start()


@pytest.fixture
def source(start: Callable[[], Engine]) -> Engine:
    engine = start()
    engine.pool.bytes[:] = 5
    return engine


def closed(handoff_id: str, *, unsettled: bool = True) -> Closed:
    return Closed(handoff_id=HandoffId(handoff_id), target_epoch=TARGET, source_epoch=SOURCE, unsettled=unsettled)


@needs_mooncake
def test_after_an_unsettled_end_no_write_of_the_peer_arrives(source: Engine, target: Engine) -> None:
    pool = target.granted("a")
    assert isinstance(source.write(pool), WritesCompleted)
    target.transports.received(closed("a"))
    target.pool.bytes[:] = 9
    assert isinstance(source.write(pool, "b", (2, 3)), WritesFailed)
    assert (target.pool.bytes == 9).all()


@needs_mooncake
def test_an_orderly_end_leaves_the_access_of_other_handoffs(source: Engine, target: Engine) -> None:
    pool = target.granted("a")
    target.transports.received(closed("a", unsettled=False))
    assert isinstance(source.write(pool), WritesCompleted)
    assert target.granted("b") == pool


@needs_mooncake
def test_the_next_grant_after_an_unsettled_end_has_a_new_window(source: Engine, target: Engine) -> None:
    old = target.granted("a")
    target.transports.received(closed("a"))
    new = target.granted("b")
    assert new != old
    target.transports.received(closed("a"))  # sent again: must not close the window of `b`
    assert isinstance(source.write(new, "b"), WritesCompleted)
    assert (target.pool.bytes[:2] == 5).all()


@needs_mooncake
def test_a_grant_that_is_sent_again_has_its_first_window(target: Engine) -> None:
    first = target.granted("a")
    target.transports.received(closed("a"))
    assert target.granted("a") == first


@needs_mooncake
def test_peers_have_separate_windows(target: Engine, start: Callable[[], Engine]) -> None:
    other = start()
    theirs = target.granted("o", to=OTHER)
    assert theirs != target.granted("a")
    target.transports.received(closed("a"))
    assert isinstance(other.write(theirs), WritesCompleted)


@needs_mooncake
def test_a_peer_found_dead_has_lost_its_access(source: Engine, target: Engine, tmp_path: Path) -> None:
    lock = EpochLock(tmp_path.resolve(), SOURCE)
    pool = target.granted("a")
    assert not target.transports.peer_is_dead(SOURCE)
    assert isinstance(source.write(pool), WritesCompleted)
    lock.close()
    assert target.transports.peer_is_dead(SOURCE)
    target.pool.bytes[:] = 9
    assert isinstance(source.write(pool, "b"), WritesFailed)
    assert (target.pool.bytes == 9).all()


@needs_mooncake
def test_a_failed_write_marks_the_end_of_its_handoff_alone(source: Engine, target: Engine) -> None:
    pool = target.granted("a")
    assert isinstance(source.write(pool, "fine"), WritesCompleted)
    target.transports.received(closed("a"))
    assert isinstance(source.write(pool, "torn"), WritesFailed)
    marked = [source.transports.sending(closed(name, unsettled=False)) for name in ("fine", "torn")]
    assert [message.unsettled for message in marked if isinstance(message, Closed)] == [False, True]


@needs_mooncake
def test_a_published_address_without_a_window_is_refused(source: Engine, target: Engine) -> None:
    report = source.write(target.offered.address)
    assert isinstance(report, WritesFailed)
    assert "no window for our writes" in report.message


@needs_mooncake
def test_a_false_claim_is_refused_though_the_window_is_known(source: Engine, target: Engine) -> None:
    pool = target.granted("a")
    assert isinstance(source.write(pool), WritesCompleted)
    report = source.write(msgspec.structs.replace(pool, num_pages=NUM_PAGES + 1), "b")
    assert isinstance(report, WritesFailed)
    assert "claims" in report.message


@needs_mooncake
def test_a_hung_peer_fails_the_write_within_seconds_and_gets_no_byte_after_it_goes_on(
    source: Engine, tmp_path: Path
) -> None:
    peer = GpuPeer(tmp_path.resolve(), TARGET, "cpu", "mooncake")
    try:
        assert isinstance(source.write(peer.address), WritesCompleted)
        os.kill(peer.process.pid, signal.SIGSTOP)
        start_s = time.monotonic()
        assert isinstance(source.write(peer.address, "hung", (2,)), WritesFailed)
        assert time.monotonic() - start_s < 8
        again_s = time.monotonic()
        assert isinstance(source.write(peer.address, "again", (3,)), WritesFailed)
        assert time.monotonic() - again_s < 0.5  # at once: other peers' writes must not wait behind this one
        assert source.offered.is_unsettled(HandoffId("hung"))
        os.kill(peer.process.pid, signal.SIGCONT)
        assert (peer.pages()[:2] == 5).all()
    finally:
        peer.process.kill()
        peer.process.wait()


# ---------------------------------------------------------------- what is missing, and what to do


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.transfer.mooncake_engine._installed_release", lambda: None)
    assert "pip install 'kvist[mooncake]'" in obstacle(MooncakeOptions())


def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.transfer.mooncake_engine._installed_release", lambda: "0.3.14")
    assert "Mooncake 0.3.14 is installed, but Kvist needs 0.3.13" in obstacle(MooncakeOptions())


def test_missing_system_libraries_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_name: str) -> None:
        raise ImportError("libibverbs.so.1: cannot open shared object file")

    monkeypatch.setattr("kvist.transfer.mooncake_engine._installed_release", lambda: "0.3.13.post1")
    monkeypatch.setattr(importlib, "import_module", fail)
    assert "libibverbs.so.1" in (text := obstacle(MooncakeOptions()))
    assert "apt install libibverbs1 librdmacm1 libnuma1 liburing2" in text


@needs_mooncake
def test_a_missing_rdma_device_is_named_with_those_that_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kvist.transfer.mooncake_engine._DEVICES", tmp_path)
    assert "no RDMA device" in obstacle(MooncakeOptions(protocol="rdma"))
    (tmp_path / "mlx5_0").mkdir()
    assert obstacle(MooncakeOptions(protocol="rdma", device="mlx5_0")) == ""
    assert "choose one of mlx5_0" in obstacle(MooncakeOptions(protocol="rdma", device="mlx5_7"))


def test_a_device_without_rdma_is_refused() -> None:
    with pytest.raises(ConfigError, match="add --transfer-protocol rdma"):
        MooncakeOptions(device="mlx5_0")


def test_auto_leaves_the_network_closed_unless_an_option_asks_for_it(start_pool: DevicePool, tmp_path: Path) -> None:
    def offered(given: dict[str, str]) -> list[str]:
        transports = make_transports(start_pool, runtime_dir=tmp_path, wakeup=lambda: None, given=given)
        transports.close()
        return [address.transport for address in transports.addresses]

    assert "mooncake" not in offered({})
    if not obstacle(MooncakeOptions()):
        assert "mooncake" in offered({"protocol": "tcp"})
    with pytest.raises(ConfigError, match=r"backend mooncake: .*RDMA"):
        offered({"protocol": "rdma", "device": "nonsense_9"})


@pytest.fixture
def start_pool(tmp_path: Path) -> Iterator[DevicePool]:
    made = DevicePool.create(LAYOUT, NUM_PAGES, device=torch.device("cpu"), directory=tmp_path)
    yield made
    made.close()
