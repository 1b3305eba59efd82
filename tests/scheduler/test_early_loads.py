"""Pages of a request that waits for the store are loaded into the device pool while the others are being fetched."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.kv.tiers.prefetch import PrefetchConfig
from kvist.plan.tiers import FetchPages, LoadPages
from kvist.request import Outcome, Role
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.engine import SimEngine, small_config

PROMPT = [1] * 21  # 5 full pages of 4 tokens
PREFETCH = PrefetchConfig(base_s=2.0, per_1k_s=0.0, threshold_tokens=8)


def start(world: SimCluster, name: str = "u", **shape: Any) -> SimEngine:
    settings = {"num_host_pages": 40, "prefetch": PREFETCH, "config": small_config(), "fetch_pages": 1, **shape}
    return world.start(name, role=Role.UNIFIED, **settings)


def submit(world: SimCluster, engine: SimEngine, request_id: str = "again", prompt: list[int] | None = None) -> None:
    world.submit(sim_request(request_id, PROMPT if prompt is None else prompt, max_tokens=2), engine)
    world.deliver(("gateway", engine.name))


def begin_fetches(world: SimCluster, engine: SimEngine, *, in_host: int = 0) -> list[FetchPages]:
    """Answer PROMPT, evict its pages to the store, except `in_host` pages that a shorter prompt put back into the host
    tier, and begin to fetch them for a second request, one page at a time."""
    world.submit(sim_request("first", PROMPT, max_tokens=1), engine)
    world.settle()
    world.forget(engine, host=True)
    if in_host:
        world.submit(sim_request("shorter", PROMPT[: 4 * in_host + 1], max_tokens=1), engine)
        world.settle()
        world.forget(engine, host=False)
    submit(world, engine)
    engine.step()
    assert engine.store is not None
    engine.store.advance()
    return [job for job in engine.step().tier_jobs if isinstance(job, FetchPages)]


def loads(engine: SimEngine) -> list[int]:
    """Run a step; return the number of pages of each load that it starts."""
    return [len(job.page_ids) for job in engine.step().tier_jobs if isinstance(job, LoadPages)]


def cached_by_tier(world: SimCluster, request_id: str) -> tuple[int, int, int]:
    chunk = world.chunks[request_id][0][1]
    below = chunk.num_cached_host_tokens, chunk.num_cached_storage_tokens
    return (chunk.num_cached_tokens or 0) - sum(below), *below


def settle(world: SimCluster) -> None:
    """End all work, and check what must hold then."""
    world.settle()
    world.check_settled()


def totals(engine: SimEngine) -> dict[str, float]:
    return dict(engine.scheduler.status().totals)


def test_each_page_is_loaded_when_it_has_come_and_the_request_starts_after_the_last() -> None:
    world = SimCluster()
    engine = start(world)
    assert len(begin_fetches(world, engine)) == 5
    assert engine.store is not None
    for _ in range(4):
        engine.store.advance()
        assert loads(engine) == [1]
        assert not engine.under_way, "the request still waits for the store"
        engine.mover.advance()
    engine.store.advance()
    assert loads(engine) == [1], "only the last page is left to load"
    engine.mover.advance()
    engine.step()
    assert engine.under_way
    settle(world)
    assert cached_by_tier(world, "again") == (0, 0, 20)
    counted = totals(engine)
    assert (counted["host_loaded_pages"], counted["host_hit_pages"], counted["device_hit_pages"]) == (5, 5, 0)


def test_pages_that_come_during_a_load_are_loaded_together() -> None:
    world = SimCluster()
    engine = start(world)
    begin_fetches(world, engine)
    assert engine.store is not None
    started = []
    for _ in range(4):
        engine.store.advance()
        started += loads(engine)
    assert started == [1]
    engine.mover.advance()
    assert loads(engine) == [3]
    settle(world)
    assert cached_by_tier(world, "again") == (0, 0, 20)


def test_a_page_that_comes_before_its_prefix_waits_for_it() -> None:
    world = SimCluster()
    engine = start(world)
    begin_fetches(world, engine)
    assert engine.store is not None
    engine.store.advance(newest=True)
    assert loads(engine) == []
    for _ in range(4):
        engine.store.advance()
    settle(world)
    assert cached_by_tier(world, "again") == (0, 0, 20)


def test_pages_of_the_host_tier_are_loaded_while_those_after_them_are_fetched() -> None:
    world = SimCluster()
    engine = start(world)
    fetches = begin_fetches(world, engine, in_host=2)
    assert len(fetches) == 3
    engine.mover.advance()
    engine.step()
    assert engine.cache.counts().cached == 2
    settle(world)
    assert cached_by_tier(world, "again") == (0, 8, 12)


@pytest.mark.parametrize("num_before", [0, 1, 3])
def test_pages_before_a_failed_page_are_kept_and_those_after_it_are_computed(num_before: int) -> None:
    world = SimCluster()
    engine = start(world)
    begin_fetches(world, engine)
    assert engine.store is not None
    for _ in range(num_before):
        engine.store.advance()
        loads(engine)
        engine.mover.advance()
    engine.store.fail_next = True
    settle(world)  # with the tokens of an undisturbed engine
    assert cached_by_tier(world, "again") == (0, 0, 4 * num_before)
    assert totals(engine)["storage_failed_pages"] == 1


def test_half_of_a_batch_that_fails_keeps_the_half_before_it() -> None:
    world = SimCluster()
    engine = start(world, fetch_pages=4)
    begin_fetches(world, engine)
    assert engine.store is not None
    engine.store.fail_next = True
    engine.store.advance()
    assert loads(engine) == [2]
    settle(world)
    assert cached_by_tier(world, "again") == (0, 0, 8)
    assert totals(engine)["storage_failed_pages"] == 2


def test_pages_loaded_before_the_deadline_are_used_and_the_rest_is_computed() -> None:
    world = SimCluster()
    engine = start(world)
    begin_fetches(world, engine)
    assert engine.store is not None
    engine.store.advance()
    assert loads(engine) == [1]
    engine.store.hang()
    engine.mover.advance()
    engine.step()
    world.now_s += 2.0
    settle(world)  # except for the slots of the hung jobs
    assert world.outcome("again", engine) is Outcome.FINISHED
    assert cached_by_tier(world, "again") == (0, 0, 4)
    engine.store.hung.clear()
    settle(world)


def test_an_early_load_that_fails_is_tried_once_more_by_the_admitted_request() -> None:
    world = SimCluster()
    engine = start(world)
    begin_fetches(world, engine)
    assert engine.store is not None
    engine.store.advance()
    assert loads(engine) == [1]
    engine.mover.fail_next = True
    engine.mover.advance()
    for _ in range(3):
        engine.store.advance()
        assert loads(engine) == []
    engine.store.advance()
    assert loads(engine) == [5]
    settle(world)
    assert totals(engine)["host_failed_pages"] == 1


@pytest.mark.parametrize("copied", [True, False])
def test_pages_loaded_early_are_given_up_before_another_request_is_preempted_or_refused(copied: bool) -> None:
    world = SimCluster()
    engine = start(world, num_pages=8)
    begin_fetches(world, engine)
    assert engine.store is not None
    for _ in range(3):
        engine.store.advance()
        loads(engine)
        if copied:
            engine.mover.advance()
    engine.step()
    engine.store.hang()
    submit(world, engine, "behind", [3] * 28)
    for _ in range(20):
        engine.step()
        engine.store.advance()
        engine.mover.advance()
        engine.finish_step()
    assert world.ended["behind", engine.epoch]
    assert not world.chunks["again"]
    engine.store.hung.clear()
    settle(world)
    assert totals(engine)["preemptions"] == 0


def test_no_page_is_loaded_early_while_another_request_waits_for_its_turn() -> None:
    world = SimCluster()
    engine = start(world, config=small_config(max_running_requests=2))
    begin_fetches(world, engine)
    assert engine.store is not None
    for number in range(3):
        world.submit(sim_request(f"other{number}", [3 + number] * 6, max_tokens=6, ignore_eos=True), engine)
        world.deliver(("gateway", "u"))
    engine.step()
    engine.store.advance()
    assert loads(engine) == []
    settle(world)


@pytest.mark.parametrize("fetch_pages", [1, 16])
def test_pages_are_loaded_while_their_request_waits_for_a_batch_and_it_takes_part_in_the_next(fetch_pages: int) -> None:
    world = SimCluster()
    engine = start(world, config=small_config(overlap=True), fetch_pages=fetch_pages)
    begin_fetches(world, engine)
    assert engine.store is not None
    world.submit(sim_request("other", [3] * 7, max_tokens=9, ignore_eos=True), engine)
    world.deliver(("gateway", "u"))
    while len(engine.under_way) < 2:
        engine.step()
    num_pages = 0
    for _ in range(8):
        engine.store.advance()
        num_pages += sum(loads(engine))
        engine.mover.advance()
    assert num_pages == 5
    assert len(engine.under_way) == 2, "no batch could be planned meanwhile"
    engine.step()
    engine.finish_step()
    plan = engine.step()
    assert plan.batch is not None
    assert "again" in engine.running
    assert not any(isinstance(job, LoadPages) for job in plan.tier_jobs)
    settle(world)
    assert cached_by_tier(world, "again") == (0, 0, 20)


def test_two_requests_for_the_same_pages_load_them_once() -> None:
    world = SimCluster()
    engine = start(world)
    begin_fetches(world, engine)
    submit(world, engine, "also")
    engine.step()
    settle(world)
    assert totals(engine)["host_loaded_pages"] == 5
    assert totals(engine)["storage_fetched_pages"] == 5
    assert [sum(cached_by_tier(world, each)) for each in ("again", "also")] == [20, 20]


@pytest.mark.parametrize("copied", [True, False])
def test_an_abort_gives_up_the_pages_loaded_early(copied: bool) -> None:
    world = SimCluster()
    engine = start(world)
    begin_fetches(world, engine)
    assert engine.store is not None
    engine.store.advance()
    assert loads(engine) == [1]
    if copied:
        engine.mover.advance()
        engine.step()
    world.abort("again")
    settle(world)
    assert world.outcome("again", engine) is Outcome.ABORTED
