"""The links between GPUs, for bench_scaling.py: handoffs of all pairs at once, and all-reduce.

Each GPU has a process of its own; on a CPU, each place has one. A handoff writes pages of Qwen2-7B through the
transport that engines choose, checksums included: alone, and to every peer from every GPU at the same time. All-reduce
is timed as a model's layers call it (`TensorParallel.all_reduce`) and by NCCL alone (gloo on a CPU), in a CUDA graph on
a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from served import BenchFailure

REPLY_TIMEOUT_S = 90.0
HIDDEN_SIZE = 3584  # of Qwen2-7B, in bfloat16: one row is 7 kB
ROWS = (1, 8, 64, 256, 2048)
CALLS = 20  # all-reduces in one timed run
Row = dict[str, Any]


class Rank:
    """A process that answers each line by a line of JSON."""

    def __init__(self, arguments: Sequence[str]) -> None:
        command = [sys.executable, __file__, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lines = queue.Queue[str]()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def send(self, message: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise BenchFailure(f"a rank ended with status {self._process.poll()}") from error

    def reply(self) -> Any:
        """Return the next answer. Raises `BenchFailure` after `REPLY_TIMEOUT_S`, or if the process has ended."""
        try:
            line = self._lines.get(timeout=REPLY_TIMEOUT_S)
        except queue.Empty:
            raise BenchFailure(f"a rank gave no answer within {REPLY_TIMEOUT_S:g} s") from None
        if not line:
            raise BenchFailure(f"a rank ended with status {self._process.wait(10)}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


@contextlib.contextmanager
def _ranks(arguments: Sequence[Sequence[str]]) -> Iterator[list[Rank]]:
    started: list[Rank] = []
    try:
        started += [Rank(each) for each in arguments]
        yield started
    finally:
        for rank in started:
            rank.close()


def _device(place: int, num_gpus: int) -> str:
    return f"cuda:{place % num_gpus}" if num_gpus else "cpu"


# ---------------------------------------------------------------- handoffs


def measure_handoffs(num_places: int, num_gpus: int, *, num_tokens: int, repetitions: int) -> Row:
    """Return GB/s of each pair (from, to): alone, and all pairs at once."""
    if num_places < 2:
        raise BenchFailure("a handoff needs two places")
    with tempfile.TemporaryDirectory() as folder:
        shared = [f"--tokens={num_tokens}", f"--runtime-dir={folder}"]
        arguments = [["handoff", f"--device={_device(place, num_gpus)}", *shared] for place in range(num_places)]
        with _ranks(arguments) as ranks:
            hellos = [rank.reply() for rank in ranks]
            for rank in ranks:
                rank.send([hello["address"] for hello in hellos])
            num_bytes = hellos[0]["num_bytes"]
            pairs = [(a, b) for a in range(num_places) for b in range(num_places) if a != b]
            alone: dict[str, float] = {}
            for a, b in pairs:
                ranks[a].send({"peers": [b], "repetitions": repetitions})
                alone[f"{a}-{b}"] = num_bytes / 1e9 / ranks[a].reply()["mean_s"][str(b)]
            start_s = time.perf_counter()
            for a, rank in enumerate(ranks):
                rank.send({"peers": [b for b in range(num_places) if b != a], "repetitions": repetitions})
            replies = [rank.reply() for rank in ranks]
            wall_s = time.perf_counter() - start_s
            at_once = {f"{a}-{b}": num_bytes / 1e9 / replies[a]["mean_s"][str(b)] for a, b in pairs}
            each = [num_bytes * repetitions * (num_places - 1) / 1e9 / reply["wall_s"] for reply in replies]
    return {
        "num_places": num_places,
        "num_bytes": num_bytes,
        "transport": hellos[0]["transport"],
        "alone_gb_per_s": alone,
        "at_once_gb_per_s": at_once,
        "total_gb_per_s": num_bytes * repetitions * len(pairs) / 1e9 / wall_s,
        "out_of_each_gb_per_s": each,
    }


def be_a_pool(args: argparse.Namespace) -> None:
    """Print our address; read those of all; then write pages to the peers of each line, and print the times."""
    import msgspec
    import torch

    from bench_handoff_gpu import LAYOUT, Side
    from kvist.plan.transfers import WritePages, WritesCompleted
    from kvist.request import HandoffId
    from kvist.wire import PoolAddress

    num_pages = -(-args.tokens // LAYOUT.page_size)
    side = Side(torch.device(args.device), 2 * num_pages, Path(args.runtime_dir).resolve())
    side.pool.tensor.normal_()
    hello = {
        "address": msgspec.json.encode(side.address).decode(),
        "transport": side.address.transport,
        "num_bytes": num_pages * LAYOUT.page_bytes,
    }
    print(json.dumps(hello), flush=True)
    addresses = [msgspec.json.decode(text, type=PoolAddress) for text in json.loads(sys.stdin.readline())]
    dice, number = random.Random(0), 0

    def write_to(peers: Sequence[int]) -> dict[int, float]:
        nonlocal number
        begun: dict[HandoffId, tuple[int, float]] = {}
        took_s: dict[int, float] = {}
        for peer in peers:
            number += 1
            ids, peer_ids = (tuple(dice.sample(range(2 * num_pages), num_pages)) for _ in range(2))
            job = WritePages(
                handoff_id=HandoffId(str(number)), pool=addresses[peer], page_ids=ids, peer_page_ids=peer_ids
            )
            begun[job.handoff_id] = peer, time.perf_counter()
            side.transport.write(job)
        while len(took_s) < len(peers):
            for report in side.wait_for_reports():
                if not isinstance(report, WritesCompleted):
                    raise SystemExit(f"the handoff failed: {report}")
                if report.num_pages == num_pages:
                    peer, start_s = begun[report.handoff_id]
                    took_s[peer] = time.perf_counter() - start_s
        return took_s

    for line in sys.stdin:
        order = json.loads(line)
        write_to(order["peers"])  # opens the peers' pools
        start_s = time.perf_counter()
        rounds = [write_to(order["peers"]) for _ in range(order["repetitions"])]
        wall_s = time.perf_counter() - start_s
        mean_s = {peer: sum(each[peer] for each in rounds) / len(rounds) for peer in order["peers"]}
        print(json.dumps({"mean_s": mean_s, "wall_s": wall_s}), flush=True)
    side.close()


# ---------------------------------------------------------------- all-reduce


def measure_all_reduce(num_places: int, num_gpus: int, *, quick: bool) -> Row:
    """Return microseconds of one all-reduce by tensor parallel size, rows and path."""
    if num_places < 2:
        raise BenchFailure("an all-reduce needs two places")
    if num_gpus and num_gpus < num_places:
        raise BenchFailure("NCCL needs one GPU for each rank")
    rows: list[Row] = []
    for size in (2, 4, 8):
        if size > num_places:
            break
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder, "store")
            shared = [f"--size={size}", f"--store={store}", *(["--quick"] if quick else [])]
            arguments = [
                ["all_reduce", f"--device={_device(rank, num_gpus)}", f"--rank={rank}", *shared] for rank in range(size)
            ]
            with _ranks(arguments) as ranks:
                replies = [rank.reply() for rank in ranks]
        for index, row in enumerate(replies[0]):
            slowest = {key: max(reply[index][key] for reply in replies) for key in ("ours_us", "nccl_us")}
            rows.append(
                {"tp": size, "rows": row["rows"], "equal": all(reply[index]["equal"] for reply in replies), **slowest}
            )
    return {"num_places": num_places, "rows": rows}


def be_a_rank(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    from kvist.models.parallel import join_tensor_parallel, leave_tensor_parallel

    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = FileStore(args.store, args.size)
    tp = join_tensor_parallel(rank=args.rank, size=args.size, store=store, device=device, timeout_s=60.0)
    plain = dist.new_group(timeout=datetime.timedelta(seconds=60.0))
    rows = []
    if device.type == "cpu":
        torch.set_num_threads(1)
    for num_rows in ROWS[:2] if args.quick else ROWS:
        source = torch.full((num_rows, HIDDEN_SIZE), float(args.rank + 1), dtype=torch.bfloat16, device=device)
        ours = tp.all_reduce(source.clone())
        equal = bool((ours == sum(range(1, args.size + 1))).all())
        x = torch.zeros_like(source)
        times = {
            "ours_us": _time_us(lambda x=x: tp.all_reduce(x), device),  # type: ignore[misc]
            "nccl_us": _time_us(lambda x=x: dist.all_reduce(x, group=plain), device),  # type: ignore[misc]
        }
        rows.append({"rows": num_rows, "equal": equal, **times})
    print(json.dumps(rows), flush=True)
    leave_tensor_parallel()


def _time_us(call: Callable[[], object], device: Any) -> float:
    """Return microseconds a call: the median of several runs of `CALLS` calls."""
    import statistics

    import torch

    for _ in range(3):
        call()
    run: Callable[[], object]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                call()
        run = graph.replay
    else:

        def run() -> None:
            for _ in range(CALLS):
                call()

    samples = []
    for _ in range(7):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(1e6 * (time.perf_counter() - start_s) / CALLS)
    return statistics.median(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description="one rank of bench_scaling.py's links")
    parser.add_argument("what", choices=("handoff", "all_reduce"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--runtime-dir", default="")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--size", type=int, default=1)
    parser.add_argument("--store", default="")
    parser.add_argument("--quick", action="store_true", help="few rows")
    args = parser.parse_args()
    (be_a_pool if args.what == "handoff" else be_a_rank)(args)


if __name__ == "__main__":
    main()
