"""How much does a plan save? The programs of examples/lang with a plan, without one, and written by hand.

    python bench/bench_lang.py [WORKLOAD ...] [--url URL | --prefill 1 --decode 1 --serve-args "..."] [--json FILE]

Three ways do the same work on one cluster: `plan`, `no plan` (the same program, one request at a time for each of its
runs), and `by hand` (asyncio and the `openai` client, bench/lang_by_hand.py). They take turns; before each turn the
cache is flushed. Wall time is the best of the rounds. Computed tokens are the workers' own counters; `ideal` computes
each distinct prefix of the prompts once. `x` are ratios: by hand / plan and no plan / plan for times, plan / ideal for
tokens. Without `--url` a cluster of the embedded model is started on the CPU; `--serve-args` are further flags of
`kvist up`, as "--model-path ... --load-format dummy" for a GPU. `--scale 0.1` runs a tenth of each batch. In its first
round, each workload checks that plan and no plan give the same texts (`--no-check` leaves that out).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

import kvist.lang as kv
from json_report import write_report
from kvist.execution.backend import prompt_fields
from kvist.execution.report import Report
from lang_by_hand import BY_HAND
from served import REPORT_INTERVAL_S, BenchServer

sys.path.append(str(Path(__file__).parents[1] / "examples" / "lang"))

WORKLOADS = {  # name: runs in a batch
    "few_shot": 100,
    "tree_of_thought": 1,
    "self_consistency": 4,
    "judge": 8,
    "extract": 50,
    "chat_tools": 4,
    "rag": 2,
}
READY_TIMEOUT_S, REQUEST_TIMEOUT_S, RUN_TIMEOUT_S = 300.0, 60.0, 1800.0
SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One way of doing a workload, once."""

    workload: str
    way: str
    wall_s: float
    num_computed_tokens: int
    planning_ms: float | None = None  # for each operation


class Cluster:
    """The server under test: its counters, its cache, its tokenizer."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S, trust_env=False)

    def num_computed_tokens(self) -> int:
        time.sleep(REPORT_INTERVAL_S)
        workers = self._http.get("/server_info").raise_for_status().json()["workers"]
        return sum(int(each["load"]["totals"]["computed_prompt_tokens"]) for each in workers if each["load"])

    def flush(self) -> None:
        self._http.post("/flush_cache").raise_for_status()

    def ideal_tokens(self, report: Report) -> int:
        """Return the tokens of the distinct prefixes of all prompts of a run."""
        prompts = [each.operation.prompt for each in report.requests if hasattr(each.operation, "prompt")]
        lists = sorted({tuple(self._tokens(prompt_fields(prompt))) for prompt in prompts})
        count, before = 0, tuple[int, ...]()
        for tokens in lists:
            common = next((n for n, pair in enumerate(zip(before, tokens, strict=False)) if pair[0] != pair[1]), None)
            count += len(tokens) - (min(len(before), len(tokens)) if common is None else common)
            before = tokens
        return count

    def _tokens(self, fields: dict[str, object]) -> list[int]:
        found: list[int] = self._http.post("/tokenize", json=fields).raise_for_status().json()["tokens"]
        return found


def run_program(endpoint: kv.Endpoint, program: kv.Function, batch: Sequence[Any], *, plan: bool) -> list[Any]:
    return program.run_batch(batch, backend=endpoint, plan=plan, seed=SEED, temperature=0, timeout_s=RUN_TIMEOUT_S)


def take_turn(cluster: Cluster, endpoint: kv.Endpoint, name: str, way: str, batch: Sequence[Any]) -> tuple[Turn, Any]:
    program: kv.Function = getattr(importlib.import_module(name), name)
    cluster.flush()
    before = cluster.num_computed_tokens()
    start_s = time.monotonic()
    if way == "by hand":
        asyncio.run(BY_HAND[name](cluster.url, batch))
        states = []
    else:
        states = run_program(endpoint, program, batch, plan=way == "plan")
    wall_s = time.monotonic() - start_s
    report = states[0].report if states else None
    planning_ms = 1000 * report.planning_s / max(report.num_planned, 1) if report and way == "plan" else None
    num_computed = cluster.num_computed_tokens() - before
    turn = Turn(workload=name, way=way, wall_s=wall_s, num_computed_tokens=num_computed, planning_ms=planning_ms)
    return turn, states


def measure(cluster: Cluster, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    endpoint = kv.RuntimeEndpoint(cluster.url, timeout_s=RUN_TIMEOUT_S)
    ways = ("plan", "no plan", "by hand")
    for name in args.workloads:
        batch = importlib.import_module(name).arguments(max(1, round(WORKLOADS[name] * args.scale)))
        turns: list[Turn] = []
        texts: dict[str, list[str]] = {}
        ideal = 0
        for round_number in range(args.rounds):
            for way in ways:
                turn, states = take_turn(cluster, endpoint, name, way, batch)
                turns.append(turn)
                if states and round_number == 0:
                    texts[way] = [state.text() for state in states]
                if way == "plan" and round_number == 0:
                    ideal = cluster.ideal_tokens(states[0].report)
        if args.check and texts["plan"] != texts["no plan"]:
            raise SystemExit(f"{name}: plan and no plan gave different texts")
        best = {way: min((t for t in turns if t.way == way), key=lambda t: t.wall_s) for way in ways}
        yield {
            "workload": name,
            "runs": len(batch),
            **{f"{way} s": best[way].wall_s for way in ways},
            "by hand x": best["by hand"].wall_s / best["plan"].wall_s,
            "no plan x": best["no plan"].wall_s / best["plan"].wall_s,
            **{f"{way} tokens": best[way].num_computed_tokens for way in ways},
            "ideal tokens": ideal,
            "tokens x": best["plan"].num_computed_tokens / max(ideal, 1),
            "planning ms": best["plan"].planning_ms,
        }
    endpoint.close()


def show(row: dict[str, object]) -> None:
    shown = (f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
    print(", ".join(shown), flush=True)


@contextlib.contextmanager
def cluster_of(args: argparse.Namespace) -> Iterator[Cluster]:
    if args.url:
        yield Cluster(args.url)
        return
    flags = [f"--prefill={args.prefill}", f"--decode={args.decode}", *shlex.split(args.serve_args)]
    with tempfile.TemporaryDirectory() as logs, BenchServer("lang", flags, Path(logs), verb="up") as server:
        server.start(READY_TIMEOUT_S)
        yield Cluster(server.url)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument("--url", help="a running Kvist server")
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--serve-args", default="", help="further flags of kvist up")
    parser.add_argument("--scale", type=float, default=1.0, help="share of each batch")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := set(args.workloads) - set(WORKLOADS):
        parser.error(f"unknown workload {', '.join(sorted(unknown))}; known: {', '.join(WORKLOADS)}")
    rows = []
    with cluster_of(args) as cluster:
        for row in measure(cluster, args):
            show(row)
            rows.append(row)
    if args.json is not None:
        write_report(args.json, args, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
