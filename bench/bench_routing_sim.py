"""Simulates routing over workers with small caches: the hit rate of each policy, without engines.

    python bench/bench_routing_sim.py [TRACE] [--requests 2000]

Four workers, each with a cache of `--pages` pages (least recently used pages are evicted), against one worker with four
times the cache. A request is a time, a list of page names and an output length. Loads: chats of several turns, made
here, and a trace in Mooncake's format, if given. Time is virtual; each run takes seconds.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvist.request import WorkerId
from kvist.router.page_runs import HeldPages
from kvist.router.policies import POLICIES
from kvist.router.policy import FleetView, Prompt, WorkerView
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


def hit_rate(
    policy_name: str, requests: Sequence[SimRequest], *, num_workers: int, pages: int, tokens_per_s: float
) -> float:
    """Return the part of all prompt pages that the workers had cached."""
    policy = POLICIES[policy_name].make({})
    workers = {
        f"w{number}": SimWorker(name=f"w{number}", max_pages=pages, tokens_per_s=tokens_per_s, token_s=0.01)
        for number in range(num_workers)
    }
    num_hits = 0
    for request in requests:
        views = [worker.view(request) for worker in workers.values()]
        prompt = Prompt(num_tokens=len(request.pages) * PAGE_TOKENS)
        path = policy.choose(prompt, FleetView.of_workers(views))
        num_hits += workers[path.prefill.worker_id].serve(request)
    return num_hits / sum(len(request.pages) for request in requests)


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


def read_trace(path: Path, num_requests: int) -> list[SimRequest]:
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(num_requests), strict=False)]
    return [
        SimRequest(at_s=row["timestamp"] / 1000, pages=row["hash_ids"], num_output_tokens=row["output_length"])
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--pages", type=int, default=1500, help="pages in the cache of each of the four workers")
    parser.add_argument("--tokens-per-s", type=float, default=30_000.0)
    args = parser.parse_args()
    loads = {"chats": chats()}
    if args.trace is not None:
        loads["trace"] = read_trace(args.trace, args.requests)
    for name, requests in loads.items():
        one = hit_rate("cost", requests, num_workers=1, pages=4 * args.pages, tokens_per_s=4 * args.tokens_per_s)
        print(f"{name}: one worker with four times the cache {one:.3f}")
        for policy in POLICIES:
            rate = hit_rate(policy, requests, num_workers=4, pages=args.pages, tokens_per_s=args.tokens_per_s)
            print(f"  {policy:>12} {rate:.3f}  {rate / one:.1%} of one worker")


if __name__ == "__main__":
    main()
