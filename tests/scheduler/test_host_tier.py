"""Requests and the host tier: what comes back from it, what waits meanwhile, and what a failed copy means."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from scheduler_sim import SimEngine, World, make_request, small_config

from kvist.kv.cache import MAX_BACKUPS, MAX_PAGES_BACKED_UP, PageCache
from kvist.kv.host_tier import HostTier
from kvist.kv.moves import BackUpPages, LoadPages, PagesBackedUp
from kvist.request import EngineRequest, Outcome
from kvist.scheduler.events import FlushRequested

PROMPT = [1] * 13  # 3 full pages of 4 tokens


def start(world: World, role: str = "unified", name: str = "u", **engine: object) -> SimEngine:
    return world.start(name, role, small_config(), **{"num_host_pages": 40, **engine})  # type: ignore[arg-type]


def drop_from_device(engine: SimEngine) -> None:
    """As others' need for pages would."""
    engine.cache._evict(engine.cache.counts().evictable)


def begin_load(world: World, engine: SimEngine, beside: Sequence[EngineRequest] = ()) -> None:
    """PROMPT was answered, its pages are in the host tier only, and are asked for by a second request."""
    world.submit(make_request("first", PROMPT, max_tokens=1), engine)
    world.settle()
    drop_from_device(engine)
    for request in (make_request("again", PROMPT, max_tokens=2), *beside):
        world.submit(request, engine)
        world.deliver(("gateway", engine.name))
    (load,) = engine.step().moves
    assert isinstance(load, LoadPages)
    assert len(load.page_ids) == 3


def told_cached(world: World, request_id: str) -> int | None:
    return world.chunks[request_id][0][1].num_cached_tokens


def test_pages_that_left_the_device_come_back_from_the_host() -> None:
    world = World()
    engine = start(world)
    begin_load(world, engine)
    assert engine.scheduler.load().pages.in_flight == 3
    world.settle()
    world.check_settled()
    assert told_cached(world, "again") == 12
    totals = engine.scheduler.load().totals
    assert (totals["host_loaded_pages"], totals["cached_prompt_tokens"]) == (3, 12)


def test_a_request_that_loads_holds_nobody_back() -> None:
    world = World()
    engine = start(world)
    begin_load(world, engine, [make_request("beside", [2] * 6, max_tokens=1)])
    world.submit(make_request("behind", [3] * 6, max_tokens=1), engine)
    world.deliver(("gateway", "u"))
    for request_id in ("beside", "behind"):
        assert [item.request_id for item in engine.under_way[0].items] == [request_id]
        engine.finish_step()
        engine.step()
        assert world.outcome(request_id, engine) is Outcome.FINISHED
    assert not world.chunks["again"]


def test_a_failed_load_is_a_miss_and_no_error() -> None:
    world = World()
    engine = start(world)
    begin_load(world, engine)
    engine.mover.fail_next = True
    world.settle()
    world.check_settled()
    assert world.outcome("again", engine) is Outcome.FINISHED
    assert told_cached(world, "again") == 0
    assert engine.scheduler.load().totals["host_failed_pages"] == 3


def test_an_abort_during_a_load_keeps_the_pages_until_it_is_reported() -> None:
    world = World()
    engine = start(world)
    begin_load(world, engine)
    world.abort("again")
    world.deliver(("gateway", "u"))
    engine.step()
    assert world.outcome("again", engine) is Outcome.ABORTED
    assert engine.scheduler.load().pages.in_flight == 3
    world.settle()
    world.check_settled()


def test_pages_under_backup_are_neither_freed_nor_evicted_until_it_is_reported() -> None:
    world = World()
    engine = start(world, num_pages=4)
    world.submit(make_request("first", PROMPT, max_tokens=1), engine)
    world.deliver(("gateway", "u"))
    while not world.ended["first", engine.epoch]:
        engine.step()
        engine.finish_step()
    counts = engine.scheduler.load().pages
    assert (counts.cached, counts.evictable) == (3, 0)
    world.submit(make_request("next", [2] * 13, max_tokens=1), engine)
    world.deliver(("gateway", "u"))
    assert engine.step().batch is None  # it waits for the copies
    world.settle()
    world.check_settled()
    assert world.outcome("next", engine) is Outcome.FINISHED


def test_a_failed_backup_is_written_again_when_the_page_is_hit() -> None:
    world = World()
    engine = start(world)
    engine.mover.fail_next = True
    world.submit(make_request("first", PROMPT[:5], max_tokens=1), engine)
    world.settle()
    totals = engine.scheduler.load().totals
    assert (totals["host_backed_up_pages"], totals["host_failed_pages"]) == (0, 1)
    world.submit(make_request("second", PROMPT[:5], max_tokens=1), engine)
    world.settle()
    world.check_settled()
    assert engine.scheduler.load().totals["host_backed_up_pages"] == 1


def test_the_selective_policy_copies_a_page_after_its_second_hit() -> None:
    world = World()
    engine = start(world, write_policy="write_through_selective")
    backed_up = []
    for number in range(4):
        world.submit(make_request(f"r{number}", PROMPT, max_tokens=1), engine)
        world.settle()
        backed_up.append(engine.scheduler.load().totals["host_backed_up_pages"])
    world.check_settled()
    assert backed_up == [0, 0, 3, 3]


def test_a_flush_empties_both_tiers() -> None:
    world = World()
    engine = start(world)
    world.submit(make_request("first", PROMPT, max_tokens=1), engine)
    world.settle()
    engine.events.append(FlushRequested(call_id="f"))
    plan = engine.step()
    assert plan.flushes[0].num_pages == 6
    assert len(plan.cached_removed) == 3
    world.submit(make_request("again", PROMPT, max_tokens=1), engine)
    world.settle()
    assert told_cached(world, "again") == 0


def test_a_page_is_told_as_cached_while_any_tier_has_it() -> None:
    world = World()
    engine = start(world)
    world.submit(make_request("first", PROMPT, max_tokens=1), engine)
    world.settle()
    drop_from_device(engine)
    assert engine.step().cached_removed == ()
    engine.cache._host.flush()  # type: ignore[union-attr]
    assert len(engine.step().cached_removed) == 3


def test_prefill_and_decode_load_before_they_compute_and_grant() -> None:
    world = World()
    prefill, decode = start(world, "prefill", "p"), start(world, "decode", "d")
    for number in range(2):
        world.submit_pair(make_request(f"r{number}", PROMPT, max_tokens=4), prefill, decode)
        world.settle()
        drop_from_device(prefill)
        drop_from_device(decode)
    world.check_settled()
    for engine in (prefill, decode):
        assert engine.scheduler.load().totals["host_loaded_pages"] == 3
    assert decode.scheduler.load().totals["handoff_pages"] == 4 + 1


def test_pages_that_decode_generated_come_back_to_it() -> None:
    world = World()
    engine = start(world)
    world.submit(make_request("first", PROMPT, max_tokens=9, ignore_eos=True), engine)
    world.settle()
    answer, _ = world.stream("first")
    drop_from_device(engine)
    world.submit(make_request("turn2", [*PROMPT, *answer], max_tokens=1), engine)
    world.settle()
    world.check_settled()
    assert told_cached(world, "turn2") == 20


@pytest.mark.parametrize(("num_jobs", "num_pages"), [(MAX_BACKUPS + 3, 1), (2, MAX_PAGES_BACKED_UP // 2 + 1)])
def test_backups_beyond_the_limit_are_left_out_and_counted(num_jobs: int, num_pages: int) -> None:
    cache = PageCache(num_pages=4096, page_size=1, namespace="n", host=HostTier(4096))
    for job in range(num_jobs):
        token_ids = [job] * num_pages
        lease = cache.open(token_ids, max_tokens=0)
        assert cache.grow(lease, num_pages)
        cache.commit(lease, token_ids, num_pages)
        cache.close(lease)
    jobs = cache.drain_jobs()
    asked = sum(len(job.page_ids) for job in jobs)
    assert len(jobs) <= MAX_BACKUPS
    assert asked <= MAX_PAGES_BACKED_UP
    assert cache.totals()["host_skipped_pages"] == num_jobs * num_pages - asked > 0
    for job in jobs:
        assert isinstance(job, BackUpPages)
        cache.backed_up(PagesBackedUp(job_id=job.job_id, ok=True))
    assert cache.counts().evictable == num_jobs * num_pages


@pytest.mark.parametrize("seed", range(12))
def test_a_small_device_pool_under_load_takes_much_from_the_host_and_tells_no_wrong_token(seed: int) -> None:
    draw = random.Random(seed)
    world = World()
    config = small_config(max_queued_requests=1000, overlap=bool(seed % 2), queue_timeout_s=1e6)
    policy = draw.choice(["write_through", "write_through_selective"])
    engine = world.start(
        "u",
        "unified",
        config,
        num_pages=draw.randrange(9, 14),
        num_host_pages=draw.choice([12, 60]),
        write_policy=policy,
    )
    turns = [[token_id] * 6 for token_id in range(5)]
    for number in range(150):
        turn = draw.choice(turns)
        world.submit(make_request(f"r{number}", list(turn[:24]), max_tokens=4, seed=number), engine)
        world.deliver(("gateway", "u"))
        turn.extend([draw.randrange(2)] * draw.choice([0, 0, 2, 4]))
        for _ in range(draw.randrange(12)):
            engine.mover.fail_next = draw.random() < 0.1
            draw.choice([lambda: engine.mover.advance(draw.random() < 0.5), engine.step, engine.finish_step])()
        if draw.random() < 0.1:
            world.abort(f"r{number}")
    world.settle()
    world.check_settled()
    totals = engine.scheduler.load().totals
    assert totals["host_loaded_pages"] > 5
    assert totals["host_failed_pages"] > 0


def test_a_page_that_others_hold_is_not_backed_up_for_who_has_its_duplicate() -> None:
    cache = PageCache(num_pages=8, page_size=1, namespace="n", host=HostTier(1))
    leases = []
    for token_id in (1, 2, 2):  # the second finds the only slot in use, the third has a duplicate of its page
        lease = cache.open([token_id], max_tokens=0)
        assert cache.grow(lease, 1)
        leases.append(lease)
    cache.commit(leases[0], [1], 1)
    cache.commit(leases[1], [2], 1)
    (job,) = cache.drain_jobs()
    cache.backed_up(PagesBackedUp(job_id=job.job_id, ok=True))
    cache.commit(leases[2], [2], 1)
    assert cache.drain_jobs() == []
