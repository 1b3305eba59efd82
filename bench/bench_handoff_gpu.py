"""How long does a handoff of 2,048 tokens between two GPU workers take? Needs a CUDA device, measures both ways on two.

The pages of Qwen2-7B (bf16, 16 tokens each), scattered over both pools, through the transport that engines use, between
two processes: from the write job to the report that all pages are written and summed, then the checksum of the peer.
The baseline is one copy of as many bytes by torch, in this process. Checksums that differ are counted.

    python bench/bench_handoff_gpu.py [--tokens 2048] [--repetitions 50] [--json FILE]
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
from pathlib import Path

import msgspec
import torch

from json_report import write_report
from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DevicePool
from kvist.plan.transfers import PagesVerified, VerifyPages, WritePages, WritesCompleted
from kvist.request import HandoffId
from kvist.transfer import TransferReport, make_transports
from kvist.wire import PoolAddress

LAYOUT = PageLayout(num_kv_heads=4, num_layers=28, page_size=16, head_dim=128, dtype="bfloat16")
WARM_UP = 5
TIMEOUT_S = 60.0
Row = dict[str, str | float | bool]


class Side:
    """One side of the handoff: a pool and its transport."""

    def __init__(self, device: torch.device, num_pages: int, runtime_dir: Path) -> None:
        self.pool = DevicePool.create(LAYOUT, num_pages, device=device, directory=runtime_dir)
        self._woken = threading.Event()
        self.transport = make_transports(self.pool, runtime_dir=runtime_dir, wakeup=self._woken.set)
        self.address = self.transport.addresses[0]

    def wait(self) -> TransferReport:
        return self.wait_for_reports()[-1]

    def wait_for_reports(self) -> list[TransferReport]:
        """Return the reports since the last call, at least one."""
        while True:
            if not self._woken.wait(TIMEOUT_S):
                raise SystemExit(f"no report within {TIMEOUT_S:g} s")
            self._woken.clear()
            if reports := self.transport.poll():
                return reports

    def verify(self, page_ids: tuple[int, ...]) -> tuple[str, float]:
        """Return the checksum, and the milliseconds it took."""
        start_s = time.perf_counter()
        name = self.address.transport
        self.transport.verify(VerifyPages(handoff_id=HandoffId("h"), page_ids=page_ids, transport=name))
        report = self.wait()
        assert isinstance(report, PagesVerified)
        return report.checksum, 1e3 * (time.perf_counter() - start_s)

    def close(self) -> None:
        self.transport.close()
        self.pool.close()


def be_the_peer(device: str, num_pages: int, runtime_dir: Path) -> None:
    """Print the address of the pool, then (checksum, milliseconds) for each line of page ids."""
    end = Side(torch.device(device), num_pages, runtime_dir)
    print(msgspec.json.encode(end.address).decode(), flush=True)
    for line in sys.stdin:
        print(json.dumps(end.verify(tuple(json.loads(line)))), flush=True)
    end.close()


def measure(peer_device: str, num_pages: int, repetitions: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        runtime_dir = Path(folder).resolve()
        command = [sys.executable, __file__, "--peer", peer_device, "--pool-pages", str(2 * num_pages)]
        with subprocess.Popen(
            [*command, "--runtime-dir", folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as peer:
            assert peer.stdin is not None
            assert peer.stdout is not None
            end = Side(torch.device("cuda", 0), 2 * num_pages, runtime_dir)
            end.pool.tensor.normal_()
            torch.cuda.synchronize()
            address = msgspec.json.decode(peer.stdout.readline(), type=PoolAddress)
            dice, rows = random.Random(0), []
            for repetition in range(WARM_UP + repetitions):
                ids, peer_ids = (tuple(dice.sample(range(2 * num_pages), num_pages)) for _ in range(2))
                job = WritePages(
                    handoff_id=HandoffId(str(repetition)), pool=address, page_ids=ids, peer_page_ids=peer_ids
                )
                start_s = time.perf_counter()
                end.transport.write(job)
                report = end.wait()
                write_ms = 1e3 * (time.perf_counter() - start_s)
                if not isinstance(report, WritesCompleted):
                    raise SystemExit(f"the handoff failed: {report}")
                peer.stdin.write(json.dumps(peer_ids) + "\n")
                peer.stdin.flush()
                checksum, verify_ms = json.loads(peer.stdout.readline())
                row: Row = {"write_ms": write_ms, "verify_ms": verify_ms, "equal": checksum == report.checksum}
                rows.append({**row, "copy_ms": plain_copy_ms(peer_device, num_pages * LAYOUT.page_bytes)})
            end.close()
            peer.stdin.close()
    return rows[WARM_UP:]


def plain_copy_ms(device: str, num_bytes: int) -> float:
    source = torch.empty(num_bytes, dtype=torch.uint8, device=torch.device("cuda", 0))
    target = torch.empty(num_bytes, dtype=torch.uint8, device=torch.device(device))
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(target.device)
    start_s = time.perf_counter()
    target.copy_(source)
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(target.device)
    return 1e3 * (time.perf_counter() - start_s)


def print_table(results: dict[str, list[Row]], num_bytes: int) -> None:
    print(f"{'':>10}  {'':>8}  {'p50 ms':>8}  {'p90 ms':>8}  {'p99 ms':>8}  {'GB/s':>8}")
    for where, rows in results.items():
        for name in ("write_ms", "verify_ms", "copy_ms"):
            cuts = statistics.quantiles([float(row[name]) for row in rows], n=100, method="inclusive")
            p50, p90, p99 = cuts[49], cuts[89], cuts[98]
            times = "  ".join(f"{value:>8.3f}" for value in (p50, p90, p99))
            print(f"{where:>10}  {name[:-3]:>8}  {times}  {num_bytes / p50 / 1e6:>8.0f}")
        print(f"{where:>10}  {sum(not row['equal'] for row in rows)} of {len(rows)} checksums differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--pool-pages", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--runtime-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        be_the_peer(args.peer, args.pool_pages, args.runtime_dir)
        return
    if not torch.cuda.is_available():
        print("bench_handoff_gpu needs a CUDA device, and torch sees none: nothing measured")
        return
    num_pages = -(-args.tokens // LAYOUT.page_size)
    num_bytes = num_pages * LAYOUT.page_bytes
    results = {"same GPU": measure("cuda:0", num_pages, args.repetitions)}
    if torch.cuda.device_count() > 1:
        results["two GPUs"] = measure("cuda:1", num_pages, args.repetitions)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {num_pages} pages, {num_bytes / 1e6:.1f} MB")
    print_table(results, num_bytes)
    if args.json:
        write_report(args.json, args, num_bytes=num_bytes, rows=results)


if __name__ == "__main__":
    main()
