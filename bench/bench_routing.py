"""What does it cost to choose the workers for a request, and to tokenise the next turn of a long chat?

    python bench/bench_routing.py [--num-requests 1000000] [--json FILE]

Routes prompts of 1,000 to 100,000 tokens over workers that hold their pages: the next turn of a chat, a prompt that no
worker holds, and a prompt that is new to this gateway. Prints p50/p95/p99 of the CPU time in microseconds, and the
limit: 200 µs and 20 µs for each 1,000 prompt tokens. The baseline, measured in the same run, computes every digest and
looks each one up in one set for each worker, without choosing a worker.

Then routes `--num-requests` requests of many chats while pages come and go, and prints how many objects and entries the
gateway has after each tenth: they must not grow. `--json` writes one row a measured call. Exits with an error over a
limit.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from json_report import write_report
from kvist.checkpoint import find_checkpoint
from kvist.kv.keys import page_digests
from kvist.request import EngineRequest, EpochId, WorkerId
from kvist.router.config import RouterConfig
from kvist.router.registry import Registry, Worker
from kvist.router.route import Router
from kvist.testing.specs import make_request, make_roomy_spec
from kvist.text import PromptEncoder, load_tokenizer
from kvist.wire import DIGEST_BYTES, MAX_DIGESTS, ListedPages, PageEvents, TierChanges, Welcome

PAGE_SIZE, VOCAB = 16, 150_000
BASE_US, PER_1000_TOKENS_US = 200.0, 20.0
LIMITED = ("next turn", "no hit")
Row = tuple[str, int, float]  # case, tokens, µs


class World:
    """A gateway with ready workers."""

    def __init__(self, num_workers: int, rng: random.Random) -> None:
        self.rng = rng
        self.registry = Registry(RouterConfig())
        self.router = Router(RouterConfig(), self.registry)
        self.workers = [self._join(number) for number in range(num_workers)]
        self.pages: list[set[bytes]] = [set() for _ in self.workers]  # of the baseline
        self._sequences = [1] * num_workers

    def _join(self, number: int) -> Worker:
        worker = self.registry.add(f"http://w{number}", None, 0.0)
        spec = make_roomy_spec(worker_id=WorkerId(f"w{number}"), epoch=EpochId(f"e{number}"), vocab_size=VOCAB)
        self.registry.on_welcome(worker, Welcome(spec=spec), 0.0)
        assert worker.pages is not None
        worker.pages.request(0.0)
        nothing = ListedPages(tier="device", first_piece=0)
        self.registry.on_page_events(worker, PageEvents(sequence=0, listed=(nothing,)), 0.0)
        return worker

    def change(self, number: int, *, stored: list[bytes], removed: list[bytes] | None = None) -> None:
        """Let a worker report that pages entered and left its device pool."""
        for start in range(0, max(len(stored), len(removed or ())), MAX_DIGESTS):
            changes = TierChanges(
                tier="device",
                stored=_short(stored[start : start + MAX_DIGESTS]),
                removed=_short((removed or [])[start : start + MAX_DIGESTS]),
            )
            events = PageEvents(sequence=self._sequences[number], changes=(changes,))
            self._sequences[number] += 1
            self.registry.on_page_events(self.workers[number], events, 0.0)
        while self.registry.index.has_work:
            self.registry.index.work(1 << 14)

    def prompt(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self.rng.randrange(VOCAB) for _ in range(num_tokens))

    def baseline(self, request: EngineRequest) -> int:
        digests = page_digests(request.prompt_token_ids, PAGE_SIZE, "n")
        return max(
            next((i for i, digest in enumerate(digests) if digest not in held), len(digests)) for held in self.pages
        )


def _short(digests: list[bytes]) -> bytes:
    return b"".join([digest[:DIGEST_BYTES] for digest in digests])


def _request(prompt: tuple[int, ...]) -> EngineRequest:
    return make_request("r", prompt, max_tokens=100)


def _timed_us(call: Callable[[], object]) -> float:
    start_ns = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - start_ns) / 1e3


def routing_cases(args: argparse.Namespace, rng: random.Random) -> Iterator[Row]:
    for num_tokens in (1_000, 10_000, 100_000):
        world = World(args.num_workers, rng)
        for _ in range(args.num_rounds):
            number = rng.randrange(args.num_workers)
            prompt = world.prompt(num_tokens)
            digests = page_digests(prompt, PAGE_SIZE, "n")
            world.change(number, stored=digests)
            world.pages[number] |= set(digests)
            fresh = Router(RouterConfig(), world.registry)  # as after a restart of the gateway
            turn, other = _request(prompt), _request(world.prompt(num_tokens))
            yield "new to this gateway", num_tokens, _timed_us(partial(fresh.choose, turn))
            world.router.choose(_request(prompt[: num_tokens - 300]))
            yield "next turn", num_tokens, _timed_us(partial(world.router.choose, turn))
            assert world.router.choose(turn).prefill is world.workers[number]
            yield "baseline", num_tokens, _timed_us(partial(world.baseline, turn))
            yield "no hit", num_tokens, _timed_us(partial(world.router.choose, other))


def tokenising_cases(args: argparse.Namespace, rng: random.Random) -> Iterator[Row]:
    tokenizer = load_tokenizer(find_checkpoint(None))
    words = ["prefill", "decode", "page", "the", "worker", "cache", "naïve", "12345", "x=1;", "def", "\n"]
    encoder, text = PromptEncoder(tokenizer), ""
    for _ in range(args.num_rounds):
        text += f"<|im_start|>user\n{' '.join(rng.choices(words, k=1500))}<|im_end|>\n"
        if len(text) > 400_000:
            text = text[:20_000]
        num_tokens = len(tokenizer.encode(text))
        yield "tokenise the next turn", num_tokens, _timed_us(partial(encoder.encode_up_to, text, 1 << 20))
        yield "tokenise the whole chat", num_tokens, _timed_us(partial(tokenizer.encode, text))


def sizes_over(num_requests: int, args: argparse.Namespace, rng: random.Random) -> Iterator[tuple[int, int, int, int]]:
    """Route many requests while pages come and go. Yield objects, chunks, entries and bytes after each tenth."""
    world = World(args.num_workers, rng)
    held: list[list[bytes]] = [[] for _ in world.workers]
    base = world.prompt(2_000)
    for number in range(num_requests):
        prompt = (*base[: rng.randrange(2_000)], *world.prompt(200))
        route = world.router.choose(_request(prompt))
        if number % 10 == 0:
            chosen = world.workers.index(route.prefill)
            new = page_digests(prompt, PAGE_SIZE, "n")
            held[chosen] += new
            gone, held[chosen] = held[chosen][:-20_000], held[chosen][-20_000:]
            world.change(chosen, stored=new, removed=[digest for digest in gone if digest not in set(new)])
        if (number + 1) % max(1, num_requests // 10) == 0:
            gc.collect()
            index = world.registry.index
            yield len(gc.get_objects()), world.router.num_remembered_chunks, index.num_entries, index.num_bytes


def report(rows: list[Row]) -> bool:
    """Print the figures. Return whether a case is over its limit."""
    over = False
    print(f"{'case':<26}{'tokens':>9}{'p50 µs':>9}{'p95 µs':>9}{'p99 µs':>9}{'limit µs':>10}")
    for case, tokens in dict.fromkeys((case, tokens if case in (*LIMITED, "new to this gateway", "baseline") else 0)
                                      for case, tokens, _ in rows):  # fmt: skip
        samples = [us for name, count, us in rows if name == case and tokens in (0, count)]
        cuts = statistics.quantiles(samples, n=100, method="inclusive")
        limit = BASE_US + PER_1000_TOKENS_US * tokens / 1000
        is_limited = case in LIMITED
        over |= is_limited and cuts[49] > limit
        shown = f"{limit:>10.0f}" if is_limited else ""
        print(f"{case:<26}{tokens or 'various':>9}{cuts[49]:>9.0f}{cuts[94]:>9.0f}{cuts[98]:>9.0f}{shown}")
    return over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write every measured call to this file")
    parser.add_argument("--num-workers", type=int, default=8)
    parser.add_argument("--num-rounds", type=int, default=30, help="calls of each case")
    parser.add_argument("--num-requests", type=int, default=20_000, help="of the test of memory; 1000000 takes minutes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rows = [*routing_cases(args, rng), *tokenising_cases(args, rng)]
    over = report(rows)
    sizes = [*sizes_over(args.num_requests, args, rng)]
    print(f"\n{'requests':>10}{'objects':>10}{'chunks':>9}{'pages':>9}{'bytes':>11}")
    for tenth, (num_objects, num_chunks, num_entries, num_bytes) in enumerate(sizes, 1):
        print(f"{tenth * args.num_requests // 10:>10}{num_objects:>10}{num_chunks:>9}{num_entries:>9}{num_bytes:>11}")
    if args.json:
        each = [{"case": case, "num_tokens": tokens, "cpu_us": us} for case, tokens, us in rows]
        write_report(args.json, args, rows=each, sizes=sizes)
    sys.exit("over the limits" if over else 0)


if __name__ == "__main__":
    main()
