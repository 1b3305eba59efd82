"""Access of peers over Mooncake is revoked: no byte of a failed write, or of a dead peer, arrives after that."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from kvist.errors import ConfigError
from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DevicePool
from kvist.mooncake.engine import MooncakeEngine, separate_engine
from kvist.mooncake.requirements import Network, library_obstacle
from kvist.plan.transfers import (
    PagesVerified,
    TransferReport,
    VerifyPages,
    WritePages,
    WritesCompleted,
    WritesFailed,
)
from kvist.request import EpochId, HandoffId, RequestId
from kvist.testing.rounds import check_time, in_rounds
from kvist.testing.specs import make_peer_spec, make_pool
from kvist.transfer import Transports, make_transports
from kvist.transfer.checksum import fold, shortened
from kvist.transfer.epoch import EpochLock, EpochWatch
from kvist.transfer.host_pages import HostPages
from kvist.transfer.mooncake import MooncakeTransport, mooncake_kind
from kvist.transfer.mooncake_options import HANDOFFS, MooncakeOptions
from kvist.transfer.transport import TransportContext
from kvist.wire import Closed, Grant, PoolAddress
from tests.conformance.transport_hosts import GpuPeer

HERE = "127.0.0.1"
LAYOUT = PageLayout(num_kv_heads=2, num_layers=2, page_size=16, head_dim=8, dtype="float32")
NUM_PAGES = 12
TARGET, SOURCE, OTHER = EpochId("target"), EpochId("source"), EpochId("other")
needs_mooncake = pytest.mark.skipif(bool(library_obstacle()), reason=library_obstacle() or "-")


Start = Callable[..., "Engine"]


class Engine:
    """One end of a connection, with a TransferEngine of its own."""

    def __init__(self, directory: Path, engine: MooncakeEngine, *, staged: bool) -> None:
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
        self.offered = MooncakeTransport(context, engine, staged=staged)
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
        return self.next_reports()[0]

    def next_reports(self) -> list[TransferReport]:
        while not (reports := self.transports.poll()):
            assert self._woken.wait(timeout=60)
            self._woken.clear()
        return reports

    def close(self) -> None:
        self.transports.close()
        self.pool.close()


@pytest.fixture(scope="module")
def ends() -> Iterator[list[MooncakeEngine]]:
    """The library's engines, kept from test to test, because each takes a second to end."""
    made = [separate_engine(Network(host=HERE), HANDOFFS) for _ in range(2)]
    yield made
    for engine in made:
        engine.close()


@pytest.fixture
def start(tmp_path: Path, ends: list[MooncakeEngine]) -> Iterator[Start]:
    engines: list[Engine] = []

    def start(*, staged: bool = False) -> Engine:
        engines.append(Engine(tmp_path.resolve(), ends[len(engines) % len(ends)].share(), staged=staged))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture
def target(start: Start) -> Engine:
    return start()


@pytest.fixture
def source(start: Start) -> Engine:
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
def test_peers_have_separate_windows(target: Engine, start: Start) -> None:
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


def stop(pid: int) -> None:
    """Stop a process, and wait until all its threads have stopped."""
    os.kill(pid, signal.SIGSTOP)
    threads = Path(f"/proc/{pid}/task")
    while any((each / "stat").read_text().rpartition(")")[2].split()[0] != "T" for each in threads.iterdir()):
        time.sleep(0.001)


@needs_mooncake
@in_rounds(3)
def test_a_hung_peer_fails_the_write_within_seconds_and_gets_no_byte_after_it_goes_on(
    start: Start, tmp_path: Path
) -> None:
    source = start()
    source.pool.bytes[:] = 5
    peer = GpuPeer(Path(tempfile.mkdtemp(dir=tmp_path.resolve())), TARGET, "cpu", "mooncake")
    try:
        assert isinstance(source.write(peer.address), WritesCompleted)
        stop(peer.process.pid)
        start_s = time.monotonic()
        assert isinstance(source.write(peer.address, "hung", (2, 7, 4, 6, 10)), WritesFailed)  # five pieces
        failed_s = time.monotonic() - start_s
        again_s = time.monotonic()
        assert isinstance(source.write(peer.address, "again", (3,)), WritesFailed)
        failed_again_s = time.monotonic() - again_s
        assert source.offered.is_unsettled(HandoffId("hung"))
        os.kill(peer.process.pid, signal.SIGCONT)
        assert (peer.pages()[:2] == 5).all()
    finally:
        peer.process.kill()
        peer.process.wait()
    check_time(failed_s < 8, f"{failed_s:.1f} s")
    check_time(failed_again_s < 0.5, f"{failed_again_s:.2f} s: writes to other peers must not wait behind this one")


# ---------------------------------------------------------------- through host memory, as for a GPU


@needs_mooncake
def test_pages_for_a_gpu_take_host_memory_from_their_arrival_to_their_verification(start: Start) -> None:
    target, source = start(staged=True), start(staged=True)
    source.pool.bytes[:] = np.arange(source.pool.bytes.size, dtype=np.uint64).reshape(NUM_PAGES, -1)
    assert target.offered.arrivals is not None
    arrivals = target.offered.arrivals.path
    pool = target.granted("a")
    assert arrivals.stat().st_blocks == 0
    sent = source.write(pool, page_ids=(4, 2, 3))
    assert isinstance(sent, WritesCompleted)
    assert arrivals.stat().st_blocks > 0
    assert not target.pool.bytes.any()
    target.transports.verify(
        VerifyPages(
            handoff_id=HandoffId("a"),
            page_ids=(4, 2, 3),
            transport="mooncake",
            checksum=sent.checksum,
            page_digests=sent.page_digests,
        )
    )
    [report] = target.next_reports()
    assert report == PagesVerified(handoff_id=HandoffId("a"), checksum=sent.checksum)
    np.testing.assert_array_equal(target.pool.bytes[2:5], source.pool.bytes[2:5])
    assert not target.pool.bytes[[0, 1, 5]].any()
    assert arrivals.stat().st_blocks == 0


@needs_mooncake
def test_pages_that_arrive_after_the_end_of_a_staged_handoff_are_refused(start: Start) -> None:
    target, source = start(staged=True), start(staged=True)
    source.pool.bytes[:] = 5
    pool = target.granted("a")
    target.transports.received(closed("a"))
    assert isinstance(source.write(pool), WritesFailed)
    assert target.offered.arrivals is not None
    assert target.offered.arrivals.path.stat().st_blocks == 0


@needs_mooncake
def test_a_pool_on_a_gpu_is_not_offered_over_rdma() -> None:
    pool = SimpleNamespace(tensor=SimpleNamespace(is_cuda=True, device=torch.device("cuda")), address=make_pool())
    kind = mooncake_kind(MooncakeOptions(protocol="rdma"))
    assert kind.obstacle_for(pool).endswith("use --transfer-protocol tcp")  # type: ignore[arg-type]


@needs_mooncake
def test_batches_of_scattered_pages_are_under_way_together_and_add_up(source: Engine, target: Engine) -> None:
    source.pool.bytes[:] = np.random.default_rng(0).integers(0, 256, source.pool.bytes.shape, np.uint8)
    source.offered.batch_pages = 2
    page_ids = (7, 0, 11, 1, 2, 3, 9)
    sent = source.write(target.granted("a"), page_ids=page_ids)
    assert isinstance(sent, WritesCompleted)
    np.testing.assert_array_equal(target.pool.bytes[list(page_ids)], source.pool.bytes[list(page_ids)])
    digests = HostPages(source.pool.bytes).digests(page_ids)
    assert (sent.checksum, sent.page_digests) == (fold(digests), shortened(digests))


# ---------------------------------------------------------------- options


def test_a_device_without_rdma_is_refused() -> None:
    with pytest.raises(ConfigError, match="add --transfer-protocol rdma"):
        MooncakeOptions(device="mlx5_0")


@pytest.mark.parametrize("device", ["", ",", "mlx5_0,", "mlx5_0, mlx5_1", "../mlx5_0", "mlx5_0\n", "x" * 65])
def test_device_names_that_cannot_be_are_refused_with_an_example(device: str) -> None:
    with pytest.raises(ConfigError, match="such as mlx5_0,mlx5_1") as refused:
        MooncakeOptions(protocol="rdma", device=device)
    assert refused.value.param == "transfer_device"


def test_several_devices_and_the_address_of_the_socket_make_the_network() -> None:
    options = MooncakeOptions(protocol="rdma", device="mlx5_0,mlx5_1")
    assert options.network("10.0.0.1") == Network(host="10.0.0.1", protocol="rdma", devices=("mlx5_0", "mlx5_1"))
    assert MooncakeOptions(host="10.0.0.2").network("10.0.0.1") == Network(host="10.0.0.2")


def test_auto_leaves_the_network_closed_unless_an_option_asks_for_it(start_pool: DevicePool, tmp_path: Path) -> None:
    def offered(given: dict[str, str]) -> list[str]:
        transports = make_transports(start_pool, runtime_dir=tmp_path, wakeup=lambda: None, given=given)
        transports.close()
        return [address.transport for address in transports.addresses]

    assert "mooncake" not in offered({})
    if not library_obstacle():
        assert "mooncake" in offered({"protocol": "tcp"})
    with pytest.raises(ConfigError, match=r"backend mooncake: .*RDMA"):
        offered({"protocol": "rdma", "device": "nonsense_9"})


@pytest.fixture
def start_pool(tmp_path: Path) -> Iterator[DevicePool]:
    made = DevicePool.create(LAYOUT, NUM_PAGES, device=torch.device("cpu"), directory=tmp_path)
    yield made
    made.close()
