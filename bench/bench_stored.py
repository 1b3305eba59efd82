"""How soon does the first token of a prompt come whose pages are in the store, in the host tier, or in the device pool?

    python bench/bench_stored.py                                     # the embedded model, on a CPU
    python bench/bench_stored.py --model-path M --load-format dummy --prompt-tokens 6144
    python bench/bench_stored.py ... --against OTHER/src             # another version of Kvist in the same run
    python bench/bench_stored.py ... --storage mooncake              # three stores on loopback
    python bench/bench_stored.py ... --empty                         # what asking a store costs that has none of them

Each prompt is computed once, and stored. Then the tiers are flushed and it is sent again (from the store), again (from
the device pool), and after a flush of the device pool once more (from the host tier), one request at a time. Servers
that are compared take turns, in changing order. Prints the median and p90 time of an answer of one token, and for
`--against` the median ratio of neighbouring requests. A request with other cached tokens than expected is an error.
With `--empty` a server with the store and one without are asked for new prompts in turn, each when the pages of the one
before are stored. `--json` writes one row a request, and the worker's counters.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from json_report import write_report
from kvist.cluster.plan import visible_gpus
from served import BenchFailure, BenchServer
from tiers_store import PAGE_SIZE, STORAGES, StorePlan, kv_token_bytes, opened_store
from tiers_table import table

TIERS = ("storage", "device", "host")  # in the order in which a prompt is found there
NOWHERE = "nowhere"
STORED_S = 60.0
Row = dict[str, Any]


def token_bytes(args: argparse.Namespace) -> int:
    return kv_token_bytes(args.model_path, "bfloat16" if args.device == "cuda" else "float32")


def flags_of(args: argparse.Namespace) -> list[str]:
    """Return the flags of a server: the device pool holds two prompts, the host tier three."""
    num_tokens = args.prompt_tokens
    flags = [f"--device={args.device}", f"--dtype={'bfloat16' if args.device == 'cuda' else 'float32'}"]
    flags += [f"--model-path={args.model_path}"] if args.model_path else []
    flags += [f"--load-format={args.load_format}", f"--page-size={PAGE_SIZE}"]
    flags += [f"--max-total-tokens={2 * num_tokens + 4 * PAGE_SIZE}", f"--context-length={num_tokens + 4 * PAGE_SIZE}"]
    flags += ["--enable-hierarchical-cache", f"--hicache-size={3 * num_tokens * token_bytes(args) / 1e9:.6f}"]
    return [*flags, "--hicache-storage-prefetch-policy=wait_complete", *args.serve_flags.split()]


def ask(server: BenchServer, prompt: list[int]) -> tuple[float, dict[str, int]]:
    """Return the seconds until an answer of one token, and the cached tokens by tier."""
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
    start_s = time.perf_counter()
    answer = server.post("/generate", 120.0, json=body)
    took_s = time.perf_counter() - start_s
    if answer.status_code != httpx.codes.OK:
        raise BenchFailure(f"{server.name}: {answer.text}\n{server.log_tail()}")
    return took_s, answer.json()["meta_info"]["cached_tokens_details"]


def flush(server: BenchServer, tier: str) -> None:
    query = {"tier": "device"} if tier == "device" else {}
    server.post("/flush_cache", 60.0, params=query).raise_for_status()


def store_all(server: BenchServer, prompts: list[list[int]]) -> None:
    """Compute the prompts, each when the pages of the one before are stored: the host tier holds only three."""
    num_stored = 0
    for prompt in prompts:
        ask(server, prompt)
        num_stored += len(prompt) // PAGE_SIZE
        wait_stored(server, num_stored)


def measure(args: argparse.Namespace, servers: list[BenchServer], prompts: list[list[int]]) -> list[Row]:
    rows: list[Row] = []
    expected = (args.prompt_tokens - 1) // PAGE_SIZE * PAGE_SIZE
    for repetition in range(args.repetitions):
        for number, prompt in enumerate(prompts):
            order = servers if (repetition + number) % 2 else servers[::-1]
            for tier in TIERS:
                for server in order:
                    if tier != "device":
                        flush(server, {"storage": "all", "host": "device"}[tier])
                    took_s, cached = ask(server, prompt)
                    if cached.get(tier) != expected:
                        raise BenchFailure(f"{server.name}: {cached} of {expected} tokens in {tier}")
                    rows.append(
                        {"server": server.name, "tier": tier, "prompt": number, "repetition": repetition, "s": took_s}
                    )
    return rows


def wait_stored(server: BenchServer, num_pages: int) -> None:
    give_up_s = time.monotonic() + STORED_S
    while server.metrics().get("storage_stored_pages", 0.0) < num_pages:
        if time.monotonic() > give_up_s:
            raise BenchFailure(f"{server.name}: the pages are not stored\n{server.log_tail()}")
        time.sleep(0.02)


def measure_empty(args: argparse.Namespace, servers: list[BenchServer], draw: random.Random) -> list[Row]:
    """Ask for prompts that no tier has. `servers`: with the store, and without."""
    rows: list[Row] = []
    for number in range(args.num_prompts * args.repetitions + 1):
        prompt = prompt_of(args, draw)
        for server in servers if number % 2 else servers[::-1]:
            took_s, cached = ask(server, prompt)
            if any(cached.values()):
                raise BenchFailure(f"{server.name}: {cached} of a new prompt")
            if number:  # the first one finds a server that has computed nothing
                rows.append({"server": server.name, "tier": NOWHERE, "prompt": number, "repetition": 0, "s": took_s})
            if server is servers[0]:
                wait_stored(server, (number + 1) * (args.prompt_tokens // PAGE_SIZE))
    return rows


def prompt_of(args: argparse.Namespace, draw: random.Random) -> list[int]:
    return [draw.randrange(1000, 30000) for _ in range(args.prompt_tokens)]


def tabulate(rows: list[Row], names: list[str]) -> str:
    lines = []
    for tier in [each for each in (*reversed(TIERS), NOWHERE) if any(row["tier"] == each for row in rows)]:
        by_name = {name: [row["s"] for row in rows if (row["server"], row["tier"]) == (name, tier)] for name in names}
        for name, times in by_name.items():
            pairs = [ours / other for ours, other in zip(by_name[names[0]], times, strict=True)]
            p90 = float(np.quantile(times, 0.9))
            ratio = "" if name == names[0] else f"{statistics.median(pairs):.3f}"
            lines.append((tier, name, f"{1e3 * statistics.median(times):.1f}", f"{1e3 * p90:.1f}", ratio))
    return table(("pages in", "server", "median ms", "p90 ms", f"{names[0]} to it"), lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="model folder; without it the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights of the right shapes")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--against", type=Path, help="the folder src of another version, to compare with")
    parser.add_argument("--empty", action="store_true", help="new prompts, with the store and without a store")
    parser.add_argument("--storage", default="file", choices=STORAGES, help="mooncake: on loopback")
    parser.add_argument("--stores", type=int, default=3, help="number of Mooncake stores")
    parser.add_argument("--store-dir", type=Path, default=Path("/dev/shm"), help="where the folder of pages lies")
    parser.add_argument("--serve-flags", default="", help="more flags for the servers, as one string")
    parser.add_argument("--start-timeout", type=float, default=120.0, help="seconds from start to ready")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if visible_gpus(os.environ) else "cpu"
    return args


def main() -> None:
    args = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process is left
    draw = random.Random(args.seed)
    prompts = [] if args.empty else [prompt_of(args, draw) for _ in range(args.num_prompts)]
    sources = {"this": None, **({} if args.against is None else {"other": args.against.absolute()})}
    if args.empty:
        sources = {"store": None, "no store": None}
    num_stored_prompts = args.num_prompts * args.repetitions + 1 if args.empty else args.num_prompts
    with tempfile.TemporaryDirectory(prefix="kvist-bench-stored-") as folder, contextlib.ExitStack() as stack:
        servers = []
        for name, source in sources.items():
            plan = StorePlan(
                storage=args.storage,
                num_bytes=int(1.2 * num_stored_prompts * args.prompt_tokens * token_bytes(args)),
                parent=args.store_dir,
                logs=Path(folder),
                num_stores=args.stores,
            )
            flags = [*flags_of(args), *([] if name == "no store" else stack.enter_context(opened_store(plan)))]
            servers.append(stack.enter_context(BenchServer(name, flags, Path(folder), source=source)))
            servers[-1].start(args.start_timeout)
            store_all(servers[-1], prompts)
        rows = measure_empty(args, servers, draw) if args.empty else measure(args, servers, prompts)
        counted = {server.name: server.metrics() for server in servers}
        print(tabulate(rows, list(sources)))
        for name, totals in counted.items():
            num = max(1.0, totals.get("prefetches", 0.0))
            waited = totals.get("prefetch_wait_seconds", 0.0) / num
            share = waited / statistics.mean([row["s"] for row in rows if row["server"] == name])
            print(f"{name}: {1e3 * waited:.1f} ms of wait for the store for each prompt looked up there ({share:.2%})")
        if args.json:
            write_report(args.json, args, rows=rows, counted=counted)


if __name__ == "__main__":
    main()
