"""What does each tier of the cache bring? Hit rate, TTFT and throughput of conversations with L1, L1+L2 and L1+L2+L3.

    python bench/bench_tiers.py cpu                       # the embedded model, small, on two cores
    python bench/bench_tiers.py performance --model-path M --load-format dummy
    python bench/bench_tiers.py article     --model-path M --load-format dummy
    python bench/bench_tiers.py no-hits     ...           # what tiers cost when nothing comes back
    python bench/bench_tiers.py restart     ...           # what --hicache-persist brings after SIGKILL
    python bench/bench_tiers.py article     ... --storage mooncake --pair     # stores on loopback; prefill and decode

For each row it starts `kvist serve`, runs `kvist bench multiturn` against it, reads the worker's counters before and
after, and stops it. Rows are compared within one run; the first is the baseline. `no-hits` keeps all its servers up and
measures them in turn, several times, with new prompts. On a shared CPU, times drift from row to row:
compare the engine's CPU seconds there.

    performance  80 conversations of 4 rounds, 16 in flight, 2048 + 64 tokens; L1 150,000 tokens, L2 all of them
    article      150 of 14 rounds, 8 in flight, 2048 + 64 tokens a round divided by the scale; of all these tokens L1
                 holds 7%, L2 23%, L3 everything
    cpu          10 of 5 rounds, 2 in flight, 96 + 8 tokens; L1 a fifth, L2 a half, L3 everything

The scale divides every length and every tier alike, so the proportions stay. The run doubles the scale until the host
tier and the store fit into this machine, and prints the scale.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from json_report import write_report
from kvist.cluster.plan import visible_gpus
from kvist.cores import num_usable_cores
from kvist.memory.host_memory import available_host_bytes
from scaling_fleet import BenchCluster
from served import BenchFailure, BenchServer, Report
from tiers_store import PAGE_SIZE, STORAGES, StorePlan, kv_token_bytes, opened_store
from tiers_table import Row, moves_lines, no_hits_table, restarts_table, strategies_table

L1, L2, L3 = "L1", "L1+L2", "L1+L2+L3"
STRATEGIES = (L1, L2, L3)
SPARE_BYTES = 8 * 10**9  # for the processes themselves
STORE_SHARE = 1.2  # of all conversations: files have headers, and eviction must not be what is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Conversations and the tiers they meet. Shares are of all tokens that the conversations have at their end."""

    clients: int
    rounds: int
    parallel: int
    num_input: int
    num_output: int
    device_share: float
    host_share: float
    scale: int = 1  # what the lengths were divided by

    @property
    def working_set_tokens(self) -> int:
        return self.clients * self.rounds * (self.num_input + self.num_output)

    @property
    def longest_tokens(self) -> int:
        return self.rounds * (self.num_input + self.num_output)

    @property
    def device_tokens(self) -> int:
        return max(int(self.device_share * self.working_set_tokens), self.longest_tokens + PAGE_SIZE)

    def scaled(self, by: int) -> Setup:
        shorter = {"num_input": max(PAGE_SIZE, self.num_input // by), "num_output": max(2, self.num_output // by)}
        return replace(self, **shorter, scale=self.scale * by)

    def bench_argv(self, seed: int, *, rounds: int | None = None, answers: str = "auto") -> list[str]:
        return [
            *("multiturn", f"--clients={self.clients}", f"--rounds={rounds or self.rounds}"),
            *(f"--parallel={self.parallel}", f"--input-tokens={self.num_input}"),
            *(f"--output-tokens={self.num_output}", f"--answers={answers}", f"--seed={seed}"),
        ]


CONVERSATIONS = Setup(
    clients=80, rounds=4, parallel=16, num_input=2048, num_output=64, device_share=150_000 / 675_840, host_share=1.05
)
PRESETS = {
    "performance": CONVERSATIONS,
    "article": Setup(
        clients=150, rounds=14, parallel=8, num_input=2048, num_output=64, device_share=0.07, host_share=0.23
    ).scaled(4),
    "cpu": Setup(clients=10, rounds=5, parallel=2, num_input=96, num_output=8, device_share=0.2, host_share=0.5),
    "no-hits": replace(CONVERSATIONS, rounds=1, device_share=1.0),
    "restart": CONVERSATIONS,
}
CPU_PRESETS = {  # replace the last two presets on a machine without a GPU
    "no-hits": Setup(clients=16, rounds=1, parallel=4, num_input=96, num_output=8, device_share=1.0, host_share=1.05),
    "restart": Setup(clients=10, rounds=4, parallel=2, num_input=96, num_output=8, device_share=0.3, host_share=1.05),
}


class Machine:
    """Settings that all servers of a run share: the model's flags, the sizes of the tiers, and their folders."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.device = args.device
        if self.device == "auto":
            self.device = "cuda" if args.preset != "cpu" and visible_gpus(os.environ) else "cpu"
        presets = PRESETS if self.device == "cuda" else {**PRESETS, **CPU_PRESETS}
        self.dtype = "bfloat16" if self.device == "cuda" else "float32"
        self.token_bytes = kv_token_bytes(args.model_path, self.dtype)
        self.strategies = [name for name in STRATEGIES if name in args.rows]
        self.store_parent = Path(args.store_dir) if args.store_dir else _in_memory() or folder
        self.setup = self._fitting(presets[args.preset].scaled(args.scale))

    def _fitting(self, setup: Setup) -> Setup:
        while (lack := self._lack(setup)) and setup.num_input > PAGE_SIZE:
            print(f"{lack}: every length and tier is halved")
            setup = setup.scaled(2)
        if lack:
            raise SystemExit(f"{lack}; give --rows {L1}, or --store-dir on a larger disk")
        return setup

    def _lack(self, setup: Setup) -> str:
        """Return what this machine has too little of, in words; "" if everything fits."""
        tiers = [name for name in self.strategies if name != L1] or (self.args.preset == "restart" and [L2])
        in_memory = SPARE_BYTES if self.device == "cuda" else setup.device_tokens * self.token_bytes
        in_memory += self.host_bytes(setup) * (1 + self.args.pair) if tiers else 0
        in_store = self.store_bytes(setup) if L3 in self.strategies and self.args.preset != "restart" else 0
        if self.args.preset == "restart":
            in_store, in_memory = self.host_bytes(setup), in_memory - self.host_bytes(setup)  # the pool is that file
        free_store = shutil.disk_usage(self.store_parent).free
        if in_store > free_store and self.args.storage == "file":
            return f"{self.store_parent} has {free_store / 1e9:.1f} GB free of {in_store / 1e9:.1f}"
        if _is_memory(self.store_parent) or self.args.storage == "mooncake":
            in_memory += in_store
        free = available_host_bytes()
        return f"{free / 1e9:.1f} GB of memory are free of {in_memory / 1e9:.1f}" if in_memory > free else ""

    def host_bytes(self, setup: Setup) -> int:
        return int(setup.host_share * setup.working_set_tokens) * self.token_bytes

    def store_place(self) -> str:
        return str(self.store_parent) if self.args.storage == "file" else f"{self.args.stores} Mooncake stores"

    def store_bytes(self, setup: Setup) -> int:
        return int(STORE_SHARE * setup.working_set_tokens) * self.token_bytes

    def flags(self, strategy: str, *extra: str, num_servers: int = 1) -> list[str]:
        args, setup = self.args, self.setup
        flags = [f"--device={self.device}", f"--dtype={self.dtype}", f"--page-size={PAGE_SIZE}"]
        flags += [f"--model-path={args.model_path}"] if args.model_path else []
        flags += [f"--load-format={args.load_format}", f"--max-total-tokens={setup.device_tokens}"]
        flags += [f"--context-length={setup.longest_tokens + PAGE_SIZE}"]
        if self.device == "cpu":
            flags += [f"--num-threads={num_usable_cores()}"]  # else a second server gets fewer
        elif num_servers > 1:
            flags += [f"--num-threads={max(1, num_usable_cores() // num_servers)}"]
        if strategy != L1:
            flags += ["--enable-hierarchical-cache", f"--hicache-size={self.host_bytes(setup) / 1e9:.6f}"]
        if strategy == L3:
            threshold = max(PAGE_SIZE, setup.num_input // 8)  # the default, 256, where a round appends 2048
            flags += [f"--hicache-storage-prefetch-threshold={threshold}", *shlex.split(args.l3_flags)]
        return [*flags, *extra, *shlex.split(args.serve_flags)]

    @contextlib.contextmanager
    def store_flags(self, strategy: str) -> Iterator[list[str]]:
        """Open the store of a strategy that has one; yield the flags for it."""
        if strategy != L3:
            yield []
            return
        plan = StorePlan(
            storage=self.args.storage,
            num_bytes=self.store_bytes(self.setup),
            parent=self.folder_for_store(),
            logs=self.logs(),
            num_stores=self.args.stores,
            start_timeout_s=self.args.start_timeout,
        )
        with opened_store(plan) as flags:
            yield flags

    def folder_for_store(self) -> Path:
        path = self.store_parent / f"kvist-bench-{os.getpid()}"
        path.mkdir(exist_ok=True, mode=0o700)
        return path

    def logs(self) -> Path:
        logs = Path(self.args.logs) if self.args.logs else self.folder
        logs.mkdir(exist_ok=True, parents=True)
        return logs

    def serve(self, name: str, flags: Sequence[str]) -> BenchServer:
        return (BenchCluster if self.args.pair else BenchServer)(name, flags, self.logs())

    def bench(self, server: BenchServer, argv: Sequence[str]) -> Report:
        return server.bench(argv, self.folder / "bench.json", self.args.row_timeout)


def _in_memory() -> Path | None:
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else None


def _is_memory(path: Path) -> bool:
    return path.resolve().is_relative_to("/dev/shm")


# ---------------------------------------------------------------- rows


def hits_by_tier(summary: Row, counted: dict[str, float]) -> dict[str, float]:
    """Shares of the prompt tokens, by the usage of each answer; without it, by the worker's page counters."""
    if by_tier := summary.get("hit_rate_by_tier"):
        return {tier: by_tier.get(name, 0.0) for tier, name in (("L1", "device"), ("L2", "host"), ("L3", "storage"))}
    num_prompt = counted.get("prompt_tokens", 0.0)
    if not num_prompt:
        return {}
    # pages from the store pass through the host tier
    from_store = min(counted.get("storage_fetched_pages", 0.0), counted.get("host_hit_pages", 0.0))
    pages = {"L1": counted.get("device_hit_pages", 0.0), "L2": counted.get("host_hit_pages", 0.0) - from_store}
    pages["L3"] = from_store
    return {tier: PAGE_SIZE * count / num_prompt for tier, count in pages.items()}


def measured(machine: Machine, server: BenchServer, argv: Sequence[str]) -> Row:
    """One run of `kvist bench`, and what the worker counted meanwhile."""
    before = server.metrics()
    report = machine.bench(server, argv)
    after = server.metrics()
    counted = {name: value - before.get(name, 0.0) for name, value in after.items()}
    run = report["runs"][0]
    return {
        "name": server.name,
        "command": list(server.argv[2:]),
        "ready_s": server.ready_s,
        "counted": counted,
        "by_tier": hits_by_tier(run["summary"], counted),
        "summary": run["summary"],
        "requests": run["rows"],
    }


def compare_strategies(machine: Machine) -> Iterator[Row]:
    for strategy in machine.strategies:
        with (
            _failures_printed(),
            machine.store_flags(strategy) as store,
            machine.serve(strategy, machine.flags(strategy, *store)) as server,
        ):
            server.start(machine.args.start_timeout)
            yield measured(machine, server, machine.setup.bench_argv(machine.args.seed))


def compare_without_hits(machine: Machine) -> Iterator[Row]:
    """Repetition 0 is not measured: it touches the host tier's memory for the first time."""
    with _failures_printed(), contextlib.ExitStack() as stack:
        servers: list[BenchServer] = []
        for strategy in machine.strategies:
            store = stack.enter_context(machine.store_flags(strategy))
            flags = machine.flags(strategy, *store, num_servers=len(machine.strategies))
            servers.append(stack.enter_context(machine.serve(strategy, flags)))
            servers[-1].start(machine.args.start_timeout)
        for repetition in range(machine.args.repetitions + 1):
            order = servers if repetition % 2 else servers[::-1]
            for number, server in enumerate(order):
                seed = machine.args.seed + 1 + repetition * len(servers) + number
                row = measured(machine, server, machine.setup.bench_argv(seed))
                if repetition:
                    yield {**row, "repetition": repetition}


def compare_restarts(machine: Machine) -> Iterator[Row]:
    """Half of the rounds, SIGKILL, a new start, then the same conversations from their beginning, and their end."""
    setup, args = machine.setup, machine.args
    half = setup.bench_argv(args.seed, rounds=max(1, setup.rounds // 2), answers="drawn")
    whole = setup.bench_argv(args.seed, answers="drawn")
    kept = machine.folder_for_store() / "persisted"
    persisting = machine.flags(L2, f"--hicache-persist={kept}")
    with _failures_printed():
        with machine.serve("before the kill", persisting) as server:
            server.start(args.start_timeout)
            yield measured(machine, server, half)
            server.kill()
        with machine.serve("restored", persisting) as server:
            server.start(args.start_timeout)
            print("\n".join(line for line in server.log().splitlines() if "restored" in line))
            yield measured(machine, server, whole)
    shutil.rmtree(kept, ignore_errors=True)
    with _failures_printed(), machine.serve("cold", machine.flags(L2)) as server:
        server.start(args.start_timeout)
        yield measured(machine, server, whole)


@contextlib.contextmanager
def _failures_printed() -> Iterator[None]:
    """Print the failure of a row, so that the other rows are still measured."""
    try:
        yield
    except BenchFailure as failure:
        print(f"FAILED {failure}", flush=True)


# ---------------------------------------------------------------- the command


KINDS = {"no-hits": (compare_without_hits, no_hits_table), "restart": (compare_restarts, restarts_table)}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--model-path", help="model folder; without it the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights of the right shapes")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--rows", default=",".join(STRATEGIES), help="strategies to run; the first is the baseline")
    parser.add_argument(
        "--scale", type=int, default=1, help="divide all lengths by this factor (article: in addition to its own 4)"
    )
    parser.add_argument("--repetitions", type=int, default=4, help="of no-hits")
    parser.add_argument("--start-timeout", type=float, default=120.0, help="seconds from start to ready")
    parser.add_argument("--row-timeout", type=float, default=240.0, help="seconds that one kvist bench may take")
    parser.add_argument("--store-dir", help="where the store and persisted pages lie for the run (default: /dev/shm)")
    parser.add_argument("--storage", default="file", choices=STORAGES, help="the store of L3; mooncake: on loopback")
    parser.add_argument("--stores", type=int, default=3, help="number of Mooncake stores")
    parser.add_argument("--pair", action="store_true", help="a prefill and a decode worker, each with these tiers")
    parser.add_argument("--l3-flags", default="", help="more flags for servers with a store, as one string")
    parser.add_argument("--serve-flags", default="", help="more flags for every server, as one string")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--logs", help="keep the servers' logs in this folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.rows = args.rows.split(",")
    if unknown := set(args.rows) - set(STRATEGIES):
        parser.error(f"--rows: {', '.join(sorted(unknown))} is not one of {', '.join(STRATEGIES)}")
    return args


def described(machine: Machine) -> str:
    setup = machine.setup
    host, store = machine.host_bytes(setup) / 1e9, machine.store_bytes(setup) / 1e9
    scaled = "" if setup.scale == 1 else f" (lengths are 1/{setup.scale})"
    return (
        f"{machine.args.preset}: {setup.clients} conversations x {setup.rounds} rounds of {setup.num_input} + "
        f"{setup.num_output} tokens{scaled}, {setup.parallel} in flight; in the end {setup.working_set_tokens:,} "
        f"tokens, {setup.working_set_tokens * machine.token_bytes / 1e9:.1f} GB. L1 {setup.device_tokens:,} tokens "
        f"({setup.device_tokens / setup.working_set_tokens:.1%}), L2 {host:.1f} GB ({setup.host_share:.0%}), "
        f"L3 up to {store:.1f} GB in {machine.store_place()}"
        + (", prefill and decode apart" if machine.args.pair else "")
    )


def main() -> None:
    args = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that finished rows are printed and no process is left
    with tempfile.TemporaryDirectory(prefix="kvist-bench-tiers-") as folder:
        machine = Machine(args, Path(folder))
        print(described(machine), flush=True)
        measure, tabulate = KINDS.get(args.preset, (compare_strategies, strategies_table))
        rows = []
        try:
            for row in measure(machine):
                rows.append(row)
                print(f"  {row['name']}: {row['summary']['wall_s']:.1f} s", flush=True)
        finally:
            shutil.rmtree(machine.folder_for_store(), ignore_errors=True)
            if rows:
                print(tabulate(rows))
                if args.preset != "no-hits":  # its table says it
                    print(moves_lines(rows), flush=True)
                if args.json:
                    write_report(args.json, args, setup=repr(machine.setup), rows=rows)


if __name__ == "__main__":
    main()
