"""How fast does Kvist write pages to a process that may be on another host, beside Mooncake alone, and what do the
checksums cost?

A source in this process writes pages through the transport `mooncake` into the pool of another process, over loopback
TCP: from the write job to the report that all pages are written and summed. These writes take
turns with two others, in an order that changes from round to round:

    mooncake       the library's own blocking batch write of as many bytes, by an engine of its own, to the same process
    no digests     the same transport, with digests that are not computed

Ratios are medians over the rounds, of times in the same round, so a machine that is busy for a while changes little.
CPU time is that of both processes together, over all rounds: it hardly depends on the load of the machine. The digests'
CPU time is measured alone. The exit
status is 1 if the ratio of the rates is below the aim of 0.85. For figures use an idle machine of four cores or more.

    python bench/bench_transfer.py [--tokens 4096] [--rounds 40] [--scattered] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
import torch

import kvist.transfer.mooncake as transport
from json_report import write_report
from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DevicePool
from kvist.mooncake.engine import open_engine
from kvist.mooncake.requirements import Network, library_obstacle, load
from kvist.plan.transfers import WritePages, WritesCompleted
from kvist.request import EpochId, HandoffId
from kvist.transfer import Transports, make_transports
from kvist.transfer.host_pages import digests_of
from kvist.transfer.mooncake_options import HANDOFFS
from kvist.wire import PoolAddress

LAYOUT = PageLayout(num_kv_heads=4, num_layers=28, page_size=16, head_dim=128, dtype="bfloat16")  # Qwen2-7B
SOURCE = EpochId("source")
AIM = 0.85
WARM_UP = 3
HERE = "127.0.0.1"
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def make_pool(num_pages: int, runtime_dir: Path) -> DevicePool:
    return DevicePool.create(LAYOUT, num_pages, device=torch.device("cpu"), directory=runtime_dir)


def serve(num_pages: int, runtime_dir: Path) -> None:
    """Be the target: print the address of the pool and the place of memory for the baseline, and wait for the end of
    the input."""
    pool = make_pool(num_pages, runtime_dir)
    transports = make_transports(pool, runtime_dir=runtime_dir, wakeup=lambda: None, names="mooncake")
    [address] = transports.addresses_for(SOURCE)
    raw = np.ones(num_pages * LAYOUT.page_bytes, np.uint8)
    share = open_engine(Network(host=HERE), HANDOFFS)
    share.register(raw.ctypes.data, raw.nbytes)
    print(json.dumps([msgspec.json.encode(address).decode(), raw.ctypes.data]), flush=True)
    sys.stdin.read()
    share.close()
    transports.close()
    pool.close()


class Target:
    """The other process."""

    def __init__(self, runtime_dir: Path, num_tokens: int) -> None:
        command = [sys.executable, __file__, "--serve", str(runtime_dir), "--tokens", str(num_tokens)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        encoded, self.raw_address = json.loads(self.process.stdout.readline())
        self.address = msgspec.json.decode(encoded, type=PoolAddress)
        self.session = self.address.location.partition("/")[0]

    def cpu_s(self) -> float:
        """Return the CPU time of both processes so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return time.process_time() + (int(fields[11]) + int(fields[12])) * TICK_S

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


class Source:
    """Our end, with both ways to write."""

    def __init__(self, pool: DevicePool, transports: Transports, woken: threading.Event, target: Target) -> None:
        self._pool, self._transports, self._woken, self._target = pool, transports, woken, target
        self._num_written = 0
        self._library = load("mooncake.engine").TransferEngine()
        assert self._library.initialize(HERE, "P2PHANDSHAKE", "tcp", "") == 0
        assert self._library.register_memory(pool.tensor.data_ptr(), pool.bytes.nbytes) == 0

    def write(self, page_ids: tuple[int, ...]) -> None:
        self._num_written += 1
        job = WritePages(
            handoff_id=HandoffId(f"h{self._num_written}"),
            pool=self._target.address,
            page_ids=page_ids,
            peer_page_ids=page_ids,
        )
        self._transports.write(job)
        while not (reports := self._transports.poll()):
            self._woken.wait()
            self._woken.clear()
        if not isinstance(reports[-1], WritesCompleted):
            raise SystemExit(f"a write failed: {reports[-1]}")

    def write_without_digests(self, page_ids: tuple[int, ...]) -> None:
        with mock.patch.object(transport, "digests_of", lambda rows: [bytes(16) for _ in rows]):
            self.write(page_ids)

    def digests_cpu_s(self, page_ids: tuple[int, ...]) -> float:
        """Return the CPU time of the digests of these pages."""
        start_s = time.thread_time()
        digests_of(self._pool.bytes[page_id] for page_id in page_ids)
        return time.thread_time() - start_s

    def write_by_mooncake(self, page_ids: tuple[int, ...]) -> None:
        page_bytes, here, there = LAYOUT.page_bytes, self._pool.tensor.data_ptr(), self._target.raw_address
        starts, sizes = [page_id * page_bytes for page_id in page_ids], [page_bytes] * len(page_ids)
        if page_ids == tuple(range(len(page_ids))):
            starts, sizes = [0], [len(page_ids) * page_bytes]
        ours, theirs = [here + at for at in starts], [there + at for at in starts]
        if self._library.batch_transfer_sync_write(self._target.session, ours, theirs, sizes):
            raise SystemExit("a write of the baseline failed")


@dataclass
class Times:
    """Of one way to write, by round."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0  # of all rounds


def measure(source: Source, target: Target, page_ids: tuple[int, ...], num_rounds: int) -> dict[str, Times]:
    ways: dict[str, Callable[[tuple[int, ...]], None]] = {
        "kvist": source.write,
        "mooncake": source.write_by_mooncake,
        "no digests": source.write_without_digests,
    }
    for _ in range(WARM_UP):
        for write in ways.values():
            write(page_ids)
    times = {name: Times() for name in ways}
    order, names = random.Random(0), list(ways)
    for _ in range(num_rounds):
        order.shuffle(names)
        for name in names:
            start_cpu_s, start_s = target.cpu_s(), time.perf_counter()
            ways[name](page_ids)
            times[name].wall_s.append(time.perf_counter() - start_s)
            times[name].cpu_s += target.cpu_s() - start_cpu_s
    return times


def row_of(times: dict[str, Times], digests_cpu_s: list[float], num_bytes: int) -> dict[str, float]:
    def gib_per_s(name: str) -> float:
        return round(num_bytes / 2**30 / statistics.median(times[name].wall_s), 3)

    def ratio(name: str, other: str) -> float:
        """Return how much longer `name` takes than `other`: the median over the rounds."""
        pairs = zip(times[name].wall_s, times[other].wall_s, strict=True)
        return statistics.median(one / two for one, two in pairs)

    def cpu_ms(name: str) -> float:
        return round(1000 * times[name].cpu_s / len(times[name].wall_s), 1)

    return {
        "kvist_gib_per_s": gib_per_s("kvist"),
        "mooncake_gib_per_s": gib_per_s("mooncake"),
        "ratio": round(ratio("mooncake", "kvist"), 3),
        "kvist_cpu_ms": cpu_ms("kvist"),
        "mooncake_cpu_ms": cpu_ms("mooncake"),
        "digests_time": round(ratio("kvist", "no digests") - 1, 4),
        "digests_cpu_ms": round(1000 * statistics.median(digests_cpu_s), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--scattered", action="store_true", help="no two pages are neighbours")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    num_pages = -(-args.tokens // LAYOUT.page_size)
    if args.serve is not None:
        serve(2 * num_pages, args.serve)
        return
    if reason := library_obstacle():
        raise SystemExit(reason)
    page_ids = tuple(range(num_pages))
    if args.scattered:
        page_ids = tuple(random.Random(0).sample(range(0, 2 * num_pages, 2), num_pages))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        runtime_dir = Path(folder).resolve()
        target = Target(runtime_dir, args.tokens)
        pool = make_pool(2 * num_pages, runtime_dir)
        pool.bytes[:] = np.random.default_rng(0).integers(0, 256, pool.bytes.shape, np.uint8)
        woken = threading.Event()
        transports = make_transports(pool, runtime_dir=runtime_dir, wakeup=woken.set, names="mooncake")
        try:
            source = Source(pool, transports, woken, target)
            times = measure(source, target, page_ids, args.rounds)
            digests_cpu_s = [source.digests_cpu_s(page_ids) for _ in range(args.rounds)]
        finally:
            transports.close()
            pool.close()
            target.close()
    row = {
        "tokens": args.tokens,
        "scattered": args.scattered,
        **row_of(times, digests_cpu_s, num_pages * LAYOUT.page_bytes),
    }
    print("  ".join(f"{key}={value}" for key, value in row.items()))
    if args.json is not None:
        rounds = {name: each.wall_s for name, each in times.items()}
        write_report(args.json, args, rows=[{**row, "rounds_s": rounds}])
    if row["ratio"] < AIM:
        raise SystemExit(f"the ratio {row['ratio']:.2f} is below {AIM}")


if __name__ == "__main__":
    main()
