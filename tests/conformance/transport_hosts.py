"""The hosts of the transport suite's engines: one process, one host's memory, or GPUs.

`Side` is one engine's transport and pool. A process cannot open GPU memory that it has exported itself, so every GPU
side except the source is a separate `gpu_peer.py`. The peers are kept from test to test, because each takes seconds to
start.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import torch

from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DevicePool
from kvist.mooncake.engine import MooncakeEngine, open_engine
from kvist.mooncake.requirements import Network
from kvist.plan.transfers import PagesVerified, VerifyPages, WritePages, WritesCompleted
from kvist.request import EpochId, HandoffId
from kvist.testing.inproc_transport import INPROC, InprocTransport, PoolDirectory
from kvist.transfer import OfferedTransport, TransferReport, Transport, Transports, make_transports
from kvist.transfer.checksum import PAGE_DIGEST_BYTES, fold
from kvist.transfer.device_pages import DevicePages
from kvist.transfer.epoch import EpochLock, EpochWatch
from kvist.transfer.host_pages import HostPages, Pages
from kvist.transfer.host_staged import StagedDevicePages, open_file
from kvist.transfer.mooncake_options import HANDOFFS
from kvist.transfer.same_host import SameHostTransport
from kvist.transfer.shm import map_file
from kvist.transfer.staging import ArrivalsFile
from kvist.wire import PoolAddress
from tests.conformance.gpu_peer import pool_on, transports_of

LAYOUT = PageLayout(num_kv_heads=2, num_layers=2, page_size=16, head_dim=8, dtype="float32")
NUM_PAGES = 12
DEVICE_PAGES_ON_A_CPU = "device pages on a CPU"
STAGED_DEVICE_PAGES = "host-staged to device pages on a CPU"


@dataclass
class Side:
    """One engine's transport and pool, with what it has reported so far."""

    epoch: EpochId
    address: PoolAddress
    transport: Transport
    woken: threading.Event
    kill: Callable[[], None]
    pages: Callable[[], Pages]  # as they are now, with those that have arrived and are not verified yet
    put: Callable[[Pages], None]
    digests: Callable[[Pages], list[bytes]]  # computed outside the transport where possible
    reports: list[TransferReport] = field(default_factory=list)
    page_digests: bytes = b""  # of the last report with any

    def wait_for(self, num_reports: int) -> list[TransferReport]:
        while len(self.reports) < num_reports:
            assert self.woken.wait(timeout=60), f"only {self.reports} arrived"
            self.woken.clear()
            for report in self.transport.poll():
                if isinstance(report, WritesCompleted) and report.page_digests:
                    assert len(report.page_digests) == report.num_pages * PAGE_DIGEST_BYTES
                    self.page_digests = report.page_digests
                    report = replace(report, page_digests=b"")  # tests compare the rest, for every transport
                self.reports.append(report)
        return self.reports

    def fill(self, seed: int) -> None:
        self.put(np.random.default_rng(seed).integers(0, 256, (NUM_PAGES, LAYOUT.page_bytes), np.uint8))

    def flip_a_bit(self, page_id: int) -> None:
        pages = self.pages().copy()
        pages[page_id, 17] ^= 1
        self.put(pages)

    def checksum(self, page_ids: tuple[int, ...]) -> str:
        return fold(self.digests(self.pages()[list(page_ids)]))


class Host(Protocol):
    """Makes engines of one kind."""

    def side(self, name: str) -> Side: ...

    def close(self) -> None: ...


def host_digests(pages: Pages) -> list[bytes]:
    return HostPages(pages).digests(range(len(pages)))


def device_digests(pages: Pages) -> list[bytes]:
    """Compute the digests with the kernel's twin."""
    return DevicePages(torch.from_numpy(pages)).digests(range(len(pages))) if len(pages) else []


def digests_of(transport: str) -> Callable[[Pages], list[bytes]]:
    """Return the function that computes the digests of pages in other processes, by the transport."""
    return host_digests if transport in ("host-staged", "mooncake") else device_digests


class InprocHost:
    def __init__(self) -> None:
        self.directory = PoolDirectory()

    def side(self, name: str) -> Side:
        epoch = EpochId(name)
        address = PoolAddress(
            transport=INPROC,
            location=name,
            num_pages=NUM_PAGES,
            page_bytes=LAYOUT.page_bytes,
            layout=LAYOUT.describe(),
        )
        pages = np.zeros((NUM_PAGES, LAYOUT.page_bytes), np.uint8)
        woken = threading.Event()
        transport = InprocTransport(address=address, pages=pages, directory=self.directory, wakeup=woken.set)
        return Side(
            epoch=epoch,
            address=address,
            transport=transport,
            woken=woken,
            kill=lambda: self.directory.kill(epoch),
            pages=lambda: pages,
            put=lambda new: np.copyto(pages, new),
            digests=host_digests,
        )

    def close(self) -> None: ...


class MappedFile:
    """A pool's file mapped at an address, like GPU memory."""

    def __init__(self, descriptor: int, address: PoolAddress) -> None:
        self._pages = map_file(descriptor, address)
        self.offset, self.num_bytes = 0, address.page_bytes
        self.parts = [self]

    def address_on(self, device: torch.device) -> int:
        assert device.type == "cpu"
        return self._pages.ctypes.data


def with_arrivals(pages: Pages, arrivals: Path | None) -> Pages:
    """Lay the pages that wait in a file of arrivals over those of the pool."""
    if arrivals is None:
        return pages
    arrived = np.fromfile(arrivals, np.uint8).reshape(pages.shape)
    return np.where(arrived.any(axis=1, keepdims=True), arrived, pages)


class CpuHost:
    """Pools on a CPU, with a transport of the door; or `DEVICE_PAGES_ON_A_CPU`, written like GPU memory; or
    `STAGED_DEVICE_PAGES`, which receive pages like GPU memory through a file of arrivals."""

    def __init__(self, runtime_dir: Path, transport: str) -> None:
        self.runtime_dir = runtime_dir
        self.transport = transport
        self.closing: list[Callable[[], None]] = []

    def side(self, name: str) -> Side:
        epoch = EpochId(name)
        lock = EpochLock(self.runtime_dir, epoch)
        pool = DevicePool.create(LAYOUT, NUM_PAGES, device=torch.device("cpu"), directory=self.runtime_dir)
        woken = threading.Event()
        transport, close_more = self._transport(pool, woken)
        address, pages = transport.addresses[0], pool.bytes
        arrivals = None if address.location == pool.address.location else Path(address.location)

        def kill() -> None:
            transport.close()
            close_more()
            pool.close()
            lock.close()

        self.closing.append(kill)
        return Side(
            epoch=epoch,
            address=address,
            transport=transport,
            woken=woken,
            kill=kill,
            pages=lambda: with_arrivals(pages, arrivals),
            put=lambda new: np.copyto(pages, new),
            digests=device_digests if self.transport == DEVICE_PAGES_ON_A_CPU else host_digests,
        )

    def _transport(self, pool: DevicePool, woken: threading.Event) -> tuple[Transports, Callable[[], None]]:
        """Return the transports, and what else is to be closed."""
        runtime_dir, wakeup = self.runtime_dir, woken.set
        if self.transport not in (DEVICE_PAGES_ON_A_CPU, STAGED_DEVICE_PAGES):
            return make_transports(pool, runtime_dir=runtime_dir, wakeup=wakeup, names=self.transport), lambda: None
        watch = EpochWatch(runtime_dir)
        offered: OfferedTransport
        if self.transport == STAGED_DEVICE_PAGES:
            arrivals = ArrivalsFile(runtime_dir, NUM_PAGES, LAYOUT.page_bytes)
            staged = StagedDevicePages(pool.tensor, arrivals)
            staged.pages_at_once = 2
            address = msgspec.structs.replace(pool.address, transport="host-staged", location=str(arrivals.path))
            offered = SameHostTransport(
                address=address, pages=staged, map_pool=open_file, runtime_dir=runtime_dir, watch=watch, wakeup=wakeup
            )
            return Transports({"host-staged": offered}, watch=watch, wakeup=wakeup), arrivals.close
        pages = DevicePages(pool.tensor)
        pages.pages_at_once = 2
        offered = SameHostTransport(
            address=pool.address, pages=pages, map_pool=MappedFile, runtime_dir=runtime_dir, watch=watch, wakeup=wakeup
        )
        return Transports({pool.address.transport: offered}, watch=watch, wakeup=wakeup), lambda: None

    def close(self) -> None:
        for kill in self.closing:
            kill()


class MixedHost:
    """Two kinds of pools on a CPU: the source has one, all others the other."""

    def __init__(self, runtime_dir: Path, source: str, target: str) -> None:
        self._source, self._target = CpuHost(runtime_dir, source), CpuHost(runtime_dir, target)

    def side(self, name: str) -> Side:
        return (self._source if name == "source" else self._target).side(name)

    def close(self) -> None:
        self._source.close()
        self._target.close()


# ---------------------------------------------------------------- GPUs


class GpuPeer:
    """A child process with a pool on one GPU, driven by JSON lines. As a `Transport` it supports only `verify`."""

    def __init__(self, runtime_dir: Path, epoch: EpochId, device: str, transport: str) -> None:
        script = Path(__file__).parent / "gpu_peer.py"
        layout = msgspec.json.encode(LAYOUT).decode()
        arguments = [str(runtime_dir), epoch, device, str(NUM_PAGES), layout, transport]
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.epoch = epoch
        self.device = device
        self.name = transport
        self.woken = threading.Event()
        self._reports: list[TransferReport] = []
        self.address = msgspec.json.decode(self._answer(), type=PoolAddress)

    def ask(self, **command: object) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the GPU peer has ended: see its standard error"
        return line

    def pages(self) -> Pages:
        flat = np.frombuffer(bytes.fromhex(self.ask(do="pages")), np.uint8)
        return flat.reshape(NUM_PAGES, LAYOUT.page_bytes)

    def put(self, pages: Pages) -> None:
        self.ask(do="put", pages=pages.tobytes().hex())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=60)

    def verify(self, job: VerifyPages) -> None:
        checksum = json.loads(self.ask(do="verify", page_ids=job.page_ids))
        self._reports.append(PagesVerified(handoff_id=job.handoff_id, checksum=checksum))
        self.woken.set()

    def poll(self) -> list[TransferReport]:
        reports, self._reports = self._reports, []
        return reports

    def write(self, job: WritePages) -> None:
        raise NotImplementedError

    def stop(self, handoff_id: HandoffId) -> None:
        raise NotImplementedError

    def peer_is_dead(self, epoch: EpochId) -> bool:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class GpuPeers:
    """The peers of one test session and the runtime folder that they share with the sources."""

    def __init__(self, runtime_dir: Path) -> None:
        self.runtime_dir = runtime_dir
        self._peers: list[GpuPeer] = []
        self._in_use: list[GpuPeer] = []
        self._mooncake: MooncakeEngine | None = None

    def keep_mooncake(self) -> None:
        """Keep Mooncake's engine of this process from test to test: its end takes a second."""
        if self._mooncake is None:
            self._mooncake = open_engine(Network(host="127.0.0.1"), HANDOFFS)

    def take(self, device: str, transport: str) -> GpuPeer:
        """Return a running peer whose pages are zero."""
        for peer in self._peers:
            is_such = (peer.device, peer.name) == (device, transport)
            if is_such and peer not in self._in_use and peer.process.poll() is None:
                break
        else:
            peer = GpuPeer(self.runtime_dir, EpochId(f"peer{len(self._peers)}"), device, transport)
            self._peers.append(peer)
        self._in_use.append(peer)
        peer.put(np.zeros((NUM_PAGES, LAYOUT.page_bytes), np.uint8))
        return peer

    def give_back_all(self) -> None:
        self._in_use.clear()

    def close(self) -> None:
        for peer in self._peers:
            peer.kill()
        if self._mooncake is not None:
            self._mooncake.close()


class GpuHost:
    """The source is in this process, its peers are in others."""

    def __init__(self, peers: GpuPeers, transport: str, *, source_device: str, peer_device: str) -> None:
        self._peers = peers
        self._source_device = source_device
        self._transport = transport
        self._peer_device = peer_device
        self._closing: list[Callable[[], None]] = []

    def side(self, name: str) -> Side:
        if name != "source":
            peer = self._peers.take(self._peer_device, self._transport)
            return Side(
                epoch=peer.epoch,
                address=peer.address,
                transport=peer,
                woken=peer.woken,
                kill=peer.kill,
                pages=peer.pages,
                put=peer.put,
                digests=digests_of(self._transport),
            )
        runtime_dir, woken = self._peers.runtime_dir, threading.Event()
        lock = EpochLock(runtime_dir, EpochId(name))
        if self._transport == "mooncake":
            self._peers.keep_mooncake()
        device, name_of_transport = self._source_device, self._transport
        pool = pool_on(device, LAYOUT, NUM_PAGES, runtime_dir)
        transport, arrivals = transports_of(pool, device, runtime_dir, woken.set, name_of_transport)
        address = transport.addresses[0]
        memory = pool.tensor.view(torch.uint8).view(NUM_PAGES, -1)

        def put(pages: Pages) -> None:
            memory.copy_(torch.from_numpy(pages))
            if memory.is_cuda:
                torch.cuda.synchronize()

        self._closing += [transport.close, pool.close, lock.close]
        return Side(
            epoch=EpochId(name),
            address=address,
            transport=transport,
            woken=woken,
            kill=lambda: None,
            pages=lambda: with_arrivals(memory.cpu().numpy(), arrivals),
            put=put,
            digests=digests_of(self._transport),
        )

    def close(self) -> None:
        for close in self._closing:
            close()
        self._peers.give_back_all()
