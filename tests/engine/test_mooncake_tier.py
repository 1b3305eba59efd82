"""Engines with a Mooncake pool as their storage tier: no fault of the pool changes a token or fails a request.

Real schedulers, runner, pools and movers, a real master and real stores. tests/store/test_mooncake_faults.py has the
faults as the store sees them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

import pytest

from kvist.cluster.ports import free_ports
from kvist.models.decoder import CausalLM
from kvist.request import Role
from kvist.store.breaker import PAUSE_S
from kvist.store.config import StorageConfig
from kvist.store.control import RETRY_S
from kvist.testing.memory_cluster import MemoryCluster, ShapeFields
from kvist.testing.memory_engine import MemoryEngine
from kvist.testing.mooncake_pool import MooncakePool
from tests.engine.conftest import request_of
from tests.engine.test_storage_tier import LENGTHS, answer, hits, prompt, restart, start


class PoolWorld(MemoryCluster):
    model: str

    def start(self, **shape: Unpack[ShapeFields]) -> MemoryEngine:
        shape["fingerprint"] = f"{shape.get('fingerprint', 'one')} of {self.model}"
        return super().start(**shape)


@pytest.fixture
def world(tiny_model: CausalLM, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[PoolWorld]:
    """A cluster whose models no other test has, and so whose pages no other test has stored."""
    made = PoolWorld(tiny_model, tmp_path.resolve(), overlap=True)
    made.model = request.node.name
    yield made
    made.close()


def tier_of(pool: MooncakePool, num_replicas: int = 1) -> StorageConfig:
    return StorageConfig(
        hicache_storage_backend="mooncake",
        hicache_storage_options={"mooncake_master_addr": pool.master, "mooncake_replica_num": num_replicas},
        hicache_storage_deadline_s=1e6,  # of the cluster's clock, which runs faster than the pool's
    )


def computed(world: PoolWorld, storage: StorageConfig) -> tuple[MemoryEngine, dict[int, list[int]]]:
    """Answer prompts with an engine, which stores their pages, and wait until they are stored."""
    engine = start(world, storage)
    tokens = {n: answer(world, engine, request_of(f"0-{n}", prompt(n), temperature=0.0))[0] for n in LENGTHS}
    num_pages = sum(n // 4 for n in LENGTHS)
    world.step_until(lambda: engine.scheduler.status().totals["storage_stored_pages"] >= num_pages)
    return engine, tokens


def answer_all(world: PoolWorld, engine: MemoryEngine, expected: dict[int, list[int]], life: int) -> int:
    """Answer the prompts again, check their tokens, and return the number of cached tokens."""
    num_cached = 0
    for n, tokens in expected.items():
        found, cached = answer(world, engine, request_of(f"{life}-{n}", prompt(n), temperature=0.0))
        assert found == tokens
        num_cached += cached or 0
    return num_cached


def test_pages_of_one_worker_are_hits_on_a_prefill_and_a_decode_worker(
    world: PoolWorld, breakable_pool: MooncakePool
) -> None:
    storage = tier_of(breakable_pool)
    engine, expected = computed(world, storage)
    world.kill(engine)
    pair = start(world, storage, role=Role.PREFILL), start(world, storage, role=Role.DECODE)
    for n, tokens in expected.items():
        stream = world.submit_pair(*pair, request_of(f"1-{n}", prompt(n), temperature=0.0))
        world.run()
        assert stream.token_ids == tokens
    for each in pair:
        assert each.scheduler.status().totals["storage_fetched_pages"] >= 1 + 4 + 8 + 14
        assert world.storage_status(each, "detach").state == "detached"
    other = start(world, storage)  # stores a prompt while the pair has no store
    later = answer(world, other, request_of("2-other", prompt(41), temperature=0.0))[0]
    world.step_until(lambda: other.scheduler.status().totals["storage_stored_pages"] >= 10)
    for each in pair:
        assert world.storage_status(each, "attach", backend="mooncake").state == "attached"
    before = [each.scheduler.status().totals["storage_fetched_pages"] for each in pair]
    stream = world.submit_pair(*pair, request_of("2-41", prompt(41), temperature=0.0))
    world.run()
    assert stream.token_ids == later
    assert stream.cached == hits(41)
    for each, num_before in zip(pair, before, strict=True):
        assert each.scheduler.status().totals["storage_fetched_pages"] >= num_before + 10
    world.check_ledgers()


def test_two_models_on_one_pool_never_hit_each_others_pages(world: PoolWorld, breakable_pool: MooncakePool) -> None:
    engine, expected = computed(world, tier_of(breakable_pool))
    other = start(world, tier_of(breakable_pool), fingerprint="another")
    assert answer_all(world, other, expected, 1) == 0
    assert other.scheduler.status().totals["storage_hit_pages"] == 0
    salted = request_of("salted", prompt(33), temperature=0.0, cache_salt="tenant")
    assert answer(world, restart(world, engine, tier_of(breakable_pool)), salted)[1] == 0
    world.check_ledgers()


@pytest.mark.parametrize(("num_replicas", "how"), [(2, signal.SIGKILL), (1, signal.SIGKILL), (2, signal.SIGSTOP)])
def test_a_killed_or_stopped_store_changes_no_token_and_with_two_replicas_no_hit(
    world: PoolWorld, breakable_pool: MooncakePool, num_replicas: int, how: signal.Signals
) -> None:
    storage = tier_of(breakable_pool, num_replicas)
    engine, expected = computed(world, storage)
    engine = restart(world, engine, storage)
    breakable_pool.stores[0].signal(how)
    num_cached = answer_all(world, engine, expected, 1)
    if num_replicas == 2:
        assert num_cached == sum(map(hits, LENGTHS))
    assert engine.storage.status().breaker == "closed"
    world.check_ledgers()


def test_without_its_master_requests_are_computed_and_the_tier_comes_back_by_itself(
    world: PoolWorld, breakable_pool: MooncakePool
) -> None:
    storage = tier_of(breakable_pool)
    engine, expected = computed(world, storage)
    engine = restart(world, engine, storage)
    breakable_pool.master_process.signal(signal.SIGKILL)
    assert answer_all(world, engine, expected, 1) == 0
    status = engine.storage.status()
    assert status.breaker != "closed"
    assert status.num_quarantined_pages == 0
    assert engine.storage.totals()["storage_raised_calls"] == 0
    breakable_pool.start_master()
    world.clock.advance(PAUSE_S)
    world.step_until(lambda: engine.storage.status().breaker == "closed", step_s=0.2)
    longer = request_of("longer", prompt(41), temperature=0.0)
    tokens, _ = answer(world, engine, longer)
    assert answer(world, restart(world, engine, storage), longer)[0] == tokens
    world.check_ledgers()


def test_mooncake_1871_after_a_change_of_master_lost_pages_are_computed_and_stored_again(
    world: PoolWorld, breakable_pool: MooncakePool
) -> None:
    storage = tier_of(breakable_pool)
    engine, expected = computed(world, storage)
    engine = restart(world, engine, storage)
    breakable_pool.master_process.signal(signal.SIGKILL)
    assert answer_all(world, engine, expected, 1) == 0
    breakable_pool.start_master()  # the new one knows no page: the stores of this pool have no SSD
    num_stores = len(breakable_pool.stores)  # until the master knows them all, a put has no room
    world.step_until(lambda: breakable_pool.num_segments() == num_stores, step_s=0.2)
    engine = restart(world, engine, storage)
    assert answer_all(world, engine, expected, 2) == 0
    num_pages = sum(n // 4 for n in LENGTHS)
    world.step_until(lambda: engine.scheduler.status().totals["storage_stored_pages"] >= num_pages)
    assert answer_all(world, restart(world, engine, storage), expected, 3) == sum(map(hits, LENGTHS))
    world.check_ledgers()


def test_a_worker_whose_master_is_down_at_the_start_serves_and_uses_the_pool_when_it_is_there(
    world: PoolWorld, breakable_pool: MooncakePool
) -> None:
    storage = tier_of(breakable_pool)
    engine, expected = computed(world, storage)
    breakable_pool.master_process.signal(signal.SIGKILL)
    engine = restart(world, engine, storage)
    status = engine.storage.status()
    assert (status.state, status.backend) == ("attaching", "mooncake")
    assert "start one with `kvist master`" in status.note
    assert answer_all(world, engine, expected, 1) == 0
    breakable_pool.start_master()
    world.clock.advance(RETRY_S)
    world.step_until(lambda: engine.storage.status().state == "attached", step_s=0.2)
    assert engine.storage.status().note == ""
    num_stores = len(breakable_pool.stores)  # until the master knows them all, a put has no room
    world.step_until(lambda: breakable_pool.num_segments() == num_stores, step_s=0.2)
    longer = request_of("longer", prompt(41), temperature=0.0)
    tokens, _ = answer(world, engine, longer)
    world.step_until(lambda: engine.scheduler.status().totals["storage_stored_pages"] >= 10)
    again = request_of("again", prompt(41), temperature=0.0)
    assert answer(world, restart(world, engine, storage), again) == (tokens, hits(41))
    world.check_ledgers()


def test_a_client_may_detach_or_replace_a_store_that_cannot_be_reached(
    world: PoolWorld, breakable_pool: MooncakePool
) -> None:
    (port,) = free_ports(1)
    nowhere = StorageConfig(
        hicache_storage_backend="mooncake",
        hicache_storage_options={"mooncake_master_addr": f"127.0.0.1:{port}"},
        hicache_storage_roots=(f"mooncake://{breakable_pool.master}",),
        hicache_storage_deadline_s=1e6,
    )
    engine = start(world, nowhere)
    for _ in range(3):  # tries that fail
        world.clock.advance(RETRY_S)
        world.step()
    assert engine.storage.status().state == "attaching"
    assert world.storage_status(engine, "detach").state == "detached"
    world.clock.advance(RETRY_S)
    world.step()
    assert engine.storage.status().state == "detached"
    engine = start(world, nowhere)
    attached = world.storage_status(
        engine, "attach", backend="mooncake", mooncake_master_addr=f"http://{breakable_pool.master}"
    )
    assert (attached.state, attached.note) == ("attached", "")
    world.check_ledgers()


def test_a_pool_is_detached_and_attached_while_the_engine_serves(
    world: PoolWorld, breakable_pool: MooncakePool
) -> None:
    engine, expected = computed(world, tier_of(breakable_pool))
    engine = restart(world, engine, tier_of(breakable_pool))
    assert engine.storage.status().location == f"mooncake:{breakable_pool.master}/default"
    left = world.storage_status(engine, "detach")
    assert (left.state, left.note) == ("detached", "")
    assert answer(world, engine, request_of("without", prompt(60), temperature=0.0)) == (expected[60], 0)
    url = f"http://{breakable_pool.master}"
    attached = world.storage_status(engine, "attach", backend="mooncake", mooncake_master_addr=url)
    assert (attached.state, attached.location) == ("attached", f"mooncake:{breakable_pool.master}/default")
    assert answer(world, engine, request_of("with", prompt(33), temperature=0.0)) == (expected[33], hits(33))
    world.check_ledgers()
