"""A busy fleet for tests of the dashboard: two prefill workers, two decode workers, a page pool, and their routing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from kvist.page_index.page_runs import HeldPages
from kvist.pool_status import PoolStatus, StoreShare, WatchedPool
from kvist.request import RequestId, Role, WorkerId
from kvist.router.handoff_ways import Way
from kvist.router.policy import Reason, WorkerView
from kvist.router.stream import ClusterSnapshot, Decision, WorkerSnapshot
from kvist.testing.specs import make_load, make_spec
from kvist.wire import StorageStatus

POOL = WatchedPool(
    master="http://10.0.0.9:9003",
    age_s=0.4,
    status=PoolStatus(
        capacity_bytes=96 << 30,
        used_bytes=41 << 30,
        ssd_capacity_bytes=1 << 40,
        ssd_used_bytes=300 << 30,
        num_keys=128_000,
        num_keys_in_memory=64_000,
        num_keys_on_ssd=100_000,
        num_stores=3,
        stores={
            f"10.0.0.{host}:7001": StoreShare(capacity_bytes=32 << 30, used_bytes=(9 + host) << 30)
            for host in (5, 6, 7)
        },
    ),
)
STORAGE = StorageStatus(
    backend="mooncake",
    options={},
    prefetch_policy="timeout",
    state="attached",
    breaker="closed",
    num_quarantined_pages=0,
    stored_bytes=41 << 30,
    errors={},
    location="mooncake://10.0.0.9:9001",
    pool=POOL,
)


def worker(name: str, role: Role, *, second: int = 0, busy: float = 1.0) -> WorkerSnapshot:
    """Return a worker that has been busy for `second` seconds."""
    is_prefill = role is Role.PREFILL
    each = second * busy
    totals = {
        "prompt_tokens": 6000.0 * each if is_prefill else 0.0,
        "cached_prompt_tokens": 3900.0 * each if is_prefill else 0.0,
        "ceiling_prompt_tokens": 4500.0 * each if is_prefill else 0.0,
        "computed_prompt_tokens": 2100.0 * each if is_prefill else 0.0,
        "generation_tokens": 9.0 * each if is_prefill else 840.0 * each,
        "prompt_step_seconds": 0.62 * each if is_prefill else 0.0,
        "decode_step_seconds": 0.0 if is_prefill else 0.48 * each,
        "handoffs_sent": 9.0 * each if is_prefill else 0.0,
        "handoffs_received": 0.0 if is_prefill else 9.0 * each,
        "handoff_pages": 420.0 * each,
        "handoff_bytes": 420.0 * each * (2 << 20),
        "handoff_seconds": 9.0 * 0.031 * each,
    }
    load = make_load(
        num_running=4 if is_prefill else 22,
        num_waiting=3 if is_prefill else 0,
        num_free_pages=900 if is_prefill else 300,
        num_cached_pages=2600 if is_prefill else 1400,
        num_owned_pages=500 if is_prefill else 2200,
        num_in_flight_pages=96,
        num_host_pages={"free": 2000, "cached": 6100, "in_flight": 92} if is_prefill else {},
        queue_wait_s=0.21 if is_prefill else None,
        storage=STORAGE if is_prefill else None,
        totals=totals,
    )
    spec = make_spec(worker_id=name, role=role, num_pages=4096, page_bytes=2 << 20, max_running_requests=64)
    return WorkerSnapshot(
        worker_id=WorkerId(name),
        role=role,
        alive=True,
        spec=spec,
        load=load,
        url=f"http://{name}",
        sources=("flags",),
        num_in_flight=7,
        num_pending_tokens=5200 if is_prefill else 0,
    )


def view(name: str, role: Role, device: int, host: int = 0, **more: int) -> WorkerView:
    held = HeldPages(num_device=device, num_host=host)
    return WorkerView(
        worker_id=WorkerId(name),
        page_size=16,
        num_requests=more.get("num_requests", 3),
        num_pending_tokens=more.get("num_pending_tokens", 0),
        num_known_pages=0,
        held=held,
        role=role,
    )


def decision(number: int, decided_s: float, reason: Reason = Reason.SPLIT) -> Decision:
    prefill, decode = WorkerId(f"10.0.0.{1 + number % 2}:30001"), WorkerId(f"10.0.0.{3 + number % 2}:30002")
    alone = reason is not Reason.SPLIT
    chosen = decode if alone else prefill
    return Decision(
        request_id=RequestId(f"chatcmpl-{number:04d}"),
        decided_s=decided_s,
        reason=reason,
        cost_ms=12.5 + number % 7,
        way=None if alone else Way.DIRECT,
        prefill=chosen,
        decode=decode,
        num_prompt_tokens=1200 + 37 * number,
        num_failovers=0,
        considered=(
            view(chosen, Role.DECODE if alone else Role.PREFILL, 50 + number % 9, 8, num_pending_tokens=300),
            *(() if alone else (view(decode, Role.DECODE, 20),)),
            view("10.0.0.9:30001", Role.PREFILL, 3, num_requests=9, num_pending_tokens=5200),
        ),
    )


def busy_fleet(second: int = 0, now_s: float = 0.0) -> ClusterSnapshot:
    """Return the fleet after `second` seconds of work."""
    lost = replace(
        worker("10.0.0.5:30002", Role.DECODE),
        alive=False,
        state="lost",
        problem="silent for 5.0 s",
        load=None,
        spec=None,
    )
    reasons = Counter({Reason.SPLIT: 9 * second + 40, Reason.HELD: second + 6, Reason.SHORT_ANSWER: 2})
    decisions = [
        decision(number, now_s - (16 - number) * 0.7, Reason.HELD if number % 5 == 0 else Reason.SPLIT)
        for number in range(16)
    ]
    return ClusterSnapshot(
        workers=(
            worker("10.0.0.1:30001", Role.PREFILL, second=second),
            worker("10.0.0.2:30001", Role.PREFILL, second=second, busy=0.8),
            worker("10.0.0.3:30002", Role.DECODE, second=second),
            worker("10.0.0.4:30002", Role.DECODE, second=second, busy=0.8),
            replace(lost, worker_id=WorkerId("10.0.0.5:30002")),
        ),
        num_routes=reasons,
        num_index_entries=51_200,
        num_index_bytes=3 << 20,
        policy="cost",
        decisions=decisions,
    )
