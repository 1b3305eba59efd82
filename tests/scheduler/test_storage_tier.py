"""Requests and the storage tier: prefetches before admission, their time limits, and faults of the store."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from kvist.kv.tiers.prefetch import PrefetchConfig
from kvist.plan.plan import Plan
from kvist.plan.tiers import CancelFetch, FetchPages, FindPages, StorageAttached, StorePages
from kvist.request import Outcome, Role
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.engine import SimEngine, small_config

PROMPT = [1] * 13  # 3 full pages of 4 tokens
PREFETCH = PrefetchConfig(base_s=2.0, per_1k_s=0.0, threshold_tokens=8)


def start(world: SimCluster, role: Role = Role.UNIFIED, name: str = "u", **shape: Any) -> SimEngine:
    settings = {"num_host_pages": 40, "prefetch": PREFETCH, "config": small_config(), **shape}
    return world.start(name, role=role, **settings)


def submit(world: SimCluster, engine: SimEngine, request_id: str = "again", prompt: list[int] | None = None) -> None:
    world.submit(sim_request(request_id, PROMPT if prompt is None else prompt, max_tokens=2), engine)
    world.deliver(("gateway", engine.name))


def begin_find(world: SimCluster, engine: SimEngine) -> None:
    """Answer PROMPT, evict its pages to the store, and begin to query the store for a second request."""
    world.submit(sim_request("first", PROMPT, max_tokens=1), engine)
    world.settle()
    assert len(world.stored) == 3
    world.forget(engine, host=True)
    submit(world, engine)
    (find,) = engine.step().tier_jobs
    assert isinstance(find, FindPages)
    assert len(find.digests) == 3


def begin_fetch(world: SimCluster, engine: SimEngine) -> FetchPages:
    begin_find(world, engine)
    assert engine.store is not None
    engine.store.advance()
    (fetch,) = engine.step().tier_jobs
    assert isinstance(fetch, FetchPages)
    return fetch


def reported_cached(world: SimCluster, request_id: str) -> int | None:
    return world.chunks[request_id][0][1].num_cached_tokens


def totals(engine: SimEngine) -> dict[str, float]:
    return dict(engine.scheduler.status().totals)


def test_pages_only_in_the_store_are_fetched_before_the_request_is_admitted() -> None:
    world = SimCluster()
    engine = start(world)
    begin_fetch(world, engine)
    load = engine.scheduler.status()
    assert (load.num_waiting, load.num_running) == (1, 0)
    assert load.host_pages is not None
    assert load.host_pages.in_flight == 3
    world.settle()
    world.check_settled()
    assert reported_cached(world, "again") == 12
    counters = totals(engine)
    assert (counters["storage_stored_pages"], counters["storage_hit_pages"], counters["storage_fetched_pages"]) == (
        3,
        3,
        3,
    )
    assert (counters["storage_miss_pages"], counters["storage_failed_pages"], counters["host_loaded_pages"]) == (
        3,
        0,
        3,
    )
    assert (counters["prefetches"], counters["prefetch_timeouts"]) == (
        2,
        0,
    )  # the first request queried the store too, without a hit
    assert counters["prefetch_wait_seconds"] > 0


def test_a_second_worker_reports_stored_pages_as_cached_only_when_fetched() -> None:
    world = SimCluster()
    one, other = start(world), start(world, name="v")
    world.submit(sim_request("first", PROMPT, max_tokens=1), one)
    world.settle()
    assert other.pages.pages == set()
    submit(world, other)
    world.settle()
    world.check_settled()
    assert reported_cached(world, "again") == 12
    assert sorted(tier for tier, _ in other.pages.pages) == ["device"] * 3 + ["host"] * 3


def test_plans_name_the_pages_that_the_store_turned_out_to_have_or_to_lack() -> None:
    world = SimCluster()
    one, other = start(world), start(world, name="v")
    world.submit(sim_request("first", PROMPT, max_tokens=1), one)
    found, missing = seen_until_settled(world, one)
    stored = set(world.stored)
    assert (found, len(missing)) == (stored, 1), "at first the store lacked even the first page"
    assert missing <= stored
    submit(world, other)
    assert seen_until_settled(world, other) == (stored, set())
    world.forget(other, host=True)
    gone = list(world.stored)[2]
    del world.stored[gone]
    submit(world, other, "once more")
    found, missing = seen_until_settled(world, other)
    assert (found, missing) == (stored, {gone}), "the page was missing, and was stored again"


def seen_until_settled(world: SimCluster, engine: SimEngine) -> tuple[set[bytes], set[bytes]]:
    """Settle; return all digests that plans of the engine named as found in the store, and as missing there."""
    found, missing = set[bytes](), set[bytes]()
    step = engine.step

    def recording() -> Plan:
        plan = step()
        if plan.seen_in_store is not None:
            found.update(plan.seen_in_store.found)
            missing.update(plan.seen_in_store.missing)
        return plan

    with mock.patch.object(engine, "step", recording):
        world.settle()
    world.check_settled()
    return found, missing


def test_a_request_waiting_for_the_store_does_not_block_other_requests() -> None:
    world = SimCluster()
    engine = start(world)
    begin_fetch(world, engine)
    assert engine.store is not None
    engine.store.hang()
    world.submit(sim_request("behind", [3] * 6, max_tokens=1), engine)
    world.deliver(("gateway", "u"))
    for _ in range(3):
        engine.step()
        engine.finish_step()
    assert world.outcome("behind", engine) is Outcome.FINISHED
    assert not world.chunks["again"]


def test_a_request_returns_from_a_prefetch_to_its_place_by_arrival() -> None:
    world = SimCluster()
    engine = start(world, config=small_config(max_running_requests=1))
    begin_fetch(world, engine)
    for request_id in ("one", "two"):
        submit(world, engine, request_id, [3] * 6)
        engine.step()
    assert engine.store is not None
    engine.store.advance()
    while not world.ended["one", engine.epoch]:
        engine.mover.advance()
        engine.finish_step()
        engine.step()
    while not world.ended["again", engine.epoch]:
        engine.mover.advance()
        engine.finish_step()
        engine.step()
    assert not world.ended["two", engine.epoch]


def test_a_prefetch_that_takes_too_long_is_cancelled_and_the_pages_are_computed() -> None:
    world = SimCluster()
    engine = start(world)
    fetch = begin_fetch(world, engine)
    assert engine.plan.wake_at_s == pytest.approx(world.now_s + 2.0)
    world.now_s += 2.0
    plan = engine.step()
    assert CancelFetch(job_id=fetch.job_id) in plan.tier_jobs
    assert plan.batch is not None
    world.settle()
    world.check_settled()
    assert reported_cached(world, "again") == 0
    assert totals(engine)["prefetch_timeouts"] == 1
    assert totals(engine)["storage_failed_pages"] == 0  # it was cancelled


def test_pages_reported_together_with_the_prefetch_timeout_are_used() -> None:
    world = SimCluster()
    engine = start(world)
    begin_fetch(world, engine)
    assert engine.store is not None
    engine.store.advance()
    world.now_s += 2.0  # the step took that long, not the store
    plan = engine.step()
    assert not any(isinstance(job, CancelFetch) for job in plan.tier_jobs)
    world.settle()
    world.check_settled()
    assert reported_cached(world, "again") == 12
    assert totals(engine)["prefetch_timeouts"] == 0


@pytest.mark.parametrize("policy", ["timeout", "wait_complete", "best_effort"])
def test_a_hung_store_keeps_its_host_slots_but_fails_no_request(policy: str) -> None:
    world = SimCluster()
    engine = start(world, prefetch=PrefetchConfig(policy=policy, base_s=2.0, threshold_tokens=8))
    begin_find(world, engine)
    assert engine.store is not None
    engine.store.advance()
    engine.step()
    engine.store.hang()
    world.settle()
    world.check_settled()  # except for the slots of the hung job
    assert world.outcome("again", engine) is Outcome.FINISHED
    engine.store.hung.clear()
    world.settle()
    world.check_settled()
    host = engine.cache.host_counts()
    assert host is not None
    assert host.in_flight == 0


def test_best_effort_prefetches_only_while_the_request_is_queued() -> None:
    world = SimCluster()
    best_effort = PrefetchConfig(policy="best_effort", threshold_tokens=8)
    engine = start(world, prefetch=best_effort, config=small_config(max_running_requests=1))
    world.submit(sim_request("first", PROMPT, max_tokens=1), engine)
    world.settle()
    world.forget(engine, host=True)
    submit(world, engine, "idle")  # the engine is idle: no time for the store
    engine.step()
    assert engine.under_way
    world.settle()
    assert reported_cached(world, "idle") == 0
    world.forget(engine, host=True)
    submit(world, engine, "before", [2] * 6)
    submit(world, engine, "behind")
    assert engine.store is not None
    for _ in range(3):
        engine.step()
        engine.store.advance()
    world.settle()
    world.check_settled()
    assert reported_cached(world, "behind") == 12


def test_an_abort_during_a_fetch_leaves_only_the_cancelled_job() -> None:
    world = SimCluster()
    engine = start(world)
    fetch = begin_fetch(world, engine)
    world.abort("again")
    world.deliver(("gateway", "u"))
    assert CancelFetch(job_id=fetch.job_id) in engine.step().tier_jobs
    assert world.outcome("again", engine) is Outcome.ABORTED
    assert not engine.scheduler.has_work()
    host = engine.cache.host_counts()
    assert host is not None
    assert host.in_flight == 3
    world.settle()
    world.check_settled()


def test_requests_waiting_for_the_store_count_against_the_queue_limit() -> None:
    world = SimCluster()
    engine = start(world, config=small_config(max_running_requests=1, max_queued_requests=1))
    begin_find(world, engine)
    submit(world, engine, "one that could run")
    submit(world, engine, "more")
    engine.step()
    assert not world.ended["one that could run", engine.epoch]
    (ended,) = world.ended["more", engine.epoch]
    assert ended.error_code == "overloaded"


def test_two_requests_for_the_same_pages_fetch_and_load_them_once() -> None:
    world = SimCluster()
    engine = start(world)
    begin_find(world, engine)
    submit(world, engine, "also")
    world.settle()
    world.check_settled()
    assert [reported_cached(world, each) for each in ("again", "also")] == [12, 12]
    assert engine.store is not None
    assert len(engine.store.fetched) == 3
    assert totals(engine)["host_loaded_pages"] == 3


def test_a_shared_fetch_continues_when_the_request_that_began_it_is_aborted() -> None:
    world = SimCluster()
    engine = start(world)
    begin_fetch(world, engine)
    submit(world, engine, "also")
    engine.step()
    world.abort("again")
    world.settle()
    world.check_settled()
    assert reported_cached(world, "also") == 12
    assert engine.store is not None
    assert len(engine.store.fetched) == 3


def test_a_failed_shared_load_is_a_miss_for_one_request_and_retried_for_the_other() -> None:
    world = SimCluster()
    engine = start(world, prefetch=None)
    world.submit(sim_request("first", PROMPT, max_tokens=1), engine)
    world.settle()
    engine.cache.evict(engine.cache.counts().evictable)
    submit(world, engine, "one")
    submit(world, engine, "two")
    engine.mover.fail_next = True
    world.settle()
    world.check_settled()
    assert sorted([reported_cached(world, "one") or 0, reported_cached(world, "two") or 0]) == [0, 12]


def test_pages_after_a_failed_fetch_are_computed_and_those_before_it_are_used() -> None:
    world = SimCluster()
    engine = start(world)
    begin_fetch(world, engine)
    assert engine.store is not None
    engine.store.fail_next = True  # after one page of three
    world.settle()
    world.check_settled()
    assert reported_cached(world, "again") == 4
    assert totals(engine)["storage_failed_pages"] == 2


def test_a_page_missing_in_the_middle_ends_the_hit() -> None:
    world = SimCluster()
    engine = start(world)
    begin_find(world, engine)
    del world.stored[list(world.stored)[2]]
    world.settle()
    world.check_settled()
    assert reported_cached(world, "again") == 8
    assert totals(engine)["storage_miss_pages"] == 3 + 1


def test_too_few_pages_are_computed_rather_than_fetched() -> None:
    world = SimCluster()
    engine = start(world)
    begin_find(world, engine)
    for digest in list(world.stored)[1:]:
        del world.stored[digest]
    world.settle()
    assert reported_cached(world, "again") == 0
    assert engine.store is not None
    assert engine.store.fetched == []
    world.submit(sim_request("short", [5] * 7, max_tokens=1), engine)
    world.deliver(("gateway", "u"))
    assert not any(isinstance(job, FindPages) for job in engine.step().tier_jobs)
    world.settle()


def test_after_a_detach_no_request_queries_or_waits_for_the_store() -> None:
    world = SimCluster()
    engine = start(world)
    begin_fetch(world, engine)
    engine.events.append(StorageAttached(attached=False))
    assert engine.step().batch is not None
    world.settle()
    world.check_settled()
    world.forget(engine, host=True)
    submit(world, engine, "later")
    assert not any(isinstance(job, FindPages | StorePages) for job in engine.step().tier_jobs)
    world.settle()
    world.stored.clear()
    engine.events.append(StorageAttached(attached=True))  # another store: pages of the first are stored again
    submit(world, engine, "last")
    world.settle()
    world.check_settled()
    assert len(world.stored) == 3


def test_a_preempted_request_does_not_query_the_store_again() -> None:
    world = SimCluster()
    engine = start(world, num_pages=8)
    for number in range(2):
        request = sim_request(f"r{number}", [number] * 9, max_tokens=12, ignore_eos=True)
        world.submit(request, engine)
    world.settle()
    world.check_settled()
    assert totals(engine)["preemptions"] > 0
    assert totals(engine)["prefetches"] == 2


def test_prefill_and_decode_both_fetch_before_they_compute_and_grant() -> None:
    world = SimCluster()
    prefill, decode = start(world, Role.PREFILL, "p"), start(world, Role.DECODE, "d")
    for number in range(2):
        world.submit_pair(sim_request(f"r{number}", PROMPT[:12], max_tokens=4), prefill, decode)
        world.settle()
        world.forget(prefill, host=True)
        world.forget(decode, host=True)
    world.check_settled()
    assert totals(prefill)["storage_fetched_pages"] == 2  # prefill computes the last token, thus the third page
    assert totals(decode)["storage_fetched_pages"] == 3
    assert totals(decode)["handoff_pages"] == 3  # of the first request alone


def test_a_grant_that_arrives_during_a_prefetch_is_kept() -> None:
    world = SimCluster()
    prefill, decode = start(world, Role.PREFILL, "p"), start(world, Role.DECODE, "d", prefetch=None)
    world.submit(sim_request("first", PROMPT, max_tokens=1), prefill)
    world.settle()
    world.forget(prefill, host=True)
    world.submit_pair(sim_request("pair", PROMPT, max_tokens=3), prefill, decode)
    world.deliver(("gateway", "p"))
    prefill.step()
    assert prefill.store is not None
    prefill.store.hang()
    world.deliver(("gateway", "d"))
    decode.step()
    world.deliver((decode.epoch, "p"))
    prefill.step()
    assert prefill.scheduler.status().num_waiting == 1
    prefill.store.hung.clear()
    world.settle()
    world.check_settled()
    assert world.outcome("pair", decode) is Outcome.FINISHED
    assert reported_cached(world, "pair") == 12


def test_pages_of_another_salt_are_not_hit_in_the_store() -> None:
    world = SimCluster()
    engine = start(world)
    world.submit(sim_request("first", PROMPT, max_tokens=1, cache_salt="a"), engine)
    world.settle()
    world.forget(engine, host=True)
    world.submit(sim_request("other", PROMPT, max_tokens=1, cache_salt="b"), engine)
    world.settle()
    world.forget(engine, host=True)
    world.submit(sim_request("same", PROMPT, max_tokens=1, cache_salt="a"), engine)
    world.settle()
    world.check_settled()
    assert (reported_cached(world, "other"), reported_cached(world, "same")) == (0, 12)


def test_a_page_that_failed_to_store_is_stored_again_when_it_is_hit() -> None:
    world = SimCluster()
    engine = start(world)
    assert engine.store is not None
    world.submit(sim_request("first", PROMPT, max_tokens=1), engine)
    while not any(isinstance(job, StorePages) for job in engine.plan.tier_jobs):
        world.deliver(("gateway", "u"))
        engine.store.advance()
        engine.mover.advance()
        engine.finish_step()
        engine.step()
    engine.store.fail_next = True
    world.settle()
    assert (len(world.stored), totals(engine)["storage_failed_pages"]) == (2, 1)
    submit(world, engine)
    world.settle()
    world.check_settled()
    assert len(world.stored) == 3
