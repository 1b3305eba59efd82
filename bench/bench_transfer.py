"""How fast does Kvist write pages to a process that may be on another host, and how fast does Mooncake alone?

A source in this process writes pages through the transport `mooncake` into the pool of another process, over loopback
TCP: from the write job to the report that all pages are written and summed. The baseline is Mooncake's own batch write
of as many bytes, to the same process. The two take turns, and the median of the ratio over all turns is compared with
the aim of 0.85; a lower one makes the exit status 1. Run it on an idle machine: on two cores, three threads take part.

    python bench/bench_transfer.py [--tokens 4096] [--repetitions 20] [--scattered] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch

from json_report import write_report
from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DevicePool
from kvist.plan.transfers import WritePages, WritesCompleted
from kvist.request import EpochId, HandoffId
from kvist.transfer import make_transports
from kvist.transfer.mooncake_engine import MooncakeOptions, mooncake_engine, obstacle
from kvist.wire import PoolAddress

LAYOUT = PageLayout(num_kv_heads=4, num_layers=28, page_size=16, head_dim=128, dtype="bfloat16")  # Qwen2-7B
SOURCE = EpochId("source")
AIM = 0.85
WARM_UP = 3
HERE = "127.0.0.1"


def make_pool(num_pages: int, runtime_dir: Path) -> DevicePool:
    return DevicePool.create(LAYOUT, num_pages, device=torch.device("cpu"), directory=runtime_dir)


def serve(num_pages: int, runtime_dir: Path) -> None:
    """Be the target: print the address of the pool and the place of memory for the baseline, and wait for the end of
    the input."""
    pool = make_pool(num_pages, runtime_dir)
    transports = make_transports(pool, runtime_dir=runtime_dir, wakeup=lambda: None, names="mooncake")
    [address] = transports.addresses_for(SOURCE)
    raw = np.zeros(num_pages * LAYOUT.page_bytes, np.uint8)
    mooncake_engine(MooncakeOptions(), HERE).register(raw.ctypes.data, raw.nbytes)
    print(json.dumps([msgspec.json.encode(address).decode(), raw.ctypes.data]), flush=True)
    sys.stdin.read()
    transports.close()
    pool.close()


def gib_per_s(write: Callable[[], None], num_bytes: int) -> float:
    start_s = time.perf_counter()
    write()
    return num_bytes / (time.perf_counter() - start_s) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--scattered", action="store_true", help="no two pages are neighbours")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    num_pages = -(-args.tokens // LAYOUT.page_size)
    if args.serve is not None:
        serve(2 * num_pages, args.serve)
        return
    if reason := obstacle(MooncakeOptions()):
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        ours, raw = measure(Path(folder).resolve(), num_pages, args)
    ratio = statistics.median(one / other for one, other in zip(ours, raw, strict=True))
    row = {
        "tokens": args.tokens,
        "scattered": args.scattered,
        "kvist_gib_per_s": round(statistics.median(ours), 3),
        "mooncake_gib_per_s": round(statistics.median(raw), 3),
        "ratio": round(ratio, 3),
    }
    print("  ".join(f"{key}={value}" for key, value in row.items()))
    if args.json is not None:
        write_report(args.json, args, rows=[row])
    if ratio < AIM:
        raise SystemExit(f"the ratio {ratio:.2f} is below {AIM}")


def measure(runtime_dir: Path, num_pages: int, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    command = [sys.executable, __file__, "--serve", str(runtime_dir), "--tokens", str(args.tokens)]
    target = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert target.stdin is not None
    assert target.stdout is not None
    pool = make_pool(2 * num_pages, runtime_dir)
    pool.bytes[:] = np.random.default_rng(0).integers(0, 256, pool.bytes.shape, np.uint8)
    woken = threading.Event()
    transports = make_transports(pool, runtime_dir=runtime_dir, wakeup=woken.set, names="mooncake")
    try:
        encoded, raw_address = json.loads(target.stdout.readline())
        address = msgspec.json.decode(encoded, type=PoolAddress)
        engine = mooncake_engine(MooncakeOptions(), HERE)
        session = address.location.partition("/")[0]
        page_ids = tuple(range(num_pages))
        if args.scattered:
            page_ids = tuple(random.Random(0).sample(range(0, 2 * num_pages, 2), num_pages))

        def write_raw() -> None:
            starts = [page_id * LAYOUT.page_bytes for page_id in page_ids]
            sizes = [LAYOUT.page_bytes] * num_pages
            if not args.scattered:
                starts, sizes = [0], [num_pages * LAYOUT.page_bytes]
            here = pool.tensor.data_ptr()
            if not engine.write(session, [here + at for at in starts], [raw_address + at for at in starts], sizes):
                raise SystemExit("a write of the baseline failed")

        def write_ours(handoff_id: str) -> None:
            job = WritePages(handoff_id=HandoffId(handoff_id), pool=address, page_ids=page_ids, peer_page_ids=page_ids)
            transports.write(job)
            while not (reports := transports.poll()):
                woken.wait()
                woken.clear()
            if not isinstance(reports[-1], WritesCompleted):
                raise SystemExit(f"a write failed: {reports[-1]}")

        num_bytes = num_pages * LAYOUT.page_bytes
        ours: list[float] = []
        raw: list[float] = []
        for number in range(WARM_UP + args.repetitions):
            ours.append(gib_per_s(lambda name=f"h{number}": write_ours(name), num_bytes))  # type: ignore[misc]
            raw.append(gib_per_s(write_raw, num_bytes))
        return ours[WARM_UP:], raw[WARM_UP:]
    finally:
        transports.close()
        pool.close()
        target.stdin.close()
        target.wait(timeout=30)


if __name__ == "__main__":
    main()
