"""The router remembers its last decisions, and what it knew of the workers then."""

from __future__ import annotations

from kvist.request import Role
from kvist.router.config import RouterConfig, RoutingOptions
from kvist.router.placement import Placement
from kvist.router.policy import Reason
from kvist.router.streams import MAX_DECISIONS
from kvist.testing.router_bench import RouterBench
from tests.router.test_placement import pairs_and_a_unified_worker, served


async def test_a_decision_names_the_chosen_workers_first_and_then_the_others() -> None:
    bench, workers = pairs_and_a_unified_worker()
    chosen = await served(bench, Placement(worker="p"))
    snapshot = bench.dispatcher.snapshot()
    assert snapshot.policy == "cost"
    (decision,) = snapshot.decisions
    assert decision.reason is Reason.SPLIT
    assert {decision.prefill, decision.decode} == {workers[name].worker_id for name in chosen}
    assert decision.num_prompt_tokens == 100
    assert decision.cost_ms is not None
    considered = [view.worker_id for view in decision.considered]
    assert considered[:2] == [decision.prefill, decision.decode]
    assert len(set(considered)) == len(considered)


async def test_a_worker_alone_is_named_once() -> None:
    bench = RouterBench(RouterConfig(routing=RoutingOptions(policy="cache_aware")))
    bench.engines.join("u", role=Role.UNIFIED)
    await served(bench, Placement())
    (decision,) = bench.dispatcher.snapshot().decisions
    assert decision.prefill == decision.decode
    assert [view.worker_id for view in decision.considered] == [decision.prefill]


async def test_only_the_last_decisions_and_a_few_workers_are_remembered() -> None:
    bench = RouterBench(RouterConfig(routing=RoutingOptions(policy="round_robin")))
    for number in range(20):
        bench.engines.join(f"u{number}", role=Role.UNIFIED)
    for _ in range(MAX_DECISIONS + 10):
        await served(bench, Placement())
    decisions = bench.dispatcher.snapshot().decisions
    assert len(decisions) == MAX_DECISIONS
    assert {len(decision.considered) for decision in decisions} == {7}
