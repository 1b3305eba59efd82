"""Engines with a store: tokens do not depend on the store, which may fail, hang, and be attached and detached.

Real schedulers, runner, pools, movers and file stores. The store's threads run in real time; the test's clock decides
deadlines.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import msgspec
import pytest

from kvist.errors import ConfigError
from kvist.kv.keys import page_digests
from kvist.request import EngineRequest, Outcome, Role
from kvist.store import STORES
from kvist.store.backend import StoreContext
from kvist.store.breaker import PAUSE_S
from kvist.store.config import StorageConfig
from kvist.testing.memory_cluster import MemoryCluster, ShapeFields
from kvist.testing.memory_engine import MemoryEngine
from kvist.testing.memory_store import MEMORY_STORE, MemoryStore
from kvist.testing.specs import RequestFields
from tests.engine.conftest import request_of

GREEDY: RequestFields = {"temperature": 0.0}
SEEDED: RequestFields = {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "min_p": 0.001, "seed": 12345}
SAMPLING = pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
LENGTHS = (5, 8, 17, 33, 60)
DEADLINE_S = 10.0


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    draw = random.Random(1000 * seed + length)
    return tuple(draw.randrange(3, 128) for _ in range(length))


def hits(length: int) -> int:
    return (length - 1) // 4 * 4


def file_store(path: Path, deadline_s: float = 1e6, **settings: Any) -> StorageConfig:
    return StorageConfig(
        hicache_storage_backend="file",
        hicache_storage_options={"path": str(path), **settings},
        hicache_storage_deadline_s=deadline_s,
    )


def start(world: MemoryCluster, store: StorageConfig, **settings: Unpack[ShapeFields]) -> MemoryEngine:
    shape: ShapeFields = {
        "num_pages": 64,
        "num_host_pages": 200,
        "queue_timeout_s": 1e6,
        "storage": store,
        **settings,
    }
    return world.start(**shape)


def restart(
    world: MemoryCluster, engine: MemoryEngine, store: StorageConfig, **settings: Unpack[ShapeFields]
) -> MemoryEngine:
    """Restart the engine: its device pool and host tier are empty."""
    world.kill(engine)
    return start(world, store, **settings)


def answer(world: MemoryCluster, engine: MemoryEngine, request: EngineRequest) -> tuple[list[int], int | None]:
    """Return the tokens of the answer, and the number of cached prompt tokens."""
    stream = world.answer(engine, request)
    return stream.token_ids, stream.cached


def file_of(folder: Path, engine: MemoryEngine, token_ids: tuple[int, ...], index: int) -> Path:
    """Return the path of this page of the prompt."""
    (path,) = folder.rglob(f"{page_digests(token_ids, 4, engine.namespace)[index].hex()}.page")
    return path


@SAMPLING
def test_pages_from_the_store_after_a_restart_give_the_same_tokens(
    world: MemoryCluster, tmp_path: Path, sampling: RequestFields
) -> None:
    storage = file_store(tmp_path / "pages")
    first = start(world, storage)
    computed = {n: answer(world, first, request_of(f"1-{n}", prompt(n), **sampling)) for n in LENGTHS}
    second = restart(world, first, storage)
    for n, (tokens, cached) in computed.items():
        assert cached == 0
        assert answer(world, second, request_of(f"2-{n}", prompt(n), **sampling)) == (tokens, hits(n))
    totals = second.scheduler.status().totals
    assert totals["storage_fetched_pages"] == sum(hits(n) for n in LENGTHS) / 4
    assert totals["storage_failed_pages"] == 0
    world.check_ledgers()


@SAMPLING
def test_prefill_and_decode_both_fetch_their_pages_from_a_shared_store(
    world: MemoryCluster, tmp_path: Path, sampling: RequestFields
) -> None:
    storage = file_store(tmp_path / "pages")
    alone = start(world, StorageConfig())
    computed = {n: answer(world, alone, request_of(f"0-{n}", prompt(n), **sampling))[0] for n in LENGTHS}
    pair = start(world, storage, role=Role.PREFILL), start(world, storage, role=Role.DECODE)
    for life in (1, 2):
        for n, tokens in computed.items():
            stream = world.submit_pair(*pair, request_of(f"{life}-{n}", prompt(n), **sampling))
            world.run()
            assert [ended.outcome for ended in stream.ended] == [Outcome.FINISHED] * 2
            assert stream.token_ids == tokens
        if life == 1:
            pair = (
                restart(world, pair[0], storage, role=Role.PREFILL),
                restart(world, pair[1], storage, role=Role.DECODE),
            )
    for engine in pair:
        assert engine.scheduler.status().totals["storage_fetched_pages"] >= 1 + 4 + 8 + 14
    world.check_ledgers()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_damaged_or_missing_page_in_the_store_ends_the_cached_prefix(
    world: MemoryCluster, tmp_path: Path, damage: Any
) -> None:
    storage = file_store(tmp_path / "pages")
    first = start(world, storage)
    tokens, _ = answer(world, first, request_of("1", prompt(33), max_tokens=1))
    damage(file_of(tmp_path, first, prompt(33), 5))
    second = restart(world, first, storage)
    assert answer(world, second, request_of("2", prompt(33), max_tokens=1)) == (tokens, 5 * 4)
    assert second.storage.totals()["storage_broken_pages"] == (damage is flip)
    third = restart(world, second, storage)  # recomputed pages have been stored again
    assert answer(world, third, request_of("3", prompt(33), max_tokens=1)) == (tokens, 8 * 4)


@pytest.mark.parametrize("num_good", [0, 15, 16, 17, 31])  # of 32 pages, fetched in two pieces
def test_when_a_page_fails_during_a_fetch_the_pages_before_it_are_kept_and_the_rest_is_computed(
    world: MemoryCluster, tmp_path: Path, num_good: int
) -> None:
    storage = file_store(tmp_path / "pages")
    first = start(world, storage)
    tokens, _ = answer(world, first, request_of("1", prompt(129), **SEEDED))
    for index in range(num_good, 32, 2):  # and every second page after it
        flip(file_of(tmp_path, first, prompt(129), index))
    second = restart(world, first, storage)
    assert answer(world, second, request_of("2", prompt(129), **SEEDED)) == (tokens, 4 * num_good)
    assert second.scheduler.status().totals["host_failed_pages"] == 0
    world.check_ledgers()


def test_with_a_full_disk_no_page_is_stored_and_every_request_is_answered(
    world: MemoryCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    engine = start(world, file_store(tmp_path / "pages"))
    monkeypatch.setattr("kvist.store.file.os.writev", full)
    tokens, _ = answer(world, engine, request_of("1", prompt(33)))
    assert [*tmp_path.rglob("*.page")] == []
    status = engine.storage.status()
    assert (set(status.errors), status.breaker) == ({"ENOSPC"}, "closed"), "the store itself waits a while"
    assert engine.scheduler.status().totals["storage_failed_pages"] == 11
    monkeypatch.undo()
    assert answer(world, engine, request_of("2", prompt(33))) == (tokens, 32)


def test_a_missing_store_path_is_created_and_an_impossible_one_names_its_flag(
    world: MemoryCluster, tmp_path: Path
) -> None:
    start(world, file_store(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/pages")):
        with pytest.raises(ConfigError, match=r"--hicache-storage-path: cannot open .* may write") as raised:
            start(world, file_store(path))
        assert raised.value.param == "hicache_storage_path"
    with pytest.raises(ConfigError, match=r"--hicache-storage-size: .* is smaller than one page"):
        start(world, file_store(tmp_path / "small", size=1e-6))


def test_two_workers_that_store_the_same_pages_at_once_leave_whole_pages(world: MemoryCluster, tmp_path: Path) -> None:
    storage = file_store(tmp_path / "pages")
    both = [start(world, storage) for _ in range(2)]
    streams = [
        world.submit_full(engine, request_of(f"{number}-{n}", prompt(n)))
        for n in LENGTHS
        for number, engine in enumerate(both)
    ]
    world.run()
    third = start(world, storage)
    for n, one, two in zip(LENGTHS, streams[::2], streams[1::2], strict=True):
        assert one.token_ids == two.token_ids
        assert answer(world, third, request_of(f"3-{n}", prompt(n))) == (one.token_ids, hits(n))


def test_another_model_or_cache_salt_finds_no_page_in_the_store(world: MemoryCluster, tmp_path: Path) -> None:
    storage = file_store(tmp_path / "pages")

    def salted(name: str, salt: str) -> Any:
        return msgspec.structs.replace(request_of(name, prompt(33)), cache_salt=salt)

    engine = start(world, storage)
    assert answer(world, engine, salted("1", ""))[1] == 0
    assert answer(world, engine, salted("2", "a"))[1] == 0
    engine = restart(world, engine, storage)
    assert answer(world, engine, salted("3", "b"))[1] == 0
    assert answer(world, engine, salted("4", "a"))[1] == 32
    other = start(world, storage, fingerprint="another model")
    assert answer(world, other, salted("5", ""))[1] == 0
    assert answer(world, other, salted("6", "a"))[1] == 0


@pytest.fixture(autouse=True)
def stores(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The dict of stores, with one in memory."""
    monkeypatch.setitem(STORES, "memory", MEMORY_STORE)
    return STORES  # type: ignore[return-value]


class HangingStore(MemoryStore):
    """A store whose `get`, `put` and `probe` wait for `go`."""

    go: threading.Event
    num_gets = num_puts = 0

    def get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> int:
        self.num_gets += 1
        assert self.go.wait(120)
        return super().get(keys, into)

    def put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        self.num_puts += 1
        assert self.go.wait(120)
        return super().put(keys, pages)

    def probe(self) -> None:
        assert self.go.wait(120)


@pytest.fixture
def hanging(stores: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> HangingStore:
    store = HangingStore(StoreContext(namespace="n", page_bytes=4 * 2 * 2 * 4 * 8 * 2))
    store.go = threading.Event()
    store.go.set()
    for name in ("file", "memory"):
        row = MEMORY_STORE if name == "memory" else STORES[name]
        monkeypatch.setitem(stores, name, dataclasses.replace(row, make=lambda _given, _context: store))
    monkeypatch.setattr(store, "close", lambda: None)  # the store outlives the engines of this test
    return store


def hang(world: MemoryCluster, engine: MemoryEngine, store: HangingStore, request: EngineRequest) -> None:
    """Answer the request and let the store hang while it stores the pages of the request."""
    store.go.clear()
    num_puts, stream = store.num_puts, world.submit_full(engine, request)
    world.step_until(lambda: not stream.waits_for and store.num_puts > num_puts)


def test_while_a_store_hangs_requests_are_answered_and_its_host_pages_stay_in_flight(
    world: MemoryCluster, tmp_path: Path, hanging: HangingStore
) -> None:
    storage = file_store(tmp_path, deadline_s=DEADLINE_S)
    first = start(world, storage)
    tokens, _ = answer(world, first, request_of("1", prompt(33)))
    engine = restart(world, first, storage, queue_timeout_s=4 * DEADLINE_S)
    hanging.go.clear()
    stream = world.submit_full(engine, request_of("2", prompt(33)))
    world.step_until(lambda: hanging.num_gets)
    world.step_until(lambda: not stream.waits_for, step_s=0.1)
    assert (stream.token_ids, stream.cached) == (tokens, 0)
    status = engine.storage.status()
    assert status.breaker != "closed"
    assert status.num_quarantined_pages == 8
    assert engine.num_host_pages_in_flight >= 8
    begun = world.submit_full(engine, request_of("3", prompt(60)))  # the store gets no call
    world.step_until(lambda: not begun.waits_for)
    assert engine.scheduler.status().totals["prefetch_timeouts"] == 1
    hanging.go.set()
    world.run()
    assert engine.num_host_pages_in_flight == 0
    assert engine.storage.status().num_quarantined_pages == 0
    world.clock.advance(PAUSE_S)
    world.step_until(
        lambda: engine.storage.status().breaker == "closed", step_s=0.1
    )  # a probe has found that the store answers
    answer(world, engine, request_of("4", prompt(60, seed=1)))
    assert engine.storage.status().errors == {}
    world.check_ledgers()


def test_a_store_is_attached_and_detached_while_requests_are_served(world: MemoryCluster, tmp_path: Path) -> None:
    engine = start(world, StorageConfig(hicache_storage_roots=(str(tmp_path),)))
    asked = world.storage_status(engine, "status")
    assert (asked.state, asked.backend) == ("detached", None)
    streams = [world.submit_full(engine, request_of(f"a{n}", prompt(n))) for n in LENGTHS]
    status = world.storage_status(engine, "attach", backend="file", path=str(tmp_path / "pages"), size=1.0)
    assert (status.state, status.options["path"]) == ("attached", str(tmp_path / "pages"))
    world.run()
    for n, stream in zip(LENGTHS, streams, strict=True):  # computed without a store, and stored at the next hit
        assert answer(world, engine, request_of(f"b{n}", prompt(n)))[0] == stream.token_ids
    again = world.on_storage_command(engine, "attach", backend="file", path=str(tmp_path / "pages"), size=1.0)
    assert again.status is not None, "it is so already"
    other = world.on_storage_command(engine, "attach", backend="memory")
    assert (other.error_code, other.param) == ("conflict", "backend")
    assert "a file store in" in other.message

    fresh = start(world, StorageConfig(hicache_storage_roots=(str(tmp_path),)))
    streams = [world.submit_full(fresh, request_of(f"c{n}", prompt(n))) for n in LENGTHS[:3]]
    world.on_storage_command(fresh, "attach", backend="file", path=str(tmp_path / "pages"), size=1.0)
    tokens, cached = answer(world, fresh, request_of("c60", prompt(60)))
    assert cached == hits(60)
    more = [world.submit_full(fresh, request_of(f"d{n}", prompt(n, seed=7))) for n in LENGTHS]
    left = world.storage_status(fresh, "detach")
    assert (left.state, left.backend, left.note) == ("detached", None, "")
    world.run()
    assert all([ended.outcome for ended in stream.ended] == [Outcome.FINISHED] for stream in [*streams, *more])
    assert world.storage_status(fresh, "detach").state == "detached", "it is so already"
    num_jobs = fresh.num_store_jobs
    assert answer(world, fresh, request_of("e33", prompt(33)))[1] == 0
    assert fresh.num_store_jobs == num_jobs, "the scheduler knows that there is no store"
    assert answer(world, engine, request_of("f60", prompt(60))) == (tokens, hits(60))
    world.check_ledgers()


def test_a_refused_attach_names_the_field_and_changes_nothing(world: MemoryCluster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    engine = start(world, StorageConfig(hicache_storage_roots=(str(tmp_path),)))
    for wanted, param in (
        ({}, "backend"),
        ({"backend": "nfs"}, "backend"),
        ({"backend": "memory", "path": "/pages"}, "path"),
        ({"backend": "file", "path": str(tmp_path / "file")}, "path"),
        ({"backend": "file", "path": "a\0b"}, "path"),
        ({"backend": "file", "path": ""}, "path"),
        ({"backend": "file", "path": "pages"}, "path"),
        ({"backend": "file", "path": "~nobody-of-this-name/pages"}, "path"),
        ({"backend": "file", "path": "~nobody-of-this-name\n/x\0"}, "path"),
        ({"backend": "file", "path": "~\0/pages"}, "path"),
        ({"backend": "file", "path": str(tmp_path / "small"), "size": 0}, "size"),
        ({"backend": "file", "path": str(tmp_path / "small"), "size": 1e-9}, "size"),
        ({"backend": "file", "path": str(tmp_path / "small"), "size": 1e400}, "size"),
        ({"backend": "file", "size": "large"}, "size"),
        ({"backend": "memory", "prefetch_policy": "best_effort"}, "prefetch_policy"),
    ):
        answered = world.on_storage_command(engine, "attach", **wanted)
        assert (answered.error_code, answered.param) == ("invalid_request", param), wanted
        assert world.storage_status(engine, "status").state == "detached"
    without = world.start()
    assert (
        "start the worker with --enable-hierarchical-cache"
        in world.on_storage_command(without, "attach", backend="memory").message
    )


def test_a_store_that_hangs_while_opening_blocks_no_request_and_can_be_detached(
    world: MemoryCluster, stores: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    go, closed = threading.Event(), threading.Event()

    class Slow(MemoryStore):
        def close(self) -> None:
            closed.set()

    def open_slowly(_given: object, context: StoreContext) -> MemoryStore:
        assert go.wait(60)
        return Slow(context)

    monkeypatch.setitem(stores, "memory", dataclasses.replace(MEMORY_STORE, make=open_slowly))
    engine = start(world, StorageConfig())
    slow = world.ask_later(engine, "attach", backend="memory")
    answer(world, engine, request_of("1", prompt(33)))
    assert slow not in world.storage_answers
    assert world.storage_status(engine, "status").state == "attaching"
    assert world.on_storage_command(engine, "attach", backend="memory").error_code == "conflict"
    assert world.storage_status(engine, "detach").state == "detached"
    assert world.storage_answers[slow].error_code == "conflict"
    world.ask_later(engine, "attach", backend="memory")
    assert world.storage_status(engine, "detach").state == "detached"
    refused = world.on_storage_command(engine, "attach", backend="memory")
    assert (refused.error_code, "2 detached stores still have hung calls" in refused.message) == ("conflict", True)
    go.set()
    assert closed.wait(60)
    assert world.storage_status(engine, "attach", backend="memory").state == "attached"


def test_a_store_that_hangs_at_detach_is_abandoned_after_a_timeout(
    world: MemoryCluster, tmp_path: Path, hanging: HangingStore
) -> None:
    engine = start(world, file_store(tmp_path, deadline_s=DEADLINE_S))
    hang(world, engine, hanging, request_of("1", prompt(33)))
    status = world.storage_status(engine, "detach", step_s=0.1)
    assert (status.state, status.note) == ("detached", "detached, but a call of the store hangs")
    assert engine.num_host_pages_in_flight > 0
    hanging.go.set()
    world.run()
    assert engine.num_host_pages_in_flight == 0


def test_after_two_hung_stores_no_other_store_is_attached(
    world: MemoryCluster, tmp_path: Path, hanging: HangingStore
) -> None:
    engine = start(world, file_store(tmp_path, deadline_s=DEADLINE_S))

    def hang_and_detach(name: str, first_token: int) -> str:
        hang(world, engine, hanging, request_of(name, (first_token, *prompt(17))))
        return world.storage_status(engine, "detach", step_s=0.1).note

    assert "hangs" in hang_and_detach("1", 1)
    world.on_storage_command(engine, "attach", backend="memory")
    assert world.storage_status(engine, "detach").note == ""
    assert world.storage_status(engine, "attach", backend="memory").state == "attached"
    assert "hangs" in hang_and_detach("2", 2)
    assert world.on_storage_command(engine, "attach", backend="memory").error_code == "conflict"
    hanging.go.set()
    world.run()
    assert world.storage_status(engine, "attach", backend="memory").state == "attached"
