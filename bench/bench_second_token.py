"""How long do the second token, and the first, take in a pair with a mixed load? Simulated, so no GPU is needed.

    python bench/bench_second_token.py [--rates 6 12] [--seconds 60] [--json out.json]

Chats of 512 + 256 tokens with one prompt of 8192 + 128 in every four, Poisson arrivals, over the real loops and
schedulers of a prefill and a decode engine, with the step times of a 7B model on two H200s
(simulation/timed_pair.py). The baseline, in the same run: loops that handle nothing until the step in flight has ended.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from json_report import write_report
from kvist.request import EngineRequest
from kvist.simulation.timed_pair import VOCAB, TimedPair, Timing
from kvist.testing.specs import make_request

GRACE_S = 10.0  # after the last arrival


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The times of one request, in milliseconds."""

    kind: str
    ttft_ms: float
    second_token_ms: float
    largest_gap_ms: float
    gaps_ms: list[float]


def make_load(rate: float, seconds: float, seed: int) -> list[tuple[float, str, EngineRequest]]:
    """Return (arrival, kind, request) for each request."""
    rng, now_s = random.Random(seed), 1.0
    load: list[tuple[float, str, EngineRequest]] = []
    while (now_s := now_s + rng.expovariate(rate)) < 1.0 + seconds:
        kind, num_in, num_out = ("long", 8192, 128) if len(load) % 4 == 3 else ("chat", 512, 256)
        prompt = tuple(rng.randrange(VOCAB) for _ in range(num_in))
        load.append((now_s, kind, make_request(f"r{len(load)}", prompt, max_tokens=num_out, ignore_eos=True)))
    return load


def measure(load: list[tuple[float, str, EngineRequest]], *, blocks: bool) -> list[Row]:
    pair, rows = TimedPair(Timing(), blocks=blocks), []
    for at_s, _, request in load:
        pair.submit(request, at_s)
    pair.run(load[-1][0] + GRACE_S)
    for at_s, kind, request in load:
        gaps_ms = [1e3 * gap_s for gap_s in pair.gaps_s(request.request_id)]
        assert len(gaps_ms) == request.sampling.max_tokens - 1, "the answer is complete"
        ttft_ms = 1e3 * (pair.token_times_s[request.request_id][0] - at_s)
        rows.append(
            Row(
                kind=kind,
                ttft_ms=ttft_ms,
                second_token_ms=gaps_ms[0],
                largest_gap_ms=max(gaps_ms),
                gaps_ms=gaps_ms,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[6.0, 12.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=60.0, help="simulated time of arrivals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    each: list[dict[str, object]] = []
    print("milliseconds   TTFT mean    p90 | second token p50    p99 | largest gap of a chat p50    p99 | ITL p99")
    for rate in args.rates:
        load = make_load(rate, args.seconds, args.seed)
        for name, blocks in (("blocked", True), ("free", False)):
            rows = measure(load, blocks=blocks)
            chats = [row for row in rows if row.kind == "chat"]
            ttfts, gaps = [row.ttft_ms for row in rows], [gap for row in rows for gap in row.gaps_ms]
            seconds = [row.second_token_ms for row in chats]
            largest = [row.largest_gap_ms for row in chats]
            print(
                f"{rate:4g}/s {name:>8} {sum(ttfts) / len(ttfts):9.1f} {np.quantile(ttfts, 0.9):6.1f} |"
                f"{np.quantile(seconds, 0.5):17.1f} {np.quantile(seconds, 0.99):6.1f} |"
                f"{np.quantile(largest, 0.5):26.1f} {np.quantile(largest, 0.99):6.1f} |{np.quantile(gaps, 0.99):8.1f}"
            )
            each += [
                {"rate": rate, "loop": name, "kind": row.kind, "ttft_ms": row.ttft_ms, "gaps_ms": row.gaps_ms}
                for row in rows
            ]
    if args.json:
        write_report(args.json, args, rows=each)


if __name__ == "__main__":
    main()
