"""Simulates routing over workers with small caches: hit rate and TTFT of each policy, without engines.

    python bench/bench_routing_sim.py [TRACE] [--requests 2000] [--windows 1] [--others 0,1,2,3,5,10] [--json FILE]

Four workers, each with a cache of `--pages` pages (least recently used pages are evicted), against one worker with four
times the cache. A request is a time, a list of page names and an output length. Loads: chats of several turns, made
here, and a trace in Mooncake's format, if given; `--windows` is the number of its parts, of `--requests` requests each.
`--others` runs the policy `cost` with each of these weights instead of all policies. Time is virtual; each run takes
seconds.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from json_report import write_report
from kvist.page_index.page_runs import HeldPages
from kvist.request import WorkerId
from kvist.router.policies import POLICIES
from kvist.router.policies.cost import Cost
from kvist.router.policy import FleetView, Policy, Prompt, WorkerView
from kvist.router.rates import Rates

PAGE_TOKENS = 512
MAX_RUNNING = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SimRequest:
    at_s: float
    pages: Sequence[int]
    num_output_tokens: int


@dataclass(slots=True, kw_only=True)
class SimWorker:
    """Computes prompts one after the other; its answers run beside them. Mutable."""

    name: str
    max_pages: int
    tokens_per_s: float
    token_s: float
    free_at_s: float = 0.0  # when its last prompt is computed
    ends_s: list[float] = field(default_factory=list)  # of its requests
    pages: OrderedDict[int, None] = field(default_factory=OrderedDict)  # least recently used first

    def num_held(self, pages: Sequence[int]) -> int:
        return next((number for number, page in enumerate(pages) if page not in self.pages), len(pages))

    def view(self, request: SimRequest) -> WorkerView:
        self.ends_s = [end for end in self.ends_s if end > request.at_s]
        return WorkerView(
            worker_id=WorkerId(self.name),
            page_size=PAGE_TOKENS,
            num_requests=len(self.ends_s),
            num_pending_tokens=int(max(0.0, self.free_at_s - request.at_s) * self.tokens_per_s),
            num_known_pages=len(self.pages),
            held=HeldPages(self.num_held(request.pages), 0),
            max_running_requests=MAX_RUNNING,
            service_s=request.num_output_tokens * self.token_s,
            rates=Rates(prompt_tokens_per_s=self.tokens_per_s),
        )

    def serve(self, request: SimRequest) -> int:
        """Compute the request; return how many of its pages were hits."""
        num_hits = self.num_held(request.pages)
        num_missing = max(1, (len(request.pages) - num_hits) * PAGE_TOKENS)
        self.free_at_s = max(self.free_at_s, request.at_s) + num_missing / self.tokens_per_s
        self.ends_s.append(self.free_at_s + request.num_output_tokens * self.token_s)
        for page in reversed(request.pages):  # the head of a prefix is evicted last
            self.pages[page] = None
            self.pages.move_to_end(page)
        while len(self.pages) > self.max_pages:
            self.pages.popitem(last=False)
        return num_hits


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    hit_rate: float  # part of all prompt pages that the workers had cached
    ttft_s: Sequence[float]  # ascending

    def ttft_at(self, part: float) -> float:
        return self.ttft_s[int(part * (len(self.ttft_s) - 1))]


def simulate(
    policy: Policy, requests: Sequence[SimRequest], *, num_workers: int, pages: int, tokens_per_s: float
) -> Outcome:
    workers = {
        f"w{number}": SimWorker(name=f"w{number}", max_pages=pages, tokens_per_s=tokens_per_s, token_s=0.01)
        for number in range(num_workers)
    }
    num_hits, ttft_s = 0, list[float]()
    for request in requests:
        views = [worker.view(request) for worker in workers.values()]
        prompt = Prompt(num_tokens=len(request.pages) * PAGE_TOKENS)
        worker = workers[policy.choose(prompt, FleetView.of_workers(views)).prefill.worker_id]
        num_hits += worker.serve(request)
        ttft_s.append(worker.free_at_s - request.at_s)
    return Outcome(hit_rate=num_hits / sum(len(request.pages) for request in requests), ttft_s=sorted(ttft_s))


def chats(num_chats: int = 120, num_turns: int = 8, *, seed: int = 0) -> list[SimRequest]:
    """Return chats whose turns come in any order: each turn adds pages to those of the turn before."""
    draws, requests = random.Random(seed), list[SimRequest]()
    for chat in range(num_chats):
        at_s, pages = draws.uniform(0, 200), [-1, -2]  # a common system prompt
        for turn in range(num_turns):
            pages = [*pages, *(chat * 10_000 + turn * 100 + number for number in range(draws.randint(1, 4)))]
            requests.append(SimRequest(at_s=at_s, pages=pages, num_output_tokens=100))
            at_s += draws.expovariate(1 / 20)
    return sorted(requests, key=lambda request: request.at_s)


def read_trace(path: Path, num_requests: int, num_windows: int = 1) -> list[list[SimRequest]]:
    """Return the first windows of `num_requests` requests each."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(num_requests * num_windows), strict=False)]
    requests = [
        SimRequest(at_s=row["timestamp"] / 1000, pages=row["hash_ids"], num_output_tokens=row["output_length"])
        for row in rows
    ]
    return [requests[start : start + num_requests] for start in range(0, len(requests), num_requests)]


def compare(
    policies: Mapping[str, Callable[[], Policy]], windows: Sequence[Sequence[SimRequest]], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield a row for each policy, on the average of the windows; the first is one worker with four times the cache."""
    ones = [
        simulate(Cost(), window, num_workers=1, pages=4 * args.pages, tokens_per_s=4 * args.tokens_per_s)
        for window in windows
    ]
    for name, make in {"one worker": None, **policies}.items():
        found = ones if make is None else [
            simulate(make(), window, num_workers=4, pages=args.pages, tokens_per_s=args.tokens_per_s)
            for window in windows
        ]  # fmt: skip
        yield {
            "policy": name,
            "hit_rate": fmean(each.hit_rate for each in found),
            "of_one_worker": fmean(each.hit_rate / one.hit_rate for each, one in zip(found, ones, strict=True)),
            "ttft_mean_s": fmean(fmean(each.ttft_s) for each in found),
            **{f"ttft_p{part}_s": fmean(each.ttft_at(part / 100) for each in found) for part in (50, 90, 99)},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--pages", type=int, default=1500, help="pages in the cache of each of the four workers")
    parser.add_argument("--tokens-per-s", type=float, default=30_000.0)
    parser.add_argument("--others", type=lambda text: [float(each) for each in text.split(",")], default=[])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    loads = {"chats": [chats()]}
    if args.trace is not None:
        loads["trace"] = read_trace(args.trace, args.requests, args.windows)
    policies: dict[str, Callable[[], Policy]] = {name: partial(POLICIES[name].make, {}) for name in POLICIES}
    if args.others:
        policies = {f"cost, {weight:g}": partial(Cost, weight) for weight in args.others}
    rows = list[dict[str, Any]]()
    for load, windows in loads.items():
        print(f"{load:<14}{'hit rate':>9}{'of one':>9}{'TTFT mean':>11}{'p50':>8}{'p90':>8}{'p99 s':>8}")
        for row in compare(policies, windows, args):
            rows.append({"load": load, **row})
            figures = [row[f"ttft_{name}_s"] for name in ("mean", "p50", "p90", "p99")]
            print(f"{row['policy']:<14}{row['hit_rate']:>9.3f}{row['of_one_worker']:>9.1%}{figures[0]:>11.3f}"
                  + "".join(f"{figure:>8.3f}" for figure in figures[1:]))  # fmt: skip
    if args.json:
        write_report(args.json, args, rows=rows)


if __name__ == "__main__":
    main()
