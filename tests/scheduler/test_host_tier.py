"""Requests and the host tier: loads, backups, waits, and failed copies."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from kvist.kv.cache import PageCache
from kvist.kv.keys import page_digests
from kvist.kv.tiers.copies import MAX_BACKUPS, MAX_PAGES_BACKED_UP
from kvist.kv.tiers.host import HostTier
from kvist.kv.tiers.write_policy import WRITE_POLICIES
from kvist.plan.plan import Flush
from kvist.plan.tiers import BackUpPages, LoadPages, PagesBackedUp
from kvist.request import EngineRequest, Outcome, Role
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.engine import SimEngine, small_config
from kvist.testing.page_events import changed_pages, short
from kvist.wire import FlushCache
from tests.budget import budget

PROMPT = [1] * 13  # 3 full pages of 4 tokens


def start(world: SimCluster, role: Role = Role.UNIFIED, name: str = "u", **shape: Any) -> SimEngine:
    return world.start(name, role=role, **{"config": small_config(), "num_host_pages": 40, **shape})


def drop_from_device(engine: SimEngine) -> None:
    """Evict all cached pages from the device pool."""
    engine.cache.evict(engine.cache.counts().evictable)


def begin_load(world: SimCluster, engine: SimEngine, beside: Sequence[EngineRequest] = ()) -> None:
    """Answer PROMPT, evict its pages to the host tier, and begin to load them for a second request."""
    world.submit(sim_request("first", PROMPT, max_tokens=1), engine)
    world.settle()
    drop_from_device(engine)
    for request in (sim_request("again", PROMPT, max_tokens=2), *beside):
        world.submit(request, engine)
        world.deliver(("gateway", engine.name))
    (load,) = engine.step().tier_jobs
    assert isinstance(load, LoadPages)
    assert len(load.page_ids) == 3


def reported_cached(world: SimCluster, request_id: str) -> int | None:
    return world.chunks[request_id][0][1].num_cached_tokens


def test_evicted_pages_are_loaded_from_the_host_tier() -> None:
    world = SimCluster()
    engine = start(world)
    begin_load(world, engine)
    assert engine.scheduler.status().pages.in_flight == 3
    world.settle()
    world.check_settled()
    assert reported_cached(world, "again") == 12
    totals = engine.scheduler.status().totals
    assert (totals["host_loaded_pages"], totals["cached_prompt_tokens"]) == (3, 12)


def test_a_loading_request_does_not_block_other_requests() -> None:
    world = SimCluster()
    engine = start(world)
    begin_load(world, engine, [sim_request("beside", [2] * 6, max_tokens=1)])
    world.submit(sim_request("behind", [3] * 6, max_tokens=1), engine)
    world.deliver(("gateway", "u"))
    for request_id in ("beside", "behind"):
        assert engine.running == [request_id]
        engine.finish_step()
        engine.step()
        assert world.outcome(request_id, engine) is Outcome.FINISHED
    assert not world.chunks["again"]


def test_a_failed_load_is_a_miss_and_not_an_error() -> None:
    world = SimCluster()
    engine = start(world)
    begin_load(world, engine)
    engine.mover.fail_next = True
    world.settle()
    world.check_settled()
    assert world.outcome("again", engine) is Outcome.FINISHED
    assert reported_cached(world, "again") == 0
    assert engine.scheduler.status().totals["host_failed_pages"] == 3


def test_an_abort_during_a_load_keeps_the_pages_until_it_is_reported() -> None:
    world = SimCluster()
    engine = start(world)
    begin_load(world, engine)
    world.abort("again")
    world.deliver(("gateway", "u"))
    engine.step()
    assert world.outcome("again", engine) is Outcome.ABORTED
    assert engine.scheduler.status().pages.in_flight == 3
    world.settle()
    world.check_settled()


def test_pages_under_backup_are_neither_freed_nor_evicted_until_it_is_reported() -> None:
    world = SimCluster()
    engine = start(world, num_pages=4)
    world.submit(sim_request("first", PROMPT, max_tokens=1), engine)
    world.deliver(("gateway", "u"))
    while not world.ended["first", engine.epoch]:
        engine.step()
        engine.finish_step()
    counts = engine.scheduler.status().pages
    assert (counts.cached, counts.evictable) == (3, 0)
    world.submit(sim_request("next", [2] * 13, max_tokens=1), engine)
    world.deliver(("gateway", "u"))
    assert engine.step().batch is None  # the request waits for the backups
    world.settle()
    world.check_settled()
    assert world.outcome("next", engine) is Outcome.FINISHED


def test_a_failed_backup_is_repeated_when_the_page_is_hit() -> None:
    world = SimCluster()
    engine = start(world)
    engine.mover.fail_next = True
    world.submit(sim_request("first", PROMPT[:5], max_tokens=1), engine)
    world.settle()
    totals = engine.scheduler.status().totals
    assert (totals["host_backed_up_pages"], totals["host_failed_pages"]) == (0, 1)
    world.submit(sim_request("second", PROMPT[:5], max_tokens=1), engine)
    world.settle()
    world.check_settled()
    assert engine.scheduler.status().totals["host_backed_up_pages"] == 1


def test_the_selective_policy_copies_a_page_after_its_second_hit() -> None:
    world = SimCluster()
    engine = start(world, write_policy="write_through_selective")
    backed_up = []
    for number in range(4):
        world.submit(sim_request(f"r{number}", PROMPT, max_tokens=1), engine)
        world.settle()
        backed_up.append(engine.scheduler.status().totals["host_backed_up_pages"])
    world.check_settled()
    assert backed_up == [0, 0, 3, 3]


def fill_device(world: SimCluster, engine: SimEngine) -> None:
    """Answer three prompts of 3 pages each in a pool of 12: pages of PROMPT were hit once, and used longest ago."""
    for number, token_id in enumerate((1, 1, 2, 3)):
        world.submit(sim_request(f"fill{number}", [token_id] * 13, max_tokens=1), engine)
        world.settle()
    assert engine.scheduler.status().totals["host_backed_up_pages"] == 0


def test_write_back_copies_whole_prefixes_before_they_are_evicted() -> None:
    world = SimCluster()
    engine = start(world, write_policy="write_back")
    fill_device(world, engine)
    assert not engine.mover.busy
    world.submit(sim_request("more", [4] * 13, max_tokens=1), engine)
    world.settle()
    totals = engine.scheduler.status().totals
    assert (totals["host_backed_up_pages"], totals["device_evicted_pages"]) == (3, 1)
    world.submit(sim_request("again", PROMPT, max_tokens=1), engine)
    world.settle()
    world.check_settled()
    assert reported_cached(world, "again") == 12
    (_, chunk), *_ = world.chunks["again"]
    assert (chunk.num_cached_host_tokens, chunk.num_cached_storage_tokens) == (
        4,
        0,
    )  # two of its pages were still in the device pool


def run_without_mover(world: SimCluster, engine: SimEngine, num_steps: int) -> None:
    world.deliver(("gateway", "u"))
    for _ in range(num_steps):
        engine.step()
        engine.finish_step()
    assert engine.mover.busy


def check_nothing_was_lost(world: SimCluster, engine: SimEngine) -> None:
    world.settle()
    world.check_settled()
    totals = engine.scheduler.status().totals
    assert totals["preemptions"] == 0
    assert totals["host_skipped_pages"] == totals["host_failed_pages"] == 0


def test_a_growing_request_waits_for_pending_backups_and_preempts_no_request() -> None:
    world = SimCluster()
    engine = start(world, write_policy="write_back")
    fill_device(world, engine)
    for name in ("a", "b"):
        world.submit(sim_request(name, [5] * 4, max_tokens=9, ignore_eos=True), engine)
        world.deliver(("gateway", "u"))
    run_without_mover(world, engine, 20)  # 3 pages are free; the two streams need 4 after their fifth tokens
    assert len(world.chunks["a"]) + len(world.chunks["b"]) < 10
    check_nothing_was_lost(world, engine)


def test_a_queued_request_waits_for_pending_backups_and_preempts_no_request() -> None:
    world = SimCluster()
    engine, decode = start(world, write_policy="write_back"), start(world, Role.DECODE, "d")
    fill_device(world, engine)
    world.submit_pair(sim_request("eager", [7] * 5, max_tokens=3), engine, decode)
    run_without_mover(world, engine, 3)  # without its Grant, this request would be preempted first
    world.submit(sim_request("large", [6] * 28, max_tokens=1), engine)
    run_without_mover(world, engine, 3)
    assert engine.scheduler.status().num_waiting == 1
    check_nothing_was_lost(world, engine)


@pytest.mark.parametrize("fault", ["no slot", "copies fail"])
def test_write_back_evicts_pages_that_cannot_be_copied_without_a_wait(fault: str) -> None:
    world = SimCluster()
    engine = start(world, write_policy="write_back", num_host_pages=2)
    fill_device(world, engine)
    for number in range(4):
        engine.mover.fail_next = fault == "copies fail"
        world.submit(sim_request(f"large{number}", [6 + number] * 29, max_tokens=1), engine)
        world.settle(max_rounds=60)
    world.check_settled()
    totals = engine.scheduler.status().totals
    assert totals["host_skipped_pages" if fault == "no slot" else "host_failed_pages"] > 0


def test_a_page_hit_during_its_backup_is_not_evicted_next() -> None:
    cache = PageCache(num_pages=3, page_size=1, namespace="n", host=HostTier(9), write_policy="write_back")

    def use(token_id: int) -> None:
        lease = cache.open([token_id], max_tokens=1)
        assert cache.grow(lease, 1)
        cache.start_load(lease, [token_id], max_tokens=1)
        cache.insert(lease, [token_id], 1)
        cache.close(lease)

    for token_id in (1, 2, 3):
        use(token_id)
    (job,) = cache.plan_jobs()  # the backup of the page used longest ago
    assert isinstance(job, BackUpPages)
    use(1)
    cache.backed_up(PagesBackedUp(job_id=job.job_id, ok=True))
    (job,) = cache.plan_jobs()
    cache.backed_up(PagesBackedUp(job_id=job.job_id, ok=True))
    use(4)
    hits = [cache.open([token_id], max_tokens=1).num_cached_tokens for token_id in (1, 2, 3, 4)]
    assert hits == [1, 0, 1, 1]


def test_one_tier_can_be_flushed_alone() -> None:
    world = SimCluster()
    engine = start(world)
    for tier, cached, tokens_from_host in (("device", 12, 12), ("host", 12, 0)):
        world.submit(sim_request(f"before {tier}", PROMPT, max_tokens=1), engine)
        world.settle()
        engine.events.append(FlushCache(call_id=tier, tier=tier))  # type: ignore[arg-type]
        flushes = [*engine.step().flushes, *engine.step().flushes]
        assert flushes == [Flush(call_id=tier, num_pages=3)]
        world.submit(sim_request(f"after {tier}", PROMPT, max_tokens=1), engine)
        world.settle()
        assert reported_cached(world, f"after {tier}") == cached
        (_, chunk), *_ = world.chunks[f"after {tier}"]
        assert chunk.num_cached_host_tokens == tokens_from_host
    nothing_below = start(world, name="v", num_host_pages=0)
    nothing_below.events.append(FlushCache(call_id="f", tier="host"))
    assert nothing_below.step().flushes == (Flush(call_id="f", num_pages=0),)


def test_fetched_pages_count_as_storage_hits_once() -> None:
    world = SimCluster()
    engine = start(world)
    world.submit(sim_request("first", PROMPT, max_tokens=1), engine)
    world.settle()
    assert engine.host is not None
    for page in [*engine.host.pages()][1:]:
        page.from_storage = True
    for number, split in enumerate([(12, 4, 8), (12, 12, 0)]):
        drop_from_device(engine)
        world.submit(sim_request(f"again{number}", PROMPT, max_tokens=1), engine)
        world.settle()
        (_, chunk), *_ = world.chunks[f"again{number}"]
        reported = (chunk.num_cached_tokens, chunk.num_cached_host_tokens, chunk.num_cached_storage_tokens)
        assert reported == split


def test_a_flush_empties_both_tiers() -> None:
    world = SimCluster()
    engine = start(world)
    world.submit(sim_request("first", PROMPT, max_tokens=1), engine)
    world.settle()
    engine.events.append(FlushCache(call_id="f"))
    plan = engine.step()
    assert plan.flushes == ()  # a restart could still restore the host pages
    assert {event.tier: len(event.removed) for event in plan.changed_pages} == {"device": 3, "host": 3}
    assert engine.step().flushes == (Flush(call_id="f", num_pages=6),)
    world.submit(sim_request("again", PROMPT, max_tokens=1), engine)
    world.settle()
    assert reported_cached(world, "again") == 0


def test_backups_and_evictions_of_each_tier_are_reported_with_their_tier() -> None:
    world = SimCluster()
    engine = start(world)
    world.submit(sim_request("first", PROMPT, max_tokens=1), engine)
    world.settle()
    names = tuple(page_digests(PROMPT, engine.cache.page_size, "sim"))
    assert engine.pages.pages == {(tier, short(name)) for tier in ("device", "host") for name in names}
    drop_from_device(engine)
    (event,) = engine.step().changed_pages
    assert (event.tier, event.stored, set(event.removed)) == ("device", (), set(names))
    assert engine.host is not None
    engine.host.flush()
    (event,) = engine.step().changed_pages
    assert (event.tier, event.stored, set(event.removed)) == ("host", (), set(names))


def test_with_write_back_a_page_is_reported_once_in_the_host_tier_before_it_leaves_the_device() -> None:
    cache = PageCache(num_pages=1, page_size=1, namespace="n", host=HostTier(9), write_policy="write_back")
    lease = cache.open([1], max_tokens=1)
    assert cache.grow(lease, 1)
    cache.insert(lease, [1], 1)
    cache.close(lease)
    (name,) = page_digests([1], 1, "n")
    assert cache.take_changed_pages() == (changed_pages(name),)
    (job,) = cache.plan_jobs()
    cache.backed_up(PagesBackedUp(job_id=job.job_id, ok=True))
    assert cache.take_changed_pages() == (changed_pages(name, tier="host"),)
    assert cache.grow(cache.open([2], max_tokens=1), 1)
    assert cache.take_changed_pages() == (changed_pages(removed=(name,)),)


def test_prefill_and_decode_load_host_pages_before_they_compute_and_grant() -> None:
    world = SimCluster()
    prefill, decode = start(world, Role.PREFILL, "p"), start(world, Role.DECODE, "d")
    for number in range(2):
        world.submit_pair(sim_request(f"r{number}", PROMPT, max_tokens=4), prefill, decode)
        world.settle()
        drop_from_device(prefill)
        drop_from_device(decode)
    world.check_settled()
    for engine in (prefill, decode):
        assert engine.scheduler.status().totals["host_loaded_pages"] == 3
    assert decode.scheduler.status().totals["handoff_pages"] == 4 + 1


def test_pages_of_generated_tokens_are_loaded_from_the_host_tier() -> None:
    world = SimCluster()
    engine = start(world)
    world.submit(sim_request("first", PROMPT, max_tokens=9, ignore_eos=True), engine)
    world.settle()
    answer, _ = world.stream("first")
    drop_from_device(engine)
    world.submit(sim_request("turn2", [*PROMPT, *answer], max_tokens=1), engine)
    world.settle()
    world.check_settled()
    assert reported_cached(world, "turn2") == 20


@pytest.mark.parametrize(("num_jobs", "num_pages"), [(MAX_BACKUPS + 3, 1), (2, MAX_PAGES_BACKED_UP // 2 + 1)])
def test_backups_beyond_the_limit_are_skipped_and_counted(num_jobs: int, num_pages: int) -> None:
    cache = PageCache(num_pages=4096, page_size=1, namespace="n", host=HostTier(4096))
    for job in range(num_jobs):
        token_ids = [job] * num_pages
        lease = cache.open(token_ids, max_tokens=0)
        assert cache.grow(lease, num_pages)
        cache.insert(lease, token_ids, num_pages)
        cache.close(lease)
    jobs = cache.plan_jobs()
    backups = [job for job in jobs if isinstance(job, BackUpPages)]
    assert len(backups) == len(jobs)
    num_requested = sum(len(job.page_ids) for job in backups)
    assert len(jobs) <= MAX_BACKUPS
    assert num_requested <= MAX_PAGES_BACKED_UP
    assert cache.totals()["host_skipped_pages"] == num_jobs * num_pages - num_requested > 0
    for backup in backups:
        cache.backed_up(PagesBackedUp(job_id=backup.job_id, ok=True))
    assert cache.counts().evictable == num_jobs * num_pages


@pytest.mark.parametrize("seed", range(budget(4, long=200)))
def test_a_small_device_pool_under_load_reads_from_the_host_tier_without_a_wrong_token(seed: int) -> None:
    draw = random.Random(seed)
    world = SimCluster()
    config = small_config(max_queued_requests=1000, overlap=bool(seed % 2), queue_timeout_s=1e6)
    policy = sorted(WRITE_POLICIES)[seed % len(WRITE_POLICIES)]
    engine = world.start(
        "u",
        role=Role.UNIFIED,
        config=config,
        num_pages=draw.randrange(9, 14),
        num_host_pages=draw.choice([12, 60]),
        write_policy=policy,
    )
    turns = [[token_id] * 6 for token_id in range(5)]
    for number in range(150):
        turn = draw.choice(turns)
        world.submit(sim_request(f"r{number}", list(turn[:24]), max_tokens=4, seed=number), engine)
        world.deliver(("gateway", "u"))
        turn.extend([draw.randrange(2)] * draw.choice([0, 0, 2, 4]))
        for _ in range(draw.randrange(12)):
            engine.mover.fail_next = draw.random() < 0.1
            draw.choice([lambda: engine.mover.advance(draw.random() < 0.5), engine.step, engine.finish_step])()
        if draw.random() < 0.1:
            world.abort(f"r{number}")
    world.settle()
    world.check_settled()
    totals = engine.scheduler.status().totals
    assert totals["host_loaded_pages"] > 5
    assert totals["host_failed_pages"] > 0


def test_a_page_is_not_backed_up_for_a_request_that_holds_its_duplicate() -> None:
    cache = PageCache(num_pages=8, page_size=1, namespace="n", host=HostTier(1))
    leases = []
    for token_id in (1, 2, 2):  # the second finds no free host slot, the third has a duplicate of its page
        lease = cache.open([token_id], max_tokens=0)
        assert cache.grow(lease, 1)
        leases.append(lease)
    cache.insert(leases[0], [1], 1)
    cache.insert(leases[1], [2], 1)
    (job,) = cache.plan_jobs()
    cache.backed_up(PagesBackedUp(job_id=job.job_id, ok=True))
    cache.insert(leases[2], [2], 1)
    assert cache.plan_jobs() == []
