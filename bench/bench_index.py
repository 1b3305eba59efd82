"""How long does a gateway take to learn the cached pages of a worker, and how long do streams wait meanwhile?

    python bench/bench_index.py [--num-pages 2300000] [--json FILE]

An engine's log of page events lists the pages, the messages are encoded and decoded as on a socket, and the gateway
applies them in turns of its event loop. Prints the CPU time of both sides in all, the longest turn, the memory of the
index, and the same for a second worker with half of the pages in common, and for the first one's leave. The baseline,
measured in the same run, is a plain dictionary of sets. Fails over the limits. `--json` writes one row a turn.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from json_report import write_report
from kvist import wire
from kvist.engine.gateways import Gateways, PageReader
from kvist.engine.page_events import PageEventLog
from kvist.kv.changes import PageChanges
from kvist.request import EpochId, Role, WorkerId
from kvist.router.config import RouterConfig
from kvist.router.page_queue import PageQueue
from kvist.router.registry import Registry, Worker
from kvist.testing.specs import make_roomy_spec

LIMIT_TOTAL_S, LIMIT_TURN_MS = 1.0, 5.0  # for 2.3 million pages; CPU time of the gateway
LIMITED_PAGES = 2_300_000


class Case(NamedTuple):
    case: str
    total_s: float  # CPU time of the gateway
    turns_ms: list[float]
    engine_longest_ms: float
    num_entries: int
    num_bytes: int


class Engine:
    """An engine with cached pages in the host tier, and one gateway."""

    def __init__(self, digests: list[bytes]) -> None:
        self._changes = PageChanges("host")
        for digest in digests:
            self._changes.on_stored(digest)
        self._log = PageEventLog(list_pages=self._list_pages)
        self._log.record(self._changes.take())
        self._gateways = Gateways(timeout_s=1e9, role=Role.UNIFIED)
        gateway = self._gateways.note_contact(b"g", 0.0)
        assert gateway is not None
        self._now_s = 0.0
        while self._log.due_at_s(self._gateways) < float("inf"):  # the changes are over before the gateway comes
            self._now_s += 1.0
            assert not [*self._log.make(self._gateways, self._now_s)]
        gateway.pages = PageReader()
        self._reader = gateway.pages
        self.turns_ms: list[float] = []

    def _list_pages(self, piece: int) -> wire.ListedPages:
        following = piece + 1 if piece + 1 < self._changes.num_pieces else None
        return wire.ListedPages(
            tier="host", digests=self._changes.piece(piece), first_piece=piece, next_piece=following
        )

    def answer(self, request: wire.ListPages) -> Iterator[bytes]:
        """Yield the messages that an iteration of the engine's loop sends."""
        self._reader.wanted = request
        start_ns = time.thread_time_ns()
        messages = [wire.encode(message) for _, message in self._log.make(self._gateways, self._now_s)]
        self.turns_ms.append((time.thread_time_ns() - start_ns) / 1e6)
        yield from messages


class Gateway:
    def __init__(self) -> None:
        self.registry = Registry(RouterConfig())
        self.turns_ms: list[float] = []
        self.requests: list[tuple[Worker, wire.ListPages]] = []
        self._queue = PageQueue(self.registry.index, self._apply)
        self._decoder = wire.Decoder(wire.EngineToGateway)
        turn = self._queue._turn

        def timed_turn() -> None:
            start_ns = time.thread_time_ns()
            turn()
            self.turns_ms.append((time.thread_time_ns() - start_ns) / 1e6)

        self._queue._turn = timed_turn  # type: ignore[method-assign]

    def join(self, name: str, num_pages: int) -> Worker:
        worker = self.registry.add(f"http://{name}", None, 0.0)
        spec = make_roomy_spec(worker_id=WorkerId(name), epoch=EpochId(name), num_host_pages=num_pages)
        self.registry.on_welcome(worker, wire.Welcome(spec=spec), 0.0)
        self._ask(worker, None if worker.pages is None else worker.pages.request(0.0))
        return worker

    def leave(self, worker: Worker) -> None:
        self.registry.on_lost(worker, "left")
        self._queue.wake()

    def receive(self, worker: Worker, payload: bytes) -> None:
        message = self._decoder.decode(payload)
        assert isinstance(message, wire.PageEvents)
        assert self._queue.put(worker, message)

    def _apply(self, worker: Worker, events: wire.PageEvents) -> None:
        self._ask(worker, self.registry.on_page_events(worker, events, 0.0))

    def _ask(self, worker: Worker, request: wire.ListPages | None) -> None:
        if request is not None:
            self.requests.append((worker, request))


async def restore(gateway: Gateway, worker: Worker, engine: Engine) -> float:
    """List the engine's pages. Return the gateway's CPU time."""
    spent_ns = 0
    while gateway.requests or gateway.registry.index.has_work:
        messages = [each for _, request in gateway.requests for each in engine.answer(request)]
        gateway.requests.clear()
        start_ns = time.thread_time_ns()
        for message in messages:
            gateway.receive(worker, message)
        while gateway._queue._handle is not None and not gateway.requests:
            await asyncio.sleep(0)
        spent_ns += time.thread_time_ns() - start_ns
    return spent_ns / 1e9


async def measure(args: argparse.Namespace) -> list[Case]:
    rng = random.Random(args.seed)
    digests = [rng.randbytes(32) for _ in range(args.num_pages)]
    half = [*digests[: args.num_pages // 2], *(rng.randbytes(32) for _ in range(args.num_pages // 2))]
    gateway, rows = Gateway(), list[Case]()
    gc.collect()
    gc.freeze()

    def record(case: str, total_s: float, engine: Engine | None) -> None:
        index = gateway.registry.index
        turns_ms, gateway.turns_ms = gateway.turns_ms, []
        engine_ms = max(engine.turns_ms) if engine is not None else 0.0
        rows.append(Case(case, total_s, turns_ms, engine_ms, index.num_entries, index.num_bytes))

    engine = Engine(digests)
    first = gateway.join("first", args.num_pages)
    record("a worker joins", await restore(gateway, first, engine), engine)
    engine = Engine(half)
    second = gateway.join("second", args.num_pages)
    record("another joins, half in common", await restore(gateway, second, engine), engine)
    gateway.leave(first)
    record("the first leaves", await restore(gateway, first, engine), None)
    assert gateway.registry.index.num_pages(second.worker_id) == len(half)
    return rows


def baseline(num_pages: int, seed: int) -> float:
    rng = random.Random(seed)
    digests = [rng.randbytes(16) for _ in range(num_pages)]
    start_ns = time.thread_time_ns()
    plain: dict[bytes, set[str]] = {}
    for digest in digests:
        plain.setdefault(digest, set()).add("first")
    return (time.thread_time_ns() - start_ns) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write every turn to this file")
    parser.add_argument("--num-pages", type=int, default=LIMITED_PAGES, help="cached pages of each worker")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable()
    rows = asyncio.run(measure(args))
    print(f"{'case':<32}{'CPU s':>8}{'turns':>7}{'p50 ms':>8}{'longest ms':>12}{'engine ms':>11}{'bytes/page':>12}")
    too_slow = False
    for row in rows:
        turns_ms = sorted(row.turns_ms)
        middle, longest = turns_ms[len(turns_ms) // 2], turns_ms[-1]
        print(
            f"{row.case:<32}{row.total_s:>8.3f}{len(turns_ms):>7}{middle:>8.2f}{longest:>12.2f}"
            f"{row.engine_longest_ms:>11.2f}{row.num_bytes / max(1, row.num_entries):>12.1f}"
        )
        too_slow |= row.total_s > LIMIT_TOTAL_S * args.num_pages / LIMITED_PAGES or longest > LIMIT_TURN_MS
    print(f"{'baseline: a dictionary of sets':<32}{baseline(args.num_pages, args.seed):>8.3f}")
    print(f"limits: {LIMIT_TOTAL_S} s for {LIMITED_PAGES} pages, {LIMIT_TURN_MS} ms for a turn")
    if args.json:
        write_report(args.json, args, rows=[row._asdict() for row in rows])
    sys.exit("over the limits" if too_slow else 0)


if __name__ == "__main__":
    main()
