"""How much does a plan save? The programs of examples/lang with a plan, without one, and written by hand.

    python bench/bench_lang.py [WORKLOAD ...] [--url URL | --prefill 1 --decode 1 --serve-args "..."] [--json FILE]
    python bench/bench_lang.py --serve-args "--model-path M --load-format dummy --dtype bfloat16" --no-check \\
        --prefill 1 --decode 1 --scale 2 --length 4 --rounds 2 --within-s 240 --json lang.json     # on GPUs

Three ways do the same work on one cluster: `plan`, `no plan` (the same program, one request at a time for each of its
runs), and `by hand` (asyncio and OpenAI's API, bench/lang_by_hand.py). They take turns in another order each round;
before each turn the cache is flushed. Times are the best of the rounds, ratios of times the median of the rounds'.
Computed tokens and CPU seconds are the workers' own counters (no CPU seconds on a GPU); on a shared CPU, compare these.
`client` and `gateway` are CPU milliseconds a request: of this process, and of the gateway's (a clock of 10 ms). Both
clients of a program are made, and have asked for the model, before the time of a turn begins.
`ideal` computes each distinct prefix of the prompts once; `in pages` is the same where only whole pages can be shared,
as the cache does. `planning` is the planner's time for an operation, by the clock and of a processor.

Without `--url` a cluster of the embedded model is started on the CPU; `--serve-args` are further flags of `kvist up`.
`--scale` multiplies the runs of each batch, `--length` the length of its texts. In its first round, each workload
checks that plan and no plan give the same texts; random weights in bf16 need `--no-check`. With `--within-s`, rounds
end, and workloads are left out, before that time is over.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

import kvist.lang as kv
from json_report import write_report
from kvist.execution.backend import prompt_fields
from kvist.execution.report import Report
from kvist.planning.graph import Generate, Score
from lang_by_hand import ByHand
from lang_client import CLIENTS, usual_client
from served import REPORT_INTERVAL_S, BenchServer
from tiers_table import table

sys.path.append(str(Path(__file__).parents[1] / "examples" / "lang"))

WORKLOADS = {  # name: runs in a batch; the cheap ones first
    "judge": 8,
    "tree_of_thought": 1,
    "few_shot": 100,
    "self_consistency": 4,
    "chat_tools": 4,
    "rag": 2,
    "extract": 50,
}
PLAN, NO_PLAN, BY_HAND_WAY = WAYS = ("plan", "no plan", "by hand")
READY_TIMEOUT_S, REPORT_TIMEOUT_S, REQUEST_TIMEOUT_S, RUN_TIMEOUT_S = 300.0, 30.0, 60.0, 1800.0
SEED = 1
CPU_SECONDS = "process_cpu_seconds"  # of an engine
_GATEWAY_CPU = re.compile(rf"^{CPU_SECONDS}_total (\S+)$", re.MULTILINE)
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One way of doing a workload, once."""

    wall_s: float
    num_computed_tokens: int
    cpu_s: float  # of all workers
    client_cpu_s: float  # of this process, the program included
    gateway_cpu_s: float
    planning_ms: float | None = None  # for each operation
    planning_cpu_ms: float | None = None  # of it, with a processor: not in a wait for the programs' threads


@dataclass(slots=True, kw_only=True)
class Measured:
    """The turns of one workload, by way; what the first round says of its texts and prompts. Mutable."""

    turns: dict[str, list[Turn]] = field(default_factory=lambda: {way: [] for way in WAYS})
    texts: dict[str, list[str]] = field(default_factory=dict)
    prompts: list[tuple[int, ...]] = field(default_factory=list)  # token ids, sorted

    def best(self, way: str) -> Turn:
        return min(self.turns[way], key=lambda turn: turn.wall_s)

    def ratio(self, way: str) -> float:
        """Return how many times longer `way` takes than a plan, as the median of the rounds."""
        pairs = zip(self.turns[way], self.turns[PLAN], strict=True)
        return statistics.median(other.wall_s / planned.wall_s for other, planned in pairs)


class Cluster:
    """The server under test: its counters, its cache, its tokenizer."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S, trust_env=False)
        end_s = time.monotonic() + REPORT_TIMEOUT_S
        while not all(each["load"] and each["capacity"] for each in self._workers()):
            if time.monotonic() > end_s:
                raise SystemExit(f"a worker of {url} has not reported its load within {REPORT_TIMEOUT_S:g} s")
            time.sleep(REPORT_INTERVAL_S)
        self._counted = self._totals()
        self.page_size = max(int(each["capacity"]["page_size"]) for each in self._workers())

    def take_counts(self) -> tuple[float, ...]:
        """Return the prompt tokens that all workers have computed since the last call, their CPU seconds, and the CPU
        seconds of the gateway's process."""
        before, self._counted = self._counted, self._totals()
        return tuple(now - then for now, then in zip(self._counted, before, strict=True))

    def _totals(self) -> tuple[float, ...]:
        time.sleep(REPORT_INTERVAL_S)
        totals = [each["load"]["totals"] for each in self._workers()]
        workers = [sum(each.get(name) or 0 for each in totals) for name in ("computed_prompt_tokens", CPU_SECONDS)]
        metrics = self._http.get("/metrics").raise_for_status().text
        return *workers, float(_GATEWAY_CPU.findall(metrics)[0])

    def _workers(self) -> list[Any]:
        found: list[Any] = self._http.get("/server_info").raise_for_status().json()["workers"]
        return found

    def flush(self) -> None:
        self._http.post("/flush_cache").raise_for_status()

    def prompts_of(self, report: Report) -> list[tuple[int, ...]]:
        """Return the token ids of the prompts of a run, sorted."""
        operations = (each.operation for each in report.requests)
        prompts = [each.prompt for each in operations if isinstance(each, Generate | Score)]
        token_ids = {prompt: tuple(self._tokens(prompt_fields(prompt))) for prompt in set(prompts)}
        return sorted(token_ids[prompt] for prompt in prompts)

    def _tokens(self, fields: dict[str, object]) -> list[int]:
        found: list[int] = self._http.post("/tokenize", json=fields).raise_for_status().json()["tokens"]
        return found


def distinct_tokens(prompts: Sequence[tuple[int, ...]], page_size: int = 1) -> int:
    """Return the tokens of sorted prompts, each common beginning once. Only whole pages are common, and beyond them
    each request computes its last token at least."""
    count, before = 0, tuple[int, ...]()
    for tokens in prompts:
        differing = (n for n, (one, other) in enumerate(zip(before, tokens, strict=False)) if one != other)
        common = next(differing, min(len(before), len(tokens)))
        if page_size > 1 and common == len(tokens):
            common -= 1
        count += len(tokens) - common // page_size * page_size
        before = tokens
    return count


def take_turn(
    cluster: Cluster, endpoint: kv.Endpoint, by_hand: ByHand, name: str, way: str, batch: Sequence[Any]
) -> tuple[Turn, list[kv.ProgramState]]:
    """Return the turn, and the states of a program."""
    program: kv.Function = getattr(importlib.import_module(name), name)
    cluster.flush()
    cluster.take_counts()
    states: list[kv.ProgramState] = []
    start_s, start_cpu_s = time.monotonic(), time.process_time()
    if way == BY_HAND_WAY:
        by_hand.run(name, batch)
    else:
        settings: dict[str, Any] = {"plan": way == PLAN, "seed": SEED, "timeout_s": RUN_TIMEOUT_S}
        states = program.run_batch(batch, backend=endpoint, temperature=0, **settings)
    wall_s, client_cpu_s = time.monotonic() - start_s, time.process_time() - start_cpu_s
    report = states[0].report if way == PLAN else None
    num_computed, cpu_s, gateway_cpu_s = cluster.take_counts()
    turn = Turn(
        wall_s=wall_s,
        num_computed_tokens=int(num_computed),
        cpu_s=cpu_s,
        client_cpu_s=client_cpu_s,
        gateway_cpu_s=gateway_cpu_s,
    )
    if report is not None:
        took, cpu = (1000 * each / max(report.num_planned, 1) for each in (report.planning_s, report.planning_cpu_s))
        turn = replace(turn, planning_ms=took, planning_cpu_ms=cpu)
    return turn, states


def measure(cluster: Cluster, args: argparse.Namespace, end_s: float) -> Iterator[Row]:
    endpoint = kv.RuntimeEndpoint(cluster.url, timeout_s=RUN_TIMEOUT_S)
    with ByHand(args.client, cluster.url) as by_hand:
        yield from _measure(cluster, endpoint, by_hand, args, end_s)
    endpoint.close()


def _measure(
    cluster: Cluster, endpoint: kv.Endpoint, by_hand: ByHand, args: argparse.Namespace, end_s: float
) -> Iterator[Row]:
    for name in args.workloads:
        batch = importlib.import_module(name).arguments(max(1, round(WORKLOADS[name] * args.scale)), args.length)
        found = Measured()
        for number in range(args.rounds):
            start_s = time.monotonic()
            for way in (*WAYS[number % 3 :], *WAYS[: number % 3]):
                turn, states = take_turn(cluster, endpoint, by_hand, name, way, batch)
                found.turns[way].append(turn)
                if states and number == 0:
                    found.texts[way] = [state.text() for state in states]
                if way == PLAN and number == 0:
                    found.prompts = cluster.prompts_of(states[0].report)
            now_s = time.monotonic()
            if now_s + (now_s - start_s) > end_s:
                break
        if args.check and found.texts[PLAN] != found.texts[NO_PLAN]:
            raise SystemExit(f"{name}: plan and no plan gave different texts")
        yield row_of(name, len(batch), found, cluster.page_size)
        if time.monotonic() > end_s:
            break


def row_of(name: str, num_runs: int, found: Measured, page_size: int) -> Row:
    per_request_ms = 1000 / max(len(found.prompts), 1)
    ideal, in_pages = distinct_tokens(found.prompts), distinct_tokens(found.prompts, page_size)
    num_computed = found.best(PLAN).num_computed_tokens
    return {
        "workload": name,
        "runs": num_runs,
        "rounds": len(found.turns[PLAN]),
        **{f"{way} s": found.best(way).wall_s for way in WAYS},
        "by hand / plan": found.ratio(BY_HAND_WAY),
        "no plan / plan": found.ratio(NO_PLAN),
        **{f"{way} CPU s": min(turn.cpu_s for turn in found.turns[way]) for way in WAYS},
        **{f"{way} client": per_request_ms * min(turn.client_cpu_s for turn in found.turns[way]) for way in WAYS},
        **{f"{way} gateway": per_request_ms * min(turn.gateway_cpu_s for turn in found.turns[way]) for way in WAYS},
        **{f"{way} tokens": found.best(way).num_computed_tokens for way in WAYS},
        "ideal": ideal,
        "in pages": in_pages,
        "tokens / ideal": num_computed / max(ideal, 1),
        "tokens / in pages": num_computed / max(in_pages, 1),
        "planning ms": found.best(PLAN).planning_ms,
        "planning CPU ms": found.best(PLAN).planning_cpu_ms,
        "turns": {way: [[turn.wall_s, turn.num_computed_tokens] for turn in found.turns[way]] for way in WAYS},
    }


def shown(rows: Sequence[Row]) -> str:
    header = [name for name in rows[0] if name != "turns"]
    return table(header, [[_cell(row[name]) for name in header] for row in rows])


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def cluster_of(args: argparse.Namespace) -> Iterator[Cluster]:
    if args.url:
        yield Cluster(args.url)
        return
    flags = [f"--{role}={getattr(args, role)}" for role in ("prefill", "decode", "unified")]
    flags += shlex.split(args.serve_args)
    with tempfile.TemporaryDirectory() as logs, BenchServer("lang", flags, Path(logs), verb="up") as server:
        server.start(READY_TIMEOUT_S)
        yield Cluster(server.url)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; by default all")
    parser.add_argument("--url", help="a running Kvist server")
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--unified", type=int, default=0)
    parser.add_argument("--serve-args", default="", help="further flags of kvist up")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the runs of each batch")
    parser.add_argument("--length", type=int, default=1, help="multiplies the length of all texts")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--within-s", type=float, default=3600.0, help="time for all rounds, after the server's start")
    parser.add_argument("--client", choices=CLIENTS, default=usual_client(), help="of the programs by hand")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.workloads = args.workloads or list(WORKLOADS)
    if unknown := set(args.workloads) - set(WORKLOADS):
        parser.error(f"unknown workload {', '.join(sorted(unknown))}; known: {', '.join(WORKLOADS)}")
    rows: list[Row] = []
    with cluster_of(args) as cluster:
        start_s = time.monotonic()
        for row in measure(cluster, args, start_s + args.within_s):
            rows.append(row)
            print(f"{time.monotonic() - start_s:.0f} s: {row['workload']}", flush=True)
            if args.json is not None:  # after each row, so that a run that is cut off leaves its rows
                write_report(args.json, args, rows=rows)
    print(shown(rows))
    if left := [name for name in args.workloads if name not in {row["workload"] for row in rows}]:
        print(f"not measured, for lack of time: {', '.join(left)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
