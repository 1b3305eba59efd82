"""How long do the page cache's calls take, for a 32k-token prompt and for a decode step of 256 requests?

    python bench/bench_radix.py [--json FILE]

Prints p50/p90/p99 in milliseconds for each case. The baseline of the match cases, measured in the same run, is the
other common design: one hash a page, chained over the prefix, looked up in a flat dictionary. `--json` writes
{commit, hardware, settings, rows}, one row a measured call.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from json_report import write_report
from kvist.kv.cache import PageCache
from kvist.kv.keys import page_digests
from kvist.kv.lease import PageLease

NAMESPACE = "bench"
LIMITS_MS = {"open 32k prompt, all cached": 2.0, "decode step, grow + commit": 0.3}  # the limits that the docs state


def timed(call: Callable[[], object]) -> float:
    start_ns = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start_ns) / 1e6


def filled_cache(prompts: list[list[int]], *, page_size: int, num_spare_pages: int) -> PageCache:
    """Return a cache that holds every prompt, unpinned, and `num_spare_pages` free pages."""
    num_pages = sum(len(prompt) // page_size for prompt in prompts) + num_spare_pages
    cache = PageCache(num_pages=num_pages, page_size=page_size, namespace=NAMESPACE)
    for prompt in prompts:
        cache.close(written_lease(cache, prompt))
    return cache


def written_lease(cache: PageCache, tokens: list[int]) -> PageLease:
    lease = cache.open(tokens, max_tokens=len(tokens))
    assert cache.grow(lease, len(tokens))
    cache.insert(lease, tokens, len(tokens))
    return lease


def match_cases(prompts: list[list[int]], page_size: int, num_rounds: int) -> Iterator[tuple[str, float]]:
    cache = filled_cache(prompts, page_size=page_size, num_spare_pages=0)
    flat = {digest: 0 for prompt in prompts for digest in page_digests(prompt, page_size, NAMESPACE)}

    def flat_match(prompt: list[int]) -> int:
        return sum(1 for digest in page_digests(prompt, page_size, NAMESPACE) if digest in flat)

    for round_index in range(num_rounds):
        prompt = prompts[round_index % len(prompts)]
        cold = [prompt[0] + 1, *prompt[1:]]
        start_ns = time.perf_counter_ns()
        lease = cache.open(cold, max_tokens=len(cold))
        yield "open 32k prompt, none cached", (time.perf_counter_ns() - start_ns) / 1e6
        cache.close(lease)
        yield "baseline: chained hashes in a flat dict", timed(partial(flat_match, prompt))
        yield "page_digests of a 32k prompt", timed(partial(page_digests, prompt, page_size, NAMESPACE))
        start_ns = time.perf_counter_ns()
        lease = cache.open(prompt, max_tokens=len(prompt))
        yield "open 32k prompt, all cached", (time.perf_counter_ns() - start_ns) / 1e6
        yield "close 32k prompt", timed(partial(cache.close, lease))


def fill_cases(num_tokens: int, page_size: int, num_rounds: int, rng: random.Random) -> Iterator[tuple[str, float]]:
    prompts = [random_tokens(rng, num_tokens) for _ in range(2)]
    cache = filled_cache(prompts, page_size=page_size, num_spare_pages=0)
    for _ in range(num_rounds):
        prompt = random_tokens(rng, num_tokens)
        lease = cache.open(prompt, max_tokens=num_tokens)
        yield "grow by 32k tokens, all by eviction", timed(partial(cache.grow, lease, num_tokens))
        yield "commit 32k new tokens", timed(partial(cache.insert, lease, prompt, num_tokens))
        cache.close(lease)


def decode_cases(
    num_requests: int, num_tokens: int, page_size: int, num_steps: int, rng: random.Random
) -> Iterator[tuple[str, float]]:
    num_pages = num_requests * ((num_tokens + num_steps) // page_size + 2)
    cache = PageCache(num_pages=num_pages, page_size=page_size, namespace=NAMESPACE)
    streams = [random_tokens(rng, num_tokens + rng.randrange(page_size)) for _ in range(num_requests)]
    leases = [written_lease(cache, stream) for stream in streams]

    def step() -> None:
        for lease, stream in zip(leases, streams, strict=True):
            assert cache.grow(lease, len(stream) + 1)
            cache.insert(lease, stream, len(stream))

    for _ in range(num_steps):
        yield "decode step, grow + commit", timed(step)
        for stream in streams:
            stream.append(rng.randrange(150_000))


def random_tokens(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(150_000) for _ in range(num_tokens)]


def report(rows: list[tuple[str, float]]) -> None:
    print(f"{'case':<42}{'p50 ms':>9}{'p90 ms':>9}{'p99 ms':>9}{'calls':>7}")
    for case in dict.fromkeys(case for case, _ in rows):
        samples = [duration_ms for name, duration_ms in rows if name == case]
        cuts = statistics.quantiles(samples, n=100, method="inclusive")
        limit = f"   limit {LIMITS_MS[case]} ms" if case in LIMITS_MS else ""
        print(f"{case:<42}{cuts[49]:>9.3f}{cuts[89]:>9.3f}{cuts[98]:>9.3f}{len(samples):>7}{limit}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write every measured call to this file")
    parser.add_argument("--num-tokens", type=int, default=32_768, help="tokens in a prompt")
    parser.add_argument("--page-size", type=int, default=16, help="tokens in a page")
    parser.add_argument("--num-requests", type=int, default=256, help="requests in a decode step")
    parser.add_argument("--num-rounds", type=int, default=100, help="calls of each case")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    rng = random.Random(settings.seed)
    prompts = [random_tokens(rng, settings.num_tokens) for _ in range(4)]
    rows = [
        *match_cases(prompts, settings.page_size, settings.num_rounds),
        *fill_cases(settings.num_tokens, settings.page_size, settings.num_rounds, rng),
        *decode_cases(settings.num_requests, 512, settings.page_size, settings.num_rounds, rng),
    ]
    report(rows)
    if settings.json:
        each = [{"case": case, "duration_ms": duration_ms} for case, duration_ms in rows]
        write_report(settings.json, settings, rows=each)


if __name__ == "__main__":
    main()
