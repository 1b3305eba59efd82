"""`capacity` of a worker in /server_info: what a planner of requests needs."""

from __future__ import annotations

from dataclasses import replace

from kvist.lease_messages import LeaseCounts
from kvist.request import Role, WorkerId
from kvist.router.rates import RateMeter, Rates
from kvist.router.stream import ClusterSnapshot, WorkerSnapshot
from kvist.server.capacity import capacity_of
from kvist.testing.gateway_bench import GatewayBench
from kvist.testing.specs import make_load, make_spec

LOAD = make_load(
    num_free_pages=2,
    num_cached_pages=5,
    num_owned_pages=1,
    num_in_flight_pages=2,
    leases=LeaseCounts(num_leases=2, num_pages=3, max_pages=4),
    num_host_pages={"free": 6, "cached": 2, "in_flight": 0},
    queue_wait_s=0.25,
)
WORKER = WorkerSnapshot(
    worker_id=WorkerId("w"),
    role=Role.PREFILL,
    alive=True,
    spec=make_spec(num_pages=10, num_host_pages=8, page_size=16, max_model_len=160),
    load=LOAD,
    num_pending_tokens=100,
    rates=Rates(prompt_tokens_per_s=1000.0, decode_step_s=0.0125),
)


async def test_server_info_has_the_capacity_of_each_worker(bench: GatewayBench) -> None:
    bench.dispatcher.snapshots = ClusterSnapshot(workers=(WORKER,))
    (worker,) = (await bench.client.get("/server_info")).json()["workers"]
    assert worker["capacity"] == {
        "role": "prefill",
        "page_size": 16,
        "max_model_len": 160,
        "max_running_requests": 4,
        "max_queued_requests": 4,
        "max_answer_tokens": 16,
        "prefill_tokens_per_s": 1000.0,
        "decode_step_ms": 12.5,
        "handoff_bytes_per_s": 1000000000,
        "host_bytes_per_s": 5000000000,
        "storage_bytes_per_s": 500000000,
        "queue_ms": 250.0,
        "pages": {
            "device": {"total": 10, "free": 2, "cached": 5, "used": 3, "leased": 3, "leasable": 1},
            "host": {"total": 8, "free": 6, "cached": 2, "in_flight": 0},
        },
    }


def test_prompts_of_this_gateway_are_a_queue_before_the_worker_reports_one() -> None:
    found = capacity_of(replace(WORKER, load=None))
    assert found is not None
    assert found["queue_ms"] == 100.0
    assert found["pages"] == {"device": {"total": 10}, "host": {"total": 8}}
    assert capacity_of(replace(WORKER, spec=None)) is None


def test_the_time_of_a_decode_step_is_unknown_until_there_was_one() -> None:
    meter = RateMeter()
    meter.on_totals({"prompt_step_tokens": 100.0, "prompt_step_seconds": 0.1})
    assert meter.rates.decode_step_s is None
    meter.on_totals({"decode_steps": 100.0, "decode_step_seconds": 2.0})
    assert meter.rates.decode_step_s is not None
    assert 0.015 < meter.rates.decode_step_s < 0.021
