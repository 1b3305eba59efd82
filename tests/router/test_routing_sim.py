"""The routing policies over four simulated workers, against one worker with four times the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

import bench_routing_sim as sim
from kvist.router.policies import POLICIES
from kvist.router.policies.cost import Cost

TRACE = Path(__file__).parents[3] / "shared" / "data" / "traces" / "conversation_trace.jsonl"


def rates(requests: list[sim.SimRequest], pages: int) -> dict[str, float]:
    one = sim.simulate(Cost(), requests, num_workers=1, pages=4 * pages, tokens_per_s=120_000.0)
    found = {
        name: sim.simulate(POLICIES[name].make({}), requests, num_workers=4, pages=pages, tokens_per_s=30_000.0)
        for name in ("cost", "cache_aware", "round_robin")
    }
    return {"one": one.hit_rate, **{name: outcome.hit_rate for name, outcome in found.items()}}


def test_chats_hit_nearly_as_often_as_with_one_large_cache() -> None:
    found = rates(sim.chats(), 1500)
    assert found["cost"] >= 0.95 * found["one"]
    assert found["cost"] >= 1.5 * found["round_robin"]


def test_a_trace_of_conversations_hits_twice_as_often_as_with_round_robin() -> None:
    if not TRACE.exists():
        pytest.skip(f"needs the trace {TRACE.name} in a folder shared/ beside the project")
    (first,) = sim.read_trace(TRACE, 2000)
    found = rates(first, 3000)
    assert found["cost"] >= 2 * found["round_robin"]
    assert found["cost"] >= 0.95 * found["one"]
    assert found["cost"] >= found["cache_aware"]
