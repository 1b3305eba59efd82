"""How fast are page copies between a GPU and the host tier, compared with plain copies over the same link? Needs CUDA.

The engine's `PageMover` copies jobs of Qwen2-7B pages (bf16, 16 tokens, 917,504 bytes each) between a device pool and a
pinned host pool: pages that are contiguous on both sides (one copy a job), and pages scattered over both pools (one
copy each). Loads alone, backups alone, and both at once, timed from the first job to the last report.

The baseline, measured between them, is one copy of as many bytes from or to one pinned buffer, or both at once on two
streams. Afterwards every copied byte is compared.

    python bench/bench_moves_gpu.py [--pages 1024] [--repetitions 10] [--json FILE]
    python bench/bench_moves_gpu.py --device cpu --pages 64        # a smoke test: there is no link to measure
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from json_report import write_report
from kvist.clock import MonotonicClock
from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DevicePool
from kvist.memory.host_pool import HostPool
from kvist.memory.page_copier import PageMover
from kvist.plan.tiers import BackUpPages, LoadPages, PagesForgotten

LAYOUT = PageLayout(num_kv_heads=4, num_layers=28, page_size=16, head_dim=128, dtype="bfloat16")
JOB_PAGES = (8, 128)  # the pages of 128 tokens, and of 2048
WARM_UP = 2
TIMEOUT_S = 60.0
BAR = 0.9
DIRECTIONS = ("loads", "backups", "both")
Times = dict[tuple[str, int, str], list[float]]  # (which pages, pages a job, direction) → seconds


class Pools:
    """A device pool and a host pool of the same size; one half of each is for loads, the other for backups."""

    def __init__(self, num_pages: int, device: torch.device, runtime_dir: Path) -> None:
        self.num_pages = num_pages  # copied in each direction
        self.device = device
        self._device_pool = DevicePool.create(LAYOUT, 2 * num_pages, device=device, directory=runtime_dir)
        self._host_pool = HostPool(2 * num_pages, LAYOUT.page_bytes, pinned=device.type == "cuda")
        self._woken = threading.Event()
        self._mover = PageMover(self._device_pool, self._host_pool, wakeup=self._woken.set, clock=MonotonicClock())
        self._last_job_id = 0

    @property
    def on_device(self) -> Tensor:
        return self._device_pool.tensor.view(2 * self.num_pages, -1).view(torch.uint8)

    @property
    def on_host(self) -> Tensor:
        return self._host_pool.tensor

    def page_ids(self, pattern: str, dice: random.Random) -> list[int]:
        """Page ids in either pool: the first half is for loads, the second for backups."""
        ids = list(range(2 * self.num_pages))
        if pattern == "scattered":
            dice.shuffle(ids)
        return ids

    def move(self, direction: str, device_ids: list[int], host_ids: list[int], job_pages: int) -> None:
        """Run the jobs; return when all are reported."""
        half, waiting = self.num_pages, 0
        for start in range(0, half, job_pages):
            loaded, backed_up = slice(start, start + job_pages), slice(half + start, half + start + job_pages)
            if direction != "backups":
                self._mover.start(
                    LoadPages(
                        job_id=self._next_id(),
                        host_slots=tuple(host_ids[:half][loaded]),
                        page_ids=tuple(device_ids[:half][loaded]),
                    )
                )
                waiting += 1
            if direction != "loads":
                self._mover.start(
                    BackUpPages(
                        job_id=self._next_id(),
                        page_ids=tuple(device_ids[backed_up]),
                        host_slots=tuple(host_ids[backed_up]),
                    )
                )
                waiting += 1
        while waiting:
            if not self._woken.wait(TIMEOUT_S):
                raise SystemExit(f"no report within {TIMEOUT_S:g} s")
            self._woken.clear()
            reports = self._mover.poll()
            if not all(isinstance(report, PagesForgotten) or report.ok for report in reports):
                raise SystemExit("a copy failed: see the log above")
            waiting -= len(reports)

    def differing_pages(self, device_ids: list[int], host_ids: list[int]) -> int:
        """Return how many of these pairs of pages differ in any byte."""
        return sum(
            not torch.equal(self.on_device[page], self.on_host[slot].to(self.device))
            for page, slot in zip(device_ids, host_ids, strict=True)
        )

    def close(self) -> None:
        self._mover.close()
        self._host_pool.close()
        self._device_pool.close()

    def _next_id(self) -> int:
        self._last_job_id += 1
        return self._last_job_id


class PlainCopies:
    """One buffer on the device and one on the host, for each direction."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._device = device
        self._pairs = {
            name: (
                torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_gpu),
                torch.zeros(num_bytes, dtype=torch.uint8, device=device),
            )
            for name in ("loads", "backups")
        }
        self._streams: dict[str, torch.cuda.Stream | None] = dict.fromkeys(self._pairs)
        if on_gpu:
            self._streams = {name: torch.cuda.Stream(device) for name in self._pairs}  # type: ignore[no-untyped-call]

    def copy(self, direction: str) -> None:
        for name, (host, device) in self._pairs.items():
            if direction in (name, "both"):
                source, target = (host, device) if name == "loads" else (device, host)
                with torch.cuda.stream(self._streams[name]):
                    target.copy_(source, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def seconds(call: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def measure(pools: Pools, plain: PlainCopies, repetitions: int) -> tuple[Times, int]:
    """Return the times, and how many pages differ at the end."""
    dice, times, num_differing = random.Random(0), Times(), 0
    for repetition in range(WARM_UP + repetitions):
        for direction in DIRECTIONS:
            measured = {("plain", pools.num_pages, direction): seconds(partial(plain.copy, direction))}
            for pattern in ("contiguous", "scattered"):
                for job_pages in JOB_PAGES:
                    device_ids, host_ids = (pools.page_ids(pattern, dice) for _ in range(2))
                    measured[pattern, job_pages, direction] = seconds(
                        partial(pools.move, direction, device_ids, host_ids, job_pages)
                    )
                    if repetition == 0:
                        half = pools.num_pages
                        moved = {"loads": slice(half), "backups": slice(half, None), "both": slice(None)}[direction]
                        num_differing += pools.differing_pages(device_ids[moved], host_ids[moved])
            if repetition >= WARM_UP:
                for key, value in measured.items():
                    times.setdefault(key, []).append(value)
    return times, num_differing


def print_table(times: Times, num_pages: int) -> None:
    num_bytes = num_pages * LAYOUT.page_bytes
    print(
        f"{'pages':>12}  {'a job':>6}  {'':>8}  {'p50 ms':>8}  {'p90 ms':>8}  {'GB/s':>6}  "
        f"{'of plain':>8}  {'µs/page':>8}",
    )
    for (pattern, job_pages, direction), found in sorted(times.items(), key=lambda item: DIRECTIONS.index(item[0][2])):
        p50, p90 = statistics.median(found), statistics.quantiles(found, n=10, method="inclusive")[-1]
        moved = num_bytes * (2 if direction == "both" else 1)
        ratio = statistics.median(times["plain", num_pages, direction]) / p50
        verdict = "" if pattern == "plain" else ("met" if ratio >= BAR else f"below {BAR:.0%}")
        print(
            f"{pattern:>12}  {job_pages:>6}  {direction:>8}  {1e3 * p50:>8.2f}  {1e3 * p90:>8.2f}  "
            f"{moved / p50 / 1e9:>6.1f}  {ratio:>8.1%}  {1e6 * p50 / num_pages:>8.1f}  {verdict}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--pages", type=int, default=1024, help="pages copied in each direction in one repetition")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench_moves_gpu needs a CUDA device, and torch sees none: nothing measured")
        return
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        pools = Pools(args.pages, device, Path(folder).resolve())
        try:
            for pool in (pools.on_host, pools.on_device):  # different contents, so that a missing copy is noticed
                pool.view(torch.int64).random_()
            if device.type == "cuda":
                torch.cuda.synchronize()
            plain = PlainCopies(args.pages * LAYOUT.page_bytes, device)
            times, num_differing = measure(pools, plain, args.repetitions)
        finally:
            pools.close()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: {args.pages} pages of {LAYOUT.page_bytes:,} bytes each way")
    print_table(times, args.pages)
    print(f"{num_differing} pages differ from their source")
    if args.json:
        rows = [
            {"pages": pattern, "job_pages": job_pages, "direction": direction, "times_s": found}
            for (pattern, job_pages, direction), found in times.items()
        ]
        write_report(args.json, args, page_bytes=LAYOUT.page_bytes, rows=rows)
    if num_differing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
