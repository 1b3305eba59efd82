"""Reports on the third tier: Mooncake #1871 (a change of master lost all metadata), SGLang #33713, #38452 and #12092
(pages are written to the tiers below and never read again)."""

from __future__ import annotations

import pytest

from kvist.kv.tiers.prefetch import PrefetchConfig
from kvist.plan.tiers import StorageAttached
from kvist.request import Outcome
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.engine import SimEngine

PROMPT = [1] * 17  # 4 full pages of 4 tokens
PREFETCH = PrefetchConfig(policy="wait_complete", threshold_tokens=1)


def answered(world: SimCluster, engine: SimEngine, name: str) -> int:
    """Answer the prompt; return how many of its tokens came from the store. Then only the store has its pages."""
    before = engine.scheduler.status().totals["cached_prompt_tokens"]
    world.submit(sim_request(name, PROMPT, max_tokens=4, seed=len(name)), engine)
    world.settle(max_rounds=600, dt_s=0.05)
    assert world.outcome(name, engine) is Outcome.FINISHED
    world.forget(engine, host=True)
    return int(engine.scheduler.status().totals["cached_prompt_tokens"] - before)


@pytest.mark.parametrize("fault", ["all pages are lost", "the store is gone"])
def test_mooncake_1871_a_lost_third_tier_is_a_miss_and_serving_goes_on(fault: str) -> None:
    world = SimCluster()
    engine = world.start("u", num_pages=20, num_host_pages=40, prefetch=PREFETCH)
    answered(world, engine, "first")
    assert answered(world, engine, "second") == 16, "sglang 33713, 38452, 12092: the pages are read again"
    if fault == "all pages are lost":
        world.stored.clear()
    else:
        engine.events.append(StorageAttached(attached=False))
    assert answered(world, engine, "third") == 0
    engine.events.append(StorageAttached(attached=True))
    answered(world, engine, "fourth")
    assert answered(world, engine, "fifth") == 16, "the tier is used again"
    world.check_settled()  # all answers are those of an undisturbed engine
