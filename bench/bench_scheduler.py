"""How long does one scheduler step take with many running decodes?

    python bench/bench_scheduler.py [--running 256] [--steps 400] [--context 512] [--json out.json]

CPU time of the thread, since the machine may be shared. There is no device: the tokens of each step are made up outside
the measured time. The baseline, measured in the same run, is the least cost of a step with one object for each item:
creating the batch items and chunks alone.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from pathlib import Path

import numpy as np

from json_report import write_report
from kvist.kv.cache import PageCache
from kvist.plan.batch import Batch, BatchItem
from kvist.plan.events import Event, SampledTokens, StepFinished
from kvist.request import EpochId, RequestId, Role, SlotId
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.testing.specs import make_peer_spec, make_request, submit_full
from kvist.wire import PoolAddress, TokenChunk


def finished(batch: Batch) -> StepFinished:
    token_ids = [5 for item in batch.items if item.samples]
    return StepFinished(step_id=batch.step_id, sampled=SampledTokens(token_ids=token_ids))


def measure_steps(*, running: int, steps: int, context: int, seed: int) -> list[float]:
    """Milliseconds of each step in which all requests decode."""
    rng = random.Random(seed)
    pages_each = -(-(context + steps + 64) // 16)
    num_pages = running * pages_each
    config = SchedulerConfig(
        max_running_requests=running,
        max_queued_requests=running,
        chunked_prefill_size=running * context,  # all prompts in one step
        max_prefill_tokens=running * context,
        max_model_len=context + steps + 64,
    )
    cache = PageCache(num_pages=num_pages, page_size=16, namespace="bench")
    pool = PoolAddress(transport="inproc", location="", num_pages=num_pages, page_bytes=1, layout="bench")
    scheduler = build_scheduler(Role.UNIFIED, config, cache, EpochId("bench"), make_peer_spec(pool))
    events: list[Event] = [
        submit_full(
            make_request(
                f"r{index}",
                tuple(rng.randrange(32000) for _ in range(context - index % 16)),
                max_tokens=steps + 64,
                seed=index,
            )
        )
        for index in range(running)
    ]
    plan = scheduler.step(0.0, events)
    assert plan.batch is not None
    assert len(plan.batch.items) == running
    times_ms: list[float] = []
    gc.collect()
    for index in range(steps + 10):
        assert plan.batch is not None
        events = [finished(plan.batch)]
        start_s = time.thread_time()
        plan = scheduler.step(index * 0.01, events)
        times_ms.append((time.thread_time() - start_s) * 1e3)
        assert len(plan.chunks) == running
    return times_ms[10:]


def measure_objects(*, running: int, steps: int) -> list[float]:
    slot, request_id = SlotId(0), RequestId("r")
    times_ms: list[float] = []
    for _ in range(steps):
        start_s = time.thread_time()
        items = [BatchItem(slot=slot, token_ids=(1,), start=1, page_ids=[], samples=True) for _ in range(running)]
        chunks = [TokenChunk(request_id=request_id, position=1, token_ids=(1,)) for _ in range(running)]
        times_ms.append((time.thread_time() - start_s) * 1e3)
        assert len(items) == len(chunks)
    return times_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256, help="decoding requests")
    parser.add_argument("--steps", type=int, default=400, help="measured steps")
    parser.add_argument("--context", type=int, default=512, help="prompt tokens of each request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    rows = {
        "step": measure_steps(running=args.running, steps=args.steps, context=args.context, seed=args.seed),
        "objects alone": measure_objects(running=args.running, steps=args.steps),
    }
    print(f"{args.running} running decodes, {args.steps} steps, CPU milliseconds")
    for name, times_ms in rows.items():
        shares = "  ".join(f"p{round(share * 100)} {np.quantile(times_ms, share):.3f}" for share in (0.5, 0.9, 0.99))
        print(f"{name:>14}: {shares}  mean {statistics.mean(times_ms):.3f}")
    if args.json:
        each = [{"name": name, "step": i, "ms": ms} for name, times in rows.items() for i, ms in enumerate(times)]
        write_report(args.json, args, rows=each)


if __name__ == "__main__":
    main()
