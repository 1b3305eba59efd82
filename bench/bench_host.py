"""How long does the engine's main thread work for one step of many decodes?

    python bench/bench_host.py [--running 256] [--steps 300] [--context 512] [--temperature 0] [--json out.json]

The real loop, scheduler, wire format and host code of the GPU runner run as with overlap on a GPU and two gateways.
The device and the sockets are fakes, so copies, launches and sends cost nothing here. CPU microseconds,
p10 since the machine may be shared, and as a multiple of the baseline measured beside every step: creating the batch
items and chunks alone, the least cost of a step with one object for each item.

    plan      scheduler.step, the tokens of the step before the last among its events
    columns   items -> arrays (runner/columns.py)
    pack      arrays -> the words of the step's copy (runner/staging.py)
    index     where the tokens and the pages lie, their copy begun (attention/fa3.py and page_tables.py)
    result    the copied tokens -> the events that the scheduler gets
    encode    outputs -> bytes
    loop      all of them, and the rest of the loop
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from json_report import write_report
from kvist import wire
from kvist.attention.fa3 import _Index
from kvist.attention.page_tables import PageTables
from kvist.attention.pinned import PinnedRing
from kvist.engine.assembly import freeze_gc
from kvist.engine.loop import EngineLoop, LoopParts
from kvist.engine.page_events import PageEventLog
from kvist.engine.reports import LoadReports
from kvist.engine.roles import RoleSwitch
from kvist.kv.cache import PageCache
from kvist.plan.batch import Batch, BatchItem
from kvist.plan.events import SampledTokens
from kvist.request import EpochId, RequestId, Role, SlotId
from kvist.runner.columns import EMPTY_BATCH, read_batch
from kvist.runner.sampler import sampled_tokens
from kvist.runner.shaping import table_sizes
from kvist.runner.slots import SlotTable
from kvist.runner.staging import NUM_ROW_WORDS
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.testing.clocks import FakeClock
from kvist.testing.loop_bench import FakeTransport
from kvist.testing.specs import make_peer_spec, make_request, make_spec, submit_full

PAGE_SIZE = 16
MAX_WARM_UP_STEPS = 1000  # before the measured ones
PARTS = ("loop", "plan", "columns", "pack", "index", "result", "encode", "objects")


class Stopwatch:
    def __init__(self) -> None:
        self.times_us: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start_s = time.thread_time()
        yield
        self.times_us[part].append((time.thread_time() - start_s) * 1e6)

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            with self(part):
                return call(*args, **options)

        return timed


class FakeGpu:
    """The host work of cuda_runner.py, in the order of a replayed graph."""

    def __init__(self, watch: Stopwatch, num_requests: int, context: int) -> None:
        cpu = torch.device("cpu")
        self._watch = watch
        self._words = np.zeros(num_requests * (3 * context + NUM_ROW_WORDS), dtype=np.int32)
        self._num_requests = num_requests
        self._tables, self._ring = PageTables(cpu, PAGE_SIZE), PinnedRing(cpu)
        self._tables.reserve(num_requests, 2048)
        self._index = _Index.allocate(num_requests, num_requests, cpu)
        self._table = SlotTable(table_sizes(num_requests, vocab_size=32_000, context_len=context), cpu)
        self._previous = EMPTY_BATCH
        self._tokens = torch.randint(0, 32_000, (num_requests,), dtype=torch.int32)

    def launch(self, batch: Batch) -> FakeStep:
        with self._watch("columns"):
            self._table.update(batch)
            columns = read_batch(batch, self._previous, self._table)
        num_tokens, num_sampled = len(columns.inputs.token_ids), len(columns.inputs.rows)
        with self._watch("pack"):
            words = self._words[: 3 * num_tokens + NUM_ROW_WORDS * num_sampled]
            columns.inputs.pack(words, num_tokens, num_sampled, self._num_requests)
        if columns.only_decodes:
            with self._watch("index"):
                self._index.fill(columns.spans, self._tables, self._ring)
        self._previous = columns.persistent
        return FakeStep(self._watch, self._tokens[:num_sampled])


class FakeStep:
    def __init__(self, watch: Stopwatch, tokens: torch.Tensor) -> None:
        self._watch = watch
        self._tokens = tokens

    def is_done(self) -> bool:
        return True

    def wait(self) -> None: ...

    def result(self) -> SampledTokens:
        with self._watch("result"):
            return sampled_tokens(self._tokens, None)


class FakeSockets:
    num_undecodable = num_unexpected = num_refused = 0

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self.waiting: list[tuple[bytes, Any]] = []
        self.num_chunks = 0

    def recv(self, timeout_s: float) -> list[tuple[bytes, Any]]:
        assert timeout_s >= 0
        received, self.waiting = self.waiting, []
        return received

    def send(self, identity: bytes, message: Any) -> bool:
        assert identity
        if isinstance(message, wire.StepOutputs):
            with self._watch("encode"):
                wire.encode(message)
            self.num_chunks += len(message.chunks)
        return True

    def send_to_peer(self, endpoint: str, message: object) -> bool:
        raise AssertionError(f"{endpoint}: {message}")

    def wakeup(self) -> None: ...


def make_loop(watch: Stopwatch, args: argparse.Namespace, sockets: FakeSockets) -> EngineLoop:
    longest = args.context + args.steps + MAX_WARM_UP_STEPS
    num_pages = args.running * -(-longest // PAGE_SIZE)
    config = SchedulerConfig(
        max_running_requests=args.running,
        max_queued_requests=args.running,
        chunked_prefill_size=args.context,
        max_prefill_tokens=args.running * args.context,
        max_model_len=longest,
        overlap=True,
    )
    cache = PageCache(num_pages=num_pages, page_size=PAGE_SIZE, namespace="bench")
    pool = wire.PoolAddress(transport="none", location="", num_pages=num_pages, page_bytes=1, layout="bench")
    scheduler = build_scheduler(Role.UNIFIED, config, cache, EpochId("bench"), make_peer_spec(pool))
    scheduler.step = watch.around("plan", scheduler.step)  # type: ignore[method-assign]
    spec = make_spec(
        epoch=EpochId("bench"),
        endpoint="",
        model_fingerprint="",
        model_name="",
        vocab_size=32_000,
        max_model_len=longest,
        page_size=PAGE_SIZE,
        num_pages=num_pages,
        namespace="bench",
        dtype="bfloat16",
        max_running_requests=args.running,
        max_queued_requests=args.running,
    )
    parts = LoopParts(
        spec=spec,
        scheduler=scheduler,
        runner=FakeGpu(watch, args.running, args.context),
        channel=sockets,
        transport=FakeTransport(),
        roles=RoleSwitch(spec.role),
        reports=LoadReports(),
        page_events=PageEventLog(list_pages=cache.list_pages),
        clock=FakeClock(1.0),
        gateway_timeout_s=1e9,
        watch_step=lambda _step: None,
        overlap=True,
    )
    return EngineLoop(parts)


def submits(args: argparse.Namespace) -> list[tuple[bytes, Any]]:
    rng = random.Random(args.seed)
    found = []
    for index in range(args.running):
        request = make_request(
            f"cmpl-{index:024x}",
            tuple(rng.randrange(32_000) for _ in range(args.context - index % PAGE_SIZE)),
            max_tokens=args.steps + MAX_WARM_UP_STEPS,
            temperature=args.temperature,
            seed=index,
        )
        found.append((b"gateway-%d" % (index % 2), submit_full(request)))
    return found


def make_objects(count: int) -> int:
    slot, request_id = SlotId(0), RequestId("r")
    items = [BatchItem(slot=slot, token_ids=(1,), start=1, page_ids=[], samples=True) for _ in range(count)]
    return len(items) + len([wire.TokenChunk(request_id=request_id, position=1, token_ids=(1,)) for _ in range(count)])


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    watch = Stopwatch()
    sockets = FakeSockets(watch)
    loop = make_loop(watch, args, sockets)
    sockets.waiting = submits(args)
    num_seen = -1
    for _ in range(MAX_WARM_UP_STEPS):  # computes the prompts
        if sockets.num_chunks - num_seen == args.running:
            break
        num_seen = sockets.num_chunks
        loop.iterate(0.0)
    freeze_gc()
    watch.times_us.clear()
    num_seen = sockets.num_chunks
    for _ in range(args.steps):
        with watch("objects"):
            make_objects(args.running)
        with watch("loop"):
            loop.iterate(0.0)
    assert sockets.num_chunks - num_seen == args.running * args.steps, "every iteration sent one token of each stream"
    return dict(watch.times_us)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256, help="decoding requests")
    parser.add_argument("--steps", type=int, default=300, help="measured steps")
    parser.add_argument("--context", type=int, default=512, help="prompt tokens of each request")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    rows = measure(args)
    baseline = float(np.quantile(rows["objects"], 0.1))
    print(f"{args.running} running decodes, {args.steps} steps, CPU microseconds a step")
    for part in PARTS:
        p10, p50, p90 = np.quantile(rows[part], (0.1, 0.5, 0.9)).tolist()
        calls = len(rows[part]) / args.steps
        times = f" a call, {calls:.0f} calls" if calls > 1.5 else ""
        print(f"{part:>8}: p10 {p10:7.1f}  p50 {p50:7.1f}  p90 {p90:7.1f}   p10 / objects {p10 / baseline:5.2f}{times}")
    if args.json:
        each = [{"part": part, "us": time_us} for part, times in rows.items() for time_us in times]
        write_report(args.json, args, rows=each)


if __name__ == "__main__":
    main()
