"""Pools in parts, one per rank: mapped together, checked file by file, and given up when one rank has ended. The parts
are on a CPU, written like GPU memory."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from kvist.errors import Unavailable
from kvist.kv.layout import PageLayout
from kvist.memory.cuda_memory import HANDLE_BYTES, ExportedMemory
from kvist.memory.device_pool import DevicePool, RankPool
from kvist.plan.transfers import PagesVerified, TransferReport, VerifyPages, WritePages, WritesCompleted, WritesFailed
from kvist.request import EpochId, HandoffId
from kvist.transfer.cuda_ipc import CUDA_IPC, OpenedPart, OpenedPool, join_parts
from kvist.transfer.device_pages import DevicePages
from kvist.transfer.epoch import EpochLock, EpochWatch
from kvist.transfer.same_host import SameHostTransport
from kvist.transfer.shm import SHM, map_file, shm_transport
from kvist.transfer.transport import TransportContext
from kvist.wire import PoolAddress, PoolPart

WHOLE = PageLayout(num_kv_heads=4, num_layers=2, page_size=4, head_dim=8, dtype="float32")
NUM_PAGES = 6
CPU = torch.device("cpu")


@dataclass
class MappedPart:
    offset: int
    num_bytes: int
    memory: np.ndarray[Any, np.dtype[np.uint8]]

    def address_on(self, device: torch.device) -> int:
        assert device == CPU
        return self.memory.ctypes.data


@dataclass
class MappedParts:
    parts: Sequence[MappedPart]


def map_part(descriptor: int, address: PoolAddress) -> MappedParts:
    return MappedParts([MappedPart(0, address.page_bytes, map_file(descriptor, address))])


def join(address: PoolAddress, mapped: Sequence[MappedParts]) -> MappedParts:
    whole = zip(address.parts, mapped, strict=True)
    return MappedParts([dataclasses.replace(each.parts[0], offset=part.offset) for part, each in whole])


class Engine:
    """The pools of `tp` ranks and their transport."""

    def __init__(self, name: str, runtime_dir: Path, tp: int) -> None:
        self.epoch = EpochId(name)
        self._lock = EpochLock(runtime_dir, self.epoch)
        rank_layout = dataclasses.replace(WHOLE, num_kv_heads=4 // tp)
        self.pools = [DevicePool.create(rank_layout, NUM_PAGES, device=CPU, directory=runtime_dir) for _ in range(tp)]
        others = [
            RankPool(path=pool.address.location, device=CPU, first_head=rank * 4 // tp)
            for rank, pool in enumerate(self.pools)
        ]
        self.pools[0].join_ranks(4, others[1:])
        self.address = self.pools[0].address
        memory = [torch.from_numpy(pool.bytes) for pool in self.pools]
        pieces = [(part.offset, each) for part, each in zip(self.address.parts, memory, strict=True)]
        self.woken = threading.Event()
        self.transport: SameHostTransport[MappedParts] = SameHostTransport(
            address=self.address,
            pages=DevicePages(memory[0], pieces[1:]),
            map_pool=map_part,
            join_parts=join,
            runtime_dir=runtime_dir,
            watch=EpochWatch(runtime_dir),
            wakeup=self.woken.set,
        )

    def report(self) -> TransferReport:
        assert self.woken.wait(timeout=60)
        self.woken.clear()
        [report] = self.transport.poll()
        return report

    def write_to(self, address: PoolAddress, handoff: str = "h") -> TransferReport:
        self.transport.write(
            WritePages(handoff_id=HandoffId(handoff), pool=address, page_ids=(3, 0), peer_page_ids=(1, 5))
        )
        return self.report()

    def pages(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.concatenate([pool.bytes for pool in self.pools], axis=1)

    def close(self) -> None:
        self.transport.close()
        for pool in self.pools:
            pool.close()
        self._lock.close()


@pytest.fixture
def engines(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Engine]]:
    source_tp, target_tp = getattr(request, "param", (2, 4))
    made = Engine("source", tmp_path.resolve(), source_tp), Engine("target", tmp_path.resolve(), target_tp)
    for pool in made[0].pools:
        pool.bytes[:] = np.random.default_rng(1).integers(0, 256, pool.bytes.shape, np.uint8)
    yield made
    for engine in made:
        engine.close()


@pytest.mark.parametrize("engines", [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (2, 4)], indirect=True)
def test_pages_arrive_at_every_rank_and_are_verified(engines: tuple[Engine, Engine]) -> None:
    source, target = engines
    written = source.write_to(target.address)
    assert isinstance(written, WritesCompleted)
    expected = np.zeros((NUM_PAGES, WHOLE.page_bytes), np.uint8)
    expected[[1, 5]] = source.pages()[[3, 0]]
    np.testing.assert_array_equal(target.pages(), expected)
    verify = VerifyPages(handoff_id=HandoffId("h"), page_ids=(1, 5), transport="shm")
    target.transport.verify(verify)
    verified = target.report()
    assert isinstance(verified, PagesVerified)
    assert verified.checksum == written.checksum
    target.pools[-1].bytes[5, 3] ^= 1
    target.transport.verify(verify)
    changed = target.report()
    assert isinstance(changed, PagesVerified)
    assert changed.checksum != written.checksum


def test_the_address_has_whole_pages_and_the_part_of_each_rank(engines: tuple[Engine, Engine]) -> None:
    address, quarter = engines[1].address, WHOLE.page_bytes // 4
    assert (address.layout, address.page_bytes) == (WHOLE.describe(), WHOLE.page_bytes)
    assert address.location == address.parts[0].location
    assert [(part.offset, part.num_bytes) for part in address.parts] == [(rank * quarter, quarter) for rank in range(4)]
    assert len({part.location for part in address.parts}) == 4


def test_no_page_is_written_any_more_when_one_rank_has_ended(engines: tuple[Engine, Engine]) -> None:
    source, target = engines
    assert isinstance(source.write_to(target.address), WritesCompleted)
    before = target.pages()[:, : WHOLE.page_bytes // 4].copy()
    target.pools[3].close()
    source.pools[0].bytes[3] ^= 1
    refused = source.write_to(target.address, "again")
    assert isinstance(refused, WritesFailed)
    assert "the peer has ended" in refused.message
    np.testing.assert_array_equal(target.pools[0].bytes, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"location": "/etc/passwd"}, "not in our runtime folder"),
        ({"location": "pool-0"}, "not in our runtime folder"),
        ({"num_bytes": 8}, "but its address claims"),
        ({"offset": 8}, "do not make up a page"),
    ],
)
def test_a_part_that_is_not_as_its_address_says_is_refused_before_a_byte_is_written(
    engines: tuple[Engine, Engine], changes: dict[str, Any], message: str
) -> None:
    source, target = engines
    *good, last = target.address.parts
    bad = msgspec.structs.replace(target.address, parts=(*good, msgspec.structs.replace(last, **changes)))
    refused = source.write_to(bad)
    assert isinstance(refused, WritesFailed)
    assert message in refused.message
    assert not target.pages().any()


def test_a_transport_that_copies_whole_pages_refuses_parts(engines: tuple[Engine, Engine], tmp_path: Path) -> None:
    """Its address is not offered, and an address that claims parts is not written to."""
    assert "copies whole pages" in SHM.obstacle_for(engines[0].pools[0])
    pool, woken = DevicePool.create(WHOLE, NUM_PAGES, device=CPU, directory=tmp_path), threading.Event()
    watch = EpochWatch(tmp_path)
    context = TransportContext(
        pool=pool,
        address=pool.address,
        runtime_dir=tmp_path,
        watch=watch,
        wakeup=woken.set,
        advertised_host="127.0.0.1",
    )
    transport = shm_transport(context)
    transport.write(WritePages(handoff_id=HandoffId("h"), pool=engines[1].address, page_ids=(0,), peer_page_ids=(0,)))
    assert woken.wait(timeout=60)
    [refused] = transport.poll()
    assert isinstance(refused, WritesFailed)
    assert "this transport copies whole pages" in refused.message
    transport.close()
    pool.close()


# ---------------------------------------------------------------- CUDA IPC, without a GPU


def exported(num_bytes: int) -> OpenedPool:
    memory = ExportedMemory(num_bytes=num_bytes, handle=bytes(HANDLE_BYTES))
    return OpenedPool([OpenedPart(memory, offset=0, num_bytes=num_bytes)])


def address_of(*ranges: tuple[int, int]) -> PoolAddress:
    parts = tuple(PoolPart(location="/r/p", offset=offset, num_bytes=num_bytes) for offset, num_bytes in ranges)
    return PoolAddress(
        transport="cuda-ipc", location="/r/p", num_pages=1, page_bytes=32, layout="l", device="cuda", parts=parts
    )


def test_the_memory_of_ranks_is_joined_at_the_offsets_of_the_address() -> None:
    joined = join_parts(address_of((16, 16), (0, 16), (16, 16)), [exported(16)] * 3)
    assert [(part.offset, part.num_bytes) for part in joined.parts] == [(16, 16), (0, 16), (16, 16)]


@pytest.mark.parametrize("ranges", [((0, 16),), ((0, 12), (12, 20))])
def test_memory_that_makes_no_page_of_words_is_refused(ranges: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(Unavailable, match=r"do not make up a page|not whole words"):
        join_parts(address_of(*ranges), [exported(16)] * len(ranges))


def test_cuda_ipc_is_offered_only_when_rank_0_has_opened_the_memory_of_all_ranks() -> None:
    pool = SimpleNamespace(
        tensor=SimpleNamespace(device=torch.device("cuda")), address=address_of((0, 32)), export_error=""
    )
    for has_all_ranks in (False, True):
        pool.has_all_ranks = has_all_ranks
        assert (CUDA_IPC.obstacle_for(pool) == "") is has_all_ranks  # type: ignore[arg-type]
