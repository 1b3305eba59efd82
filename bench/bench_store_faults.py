"""How long do running streams pause when a Mooncake pool breaks, and how soon is a request answered that needs it?

    python bench/bench_store_faults.py                         # the embedded model, on a CPU
    python bench/bench_store_faults.py --rows "none,store killed" --json FILE

A master, three stores and one worker on loopback, all real processes. In each row `--streams` answers are written,
while a visitor asks every second for a prompt that is in the pool only (the other tiers are flushed first). After
`--before` seconds comes the row's fault; `--after` seconds later the pool is repaired, and the next row waits until all
of the pool is ready. Prints for each row the longest pause of any stream before the fault and from the fault on, the
visitor's median time in both, and its longest. Every request must succeed, and a prompt must have the same answer each
time: a failure ends the run. The pool keeps `--replicas` copies of each page.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from json_report import write_report
from kvist.cluster.ports import free_ports
from served import BenchFailure, BenchServer
from tiers_store import PAGE_SIZE
from tiers_table import table

PROMPT_TOKENS = 3 * PAGE_SIZE  # few: a prompt that has to be computed again pauses the streams for a step
NUM_PROMPTS = 4
START_S, WHOLE_S, ANSWER_S = 120.0, 90.0, 120.0


class World:
    """The processes. Mutable; owned by the main thread."""

    def __init__(self, args: argparse.Namespace, logs: Path, stack: contextlib.ExitStack) -> None:
        (rpc_port,) = free_ports(1)
        address = f"127.0.0.1:{rpc_port}"
        open_server = stack.enter_context
        self.master = open_server(
            BenchServer("master", [f"--rpc-port={rpc_port}", "--no-access-log"], logs, verb="master")
        )
        joining = [f"--segment-size={args.segment_gb}", "--no-access-log", f"--hicache-mooncake-master-addr={address}"]
        joining.append(f"--hicache-mooncake-master-url={self.master.url}")
        self.stores = [
            open_server(BenchServer(f"store-{number}", joining, logs, verb="store")) for number in range(args.stores)
        ]
        worker_flags = [f"--model-path={args.model_path}"] if args.model_path else []
        worker_flags += [f"--load-format={args.load_format}", f"--page-size={PAGE_SIZE}", "--max-total-tokens=16384"]
        worker_flags += ["--enable-hierarchical-cache", "--hicache-ratio=1", "--hicache-storage-backend=mooncake"]
        worker_flags += [f"--hicache-storage-prefetch-threshold={PAGE_SIZE}"]
        worker_flags += [f"--hicache-mooncake-master-addr={address}", *args.serve_flags.split()]
        worker_flags += [f"--hicache-mooncake-master-url={self.master.url}"]
        worker_flags.append(f"--hicache-mooncake-replica-num={args.replicas}")
        self.worker = open_server(BenchServer("worker", worker_flags, logs))
        for server in (self.master, *self.stores, self.worker):
            server.start(START_S)

    def wait_whole(self) -> None:
        """Wait until every node is ready, and the worker uses the pool."""
        give_up_s = time.monotonic() + WHOLE_S
        while not (all(server.is_ready() for server in (self.master, *self.stores)) and self._is_used()):
            if time.monotonic() > give_up_s:
                raise BenchFailure(f"the pool is not whole again\n{self.worker.log_tail()}")
            time.sleep(0.1)

    def _is_used(self) -> bool:
        answer = httpx.get(f"{self.worker.url}/hicache/storage-backend", timeout=10.0, trust_env=False)
        (status,) = answer.json()["workers"].values()
        return bool(status["state"] == "attached" and status["breaker"] == "closed")


@dataclass(frozen=True, slots=True)
class Fault:
    strike: Callable[[World], None]
    mend: Callable[[World], None] = lambda _: None


def started(server: BenchServer) -> None:
    server.start(START_S)


def stopped_in_order(server: BenchServer) -> None:
    server.signal(signal.SIGTERM)
    server.wait_ended()


def drained_and_killed(world: World) -> None:
    """Empty a store, and kill it when it is empty."""
    url = world.stores[0].url
    httpx.post(f"{url}/drain", timeout=30.0, trust_env=False).raise_for_status()
    give_up_s = time.monotonic() + WHOLE_S
    while not (progress := httpx.get(f"{url}/drain", timeout=30.0, trust_env=False).json()).get("done"):
        if progress.get("error") or time.monotonic() > give_up_s:
            raise BenchFailure(f"the store is not empty: {progress}")
        time.sleep(0.1)
    world.stores[0].kill()


def all_killed(world: World) -> None:
    for store in world.stores:
        store.kill()


def all_started(world: World) -> None:
    for store in world.stores:
        started(store)


def master_restarted(world: World) -> None:
    world.master.kill()
    started(world.master)


def detached(world: World) -> None:
    httpx.delete(f"{world.worker.url}/hicache/storage-backend", timeout=60.0, trust_env=False).raise_for_status()


def attached(world: World) -> None:
    httpx.put(f"{world.worker.url}/hicache/storage-backend", json={}, timeout=60.0, trust_env=False).raise_for_status()


FAULTS = {
    "none": Fault(lambda _: None),
    "store killed": Fault(lambda world: world.stores[0].kill(), lambda world: started(world.stores[0])),
    "store stopped": Fault(
        lambda world: world.stores[0].signal(signal.SIGSTOP), lambda world: world.stores[0].signal(signal.SIGCONT)
    ),
    "store ended by SIGTERM": Fault(
        lambda world: stopped_in_order(world.stores[0]), lambda world: started(world.stores[0])
    ),
    "store drained and killed": Fault(drained_and_killed, lambda world: started(world.stores[0])),
    "all stores killed": Fault(all_killed, all_started),
    "master killed": Fault(lambda world: world.master.kill(), lambda world: started(world.master)),
    "master stopped": Fault(
        lambda world: world.master.signal(signal.SIGSTOP), lambda world: world.master.signal(signal.SIGCONT)
    ),
    "master restarted": Fault(master_restarted),
    "pool detached": Fault(detached, attached),
}


@dataclass(slots=True)
class Stream:
    """The times at which pieces of one answer arrived. Mutable; owned by its thread until it ends."""

    times_s: list[float] = field(default_factory=list)
    error: str = ""

    def pauses(self) -> list[tuple[float, float]]:
        """Return (start, length) of each."""
        return [(sooner, later - sooner) for sooner, later in itertools.pairwise(self.times_s)]


def write_until(url: str, seed: int, end: threading.Event, stream: Stream) -> None:
    """Read answers one after the other, without an end of their own; the pause between two of them does not count."""
    body = {"max_new_tokens": 2000, "ignore_eos": True, "temperature": 0.0}
    draw = random.Random(seed)
    ids = [draw.randrange(1000, 30000) for _ in range(8)]
    try:
        with (
            httpx.Client(timeout=ANSWER_S, trust_env=False) as http,
            http.stream(
                "POST", f"{url}/generate", json={"input_ids": ids, "sampling_params": body, "stream": True}
            ) as answer,
        ):
            if answer.status_code != httpx.codes.OK:
                raise BenchFailure(answer.read().decode())
            for line in answer.iter_lines():
                if line.startswith("data:") and '"error"' in line:
                    raise BenchFailure(line)
                if line.startswith("data: {"):
                    stream.times_s.append(time.monotonic())
                if end.is_set():
                    return
        raise BenchFailure("the stream ended too soon")
    except (httpx.HTTPError, BenchFailure) as error:
        stream.error = f"{type(error).__name__}: {error}"


@dataclass(slots=True)
class Visitor:
    """Asks for prompts of which only the pool has the pages."""

    url: str
    prompts: list[list[int]]
    answers: dict[int, object] = field(default_factory=dict)
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=ANSWER_S, trust_env=False))

    def ask(self, number: int) -> float:
        """Return the seconds until the answer."""
        self.http.post(f"{self.url}/flush_cache").raise_for_status()
        params = {"max_new_tokens": 1, "temperature": 0.0}
        start_s = time.monotonic()
        answer = self.http.post(
            f"{self.url}/generate", json={"input_ids": self.prompts[number], "sampling_params": params}
        )
        took_s = time.monotonic() - start_s
        if answer.status_code != httpx.codes.OK:
            raise BenchFailure(f"a request failed: {answer.text}")
        found = answer.json()["output_ids"]
        if self.answers.setdefault(number, found) != found:
            raise BenchFailure(f"prompt {number} has another answer: {found}, not {self.answers[number]}")
        return took_s


def measured(name: str, world: World, visitor: Visitor, args: argparse.Namespace) -> dict[str, object]:
    end, streams = threading.Event(), [Stream() for _ in range(args.streams)]
    threads = [
        threading.Thread(target=write_until, args=(world.worker.url, seed, end, stream))
        for seed, stream in enumerate(streams)
    ]
    for thread in threads:
        thread.start()
    while not all(stream.times_s or stream.error for stream in streams):
        time.sleep(0.01)
    visits: list[tuple[float, float]] = []
    striking: threading.Thread | None = None
    failures: list[BaseException] = []
    fault_s = begin_s = time.monotonic()

    def strike() -> None:
        try:
            FAULTS[name].strike(world)
        except BaseException as error:
            failures.append(error)

    for number in itertools.count():
        now_s = time.monotonic()
        if striking is None and now_s >= begin_s + args.before:
            fault_s = now_s
            striking = threading.Thread(target=strike)
            striking.start()
        if striking is not None and now_s >= fault_s + args.after and not striking.is_alive():
            break
        visits.append((now_s, visitor.ask(number % len(visitor.prompts))))
        time.sleep(max(0.0, args.pause - (time.monotonic() - now_s)))
    end_s = time.monotonic()
    end.set()
    for thread in threads:
        thread.join(ANSWER_S)
    problems = [stream.error for stream in streams if stream.error] + [repr(each) for each in failures]
    if problems:
        raise BenchFailure(f"{name}: {problems}\n{world.worker.log_tail()}")
    FAULTS[name].mend(world)
    world.wait_whole()
    pauses = [each for stream in streams for each in stream.pauses() if each[0] < end_s]
    return {
        "fault": name,
        "pause_before_s": max(length for start_s, length in pauses if start_s < fault_s),
        "pause_s": max(length for start_s, length in pauses if start_s + length >= fault_s),
        "visits_before_s": [took_s for at_s, took_s in visits if at_s < fault_s],
        "visits_s": [took_s for at_s, took_s in visits if at_s >= fault_s],
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="model folder; without it the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights of the right shapes")
    parser.add_argument("--rows", default=",".join(FAULTS), help="faults, separated by commas")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--stores", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--segment-gb", type=float, default=0.3, help="memory of each store")
    parser.add_argument("--before", type=float, default=5.0, help="seconds before the fault")
    parser.add_argument("--after", type=float, default=10.0, help="seconds after it")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds from one visit to the next")
    parser.add_argument("--serve-flags", default="", help="more flags for the worker, as one string")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.rows = args.rows.split(",")
    if unknown := set(args.rows) - set(FAULTS):
        parser.error(f"unknown rows {unknown}: known are {', '.join(FAULTS)}")
    return args


def main() -> None:
    args = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process is left
    draw = random.Random(3)
    prompts = [[draw.randrange(1000, 30000) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_PROMPTS)]
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="kvist-bench-faults-") as folder, contextlib.ExitStack() as stack:
        world = World(args, Path(folder), stack)
        visitor = Visitor(world.worker.url, prompts)
        stack.callback(visitor.http.close)
        for name in args.rows:
            for number in range(NUM_PROMPTS):  # the pool may have lost them
                visitor.ask(number)
            rows.append(measured(name, world, visitor, args))
            print(json.dumps(rows[-1]), flush=True)
    lines = []
    for row in rows:
        before, after = row["visits_before_s"], row["visits_s"]
        assert isinstance(before, list)
        assert isinstance(after, list)
        cells = [row["pause_before_s"], row["pause_s"], statistics.median(before), statistics.median(after), max(after)]
        lines.append((str(row["fault"]), *(f"{1e3 * float(str(cell)):.0f} ms" for cell in cells)))
    print(table(("fault", "longest pause before", "from the fault on", "visitor before", "after", "longest"), lines))
    if args.json:
        write_report(args.json, args, rows=rows)


if __name__ == "__main__":
    main()
