"""How long a peer's memory stays mapped."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DevicePool
from kvist.plan.transfers import WritePages, WritesFailed
from kvist.request import EpochId, HandoffId
from kvist.transfer import same_host
from kvist.transfer.epoch import EpochLock, EpochWatch
from kvist.transfer.same_host import SameHostTransport
from kvist.wire import PoolAddress

LAYOUT = PageLayout(num_kv_heads=1, num_layers=1, page_size=4, head_dim=8, dtype="float32")


class Mapping:
    """A peer's memory, freed with this object."""


@dataclass
class SlowPages:
    """Pages whose copy blocks until the test releases it."""

    pages_at_once: int = 8
    begun: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    mapped_after_the_wait: bool = False

    def copy(self, page_ids: Sequence[int], peer: Mapping, peer_page_ids: Sequence[int]) -> list[bytes]:
        assert len(page_ids) == len(peer_page_ids)
        mapping = weakref.ref(peer)
        del peer
        self.begun.set()
        assert self.go_on.wait(timeout=60)
        self.mapped_after_the_wait = mapping() is not None
        return [b""] * len(page_ids)

    def digests(self, page_ids: Sequence[int]) -> list[bytes]:
        return [b""] * len(page_ids)


class Writer:
    def __init__(self, runtime_dir: Path) -> None:
        self.pages = SlowPages()
        self.mappings: list[weakref.ref[Mapping]] = []
        self.woken = threading.Event()
        own = PoolAddress(
            transport="shm", location="", num_pages=8, page_bytes=LAYOUT.page_bytes, layout=LAYOUT.describe()
        )
        self.transport = SameHostTransport(
            address=own, pages=self.pages, map_pool=self._map, runtime_dir=runtime_dir, watch=EpochWatch(runtime_dir),
            wakeup=self.woken.set,
        )  # fmt: skip

    def _map(self, _descriptor: int, _address: PoolAddress) -> Mapping:
        mapping = Mapping()
        self.mappings.append(weakref.ref(mapping))
        return mapping

    def write(self, pool: PoolAddress) -> None:
        self.transport.write(WritePages(handoff_id=HandoffId("h"), pool=pool, page_ids=(0,), peer_page_ids=(0,)))

    def write_and_wait(self, pool: PoolAddress) -> None:
        self.woken.clear()
        self.write(pool)
        assert self.woken.wait(timeout=60)

    def mapped(self) -> list[bool]:
        gc.collect()
        return [mapping() is not None for mapping in self.mappings]

    def wait_until_mapped(self, expected: list[bool]) -> None:
        """Wait until the transport's thread has dropped its last reference, which it does after its report."""
        deadline_s = time.monotonic() + 60
        while self.mapped() != expected:
            assert time.monotonic() < deadline_s, self.mapped()
            time.sleep(0.001)


class Peer:
    def __init__(self, runtime_dir: Path, epoch: str) -> None:
        self.epoch = EpochId(epoch)
        self._lock = EpochLock(runtime_dir, self.epoch)
        self._pool = DevicePool.create(LAYOUT, 8, device=torch.device("cpu"), directory=runtime_dir)
        self.address = self._pool.address

    def die(self) -> None:
        self._pool.close()
        self._lock.close()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    made = Writer(tmp_path.resolve())
    yield made
    made.pages.go_on.set()
    made.transport.close()


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    made = Peer(tmp_path.resolve(), "peer")
    yield made
    made.die()


def test_a_pool_is_mapped_once_and_unmapped_when_its_engine_is_dead(writer: Writer, peer: Peer) -> None:
    writer.pages.go_on.set()
    writer.write_and_wait(peer.address)
    writer.write_and_wait(peer.address)
    assert len(writer.mappings) == 1
    assert not writer.transport.peer_is_dead(peer.epoch)
    assert writer.mapped() == [True]
    peer.die()
    assert writer.transport.peer_is_dead(peer.epoch)
    writer.wait_until_mapped([False])


def test_a_pool_being_written_stays_mapped_until_the_group_is_copied(writer: Writer, peer: Peer) -> None:
    """A GPU kernel that writes to unmapped memory would crash the process."""
    writer.write(peer.address)
    assert writer.pages.begun.wait(timeout=60)
    peer.die()
    assert writer.transport.peer_is_dead(peer.epoch)
    writer.pages.go_on.set()
    assert writer.woken.wait(timeout=60)
    assert writer.pages.mapped_after_the_wait


def test_the_least_recently_written_pools_are_unmapped_above_the_limit(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_host, "MAX_PEER_MAPS", 2)
    writer.pages.go_on.set()
    peers = [Peer(tmp_path.resolve(), f"peer{number}") for number in range(3)]
    for each in peers:
        writer.write_and_wait(each.address)
    writer.wait_until_mapped([False, True, True])
    for each in peers:
        each.die()


def test_a_pool_of_a_dead_engine_is_never_mapped(writer: Writer, tmp_path: Path) -> None:
    abandoned = tmp_path.resolve() / "pool-1-dead.pages"
    abandoned.write_bytes(b"\0" * 8 * LAYOUT.page_bytes)
    address = PoolAddress(
        transport="shm",
        location=str(abandoned),
        num_pages=8,
        page_bytes=LAYOUT.page_bytes,
        layout=LAYOUT.describe(),
    )
    writer.write_and_wait(address)
    [report] = writer.transport.poll()
    assert isinstance(report, WritesFailed)
    assert "the peer has ended" in report.message
    assert not writer.mappings


def test_nothing_stays_mapped_after_close(writer: Writer, peer: Peer) -> None:
    writer.pages.go_on.set()
    writer.write_and_wait(peer.address)
    writer.transport.close()
    assert writer.mapped() == [False]
